"""Which device does what: the two meshes, their groups and network tiers, and the ranks of every node.

Ranks are numbered with tp innermost, then cp, dp, and pp outermost, or dp outside pp where the layout's `order` says so, as the
runtime and the cost of every group have it. The expert mesh numbers the same ranks of a stage with etp innermost, then ep,
then the copies of each expert.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from planner.cost.collectives import crossed_tiers
from planner.errors import input_error
from planner.planning.explain.answers import Group, Mesh, Node, Place
from planner.specs.hardware import HardwareProfile
from planner.specs.layout import RANK_ORDERS, Layout

DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "expert dp", "ep", "etp")


def _ordered(layout: Layout, dimensions: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Dimensions and their sizes from the outermost inwards."""
    if layout.order == RANK_ORDERS[0]:
        return dimensions, sizes
    return (dimensions[1], dimensions[0], *dimensions[2:]), (sizes[1], sizes[0], *sizes[2:])


def _dense(layout: Layout) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return _ordered(layout, DENSE, (layout.pp, layout.dp, layout.cp, layout.tp))


def _expert(layout: Layout) -> tuple[tuple[str, ...], tuple[int, ...]]:
    copies = max(layout.world_size // (layout.pp * layout.ep * layout.etp), 1)
    return _ordered(layout, EXPERT, (layout.pp, copies, layout.ep, layout.etp))


def dense_mesh(layout: Layout, hardware: HardwareProfile) -> Mesh:
    """The mesh of attention and dense layers; ZeRO shards over dp x cp."""
    mesh = _mesh(*_dense(layout), hardware)
    apart = 1 if layout.order == RANK_ORDERS[0] else layout.pp
    both = _group("dp x cp", layout.dp * layout.cp, layout.tp * apart, layout.world_size, hardware)
    return mesh.model_copy(update={"groups": [*mesh.groups, both]}) if layout.cp > 1 else mesh


def expert_mesh(layout: Layout, hardware: HardwareProfile) -> Mesh:
    """The mesh of routed experts. Raises InputError when its degrees do not divide the devices."""
    degrees = layout.ep * layout.etp * layout.pp
    if layout.world_size % degrees:
        what = f"{layout.world_size} devices are not a multiple of ep {layout.ep} x etp {layout.etp} x pp {layout.pp}"
        raise input_error("PLN217", what, "experts are spread over the ranks of one pipeline stage", "choose another ep or etp")
    return _mesh(*_expert(layout), hardware)


def _mesh(dimensions: tuple[str, ...], shape: tuple[int, ...], hardware: HardwareProfile) -> Mesh:
    world, strides = int(np.prod(shape)), _strides(shape)
    groups = [_group(n, size, stride, world, hardware) for n, size, stride in zip(dimensions, shape, strides, strict=True)]
    return Mesh(dimensions=list(dimensions), shape=list(shape), groups=groups)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Distance between neighbours along each dimension, the last one innermost."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return strides[::-1]


def _group(name: str, size: int, stride: int, world: int, hardware: HardwareProfile) -> Group:
    crossed = [t.tier.name for t in crossed_tiers(np.array([float(size)]), np.array([float(stride)]), hardware) if t.crosses[0]]
    tier = crossed[-1] if crossed else ""
    return Group(name=name, size=size, stride=stride, groups=world // size, tier=tier)


def rank_map(layout: Layout, node_size: int) -> list[Node]:
    """Every node with its ranks and their coordinates in both meshes."""
    world = layout.world_size
    dense, expert = _coordinates(world, _dense(layout)[1]), _coordinates(world, _expert(layout)[1])
    bounds = [*range(0, world, node_size), world]
    return [
        Node(
            node=i,
            places=[Place(rank=r, local_rank=r - a, dense=dense[r], expert=expert[r]) for r in range(a, b)],
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def _coordinates(world: int, shape: tuple[int, ...]) -> list[list[int]]:
    found = np.stack(np.unravel_index(np.arange(world), shape), axis=1)
    return [[int(v) for v in row] for row in found]
