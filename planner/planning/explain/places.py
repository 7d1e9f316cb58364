"""Which device does what: the two meshes, their groups and network tiers, and the ranks of every node.

Ranks are numbered in the layout's order: tp innermost, then cp, then dp with pp outermost, or pp with dp outermost, as the
runtime and the cost of every group have it. The expert mesh numbers the ranks of a stage with etp innermost, then ep, then the
copies of each expert; where other stages lie between them, its strides are those that the cost model prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from planner.cost import devicetypes
from planner.cost.collectives import crossed_tiers
from planner.cost.task import Ints, Task
from planner.errors import input_error
from planner.planning.explain.answers import Group, Mesh, Node, Place
from planner.specs.hardware import HardwareProfile
from planner.specs.layout import Layout

EXPERT = ("pp", "expert dp", "ep", "etp")


def dense_dimensions(layout: Layout) -> tuple[str, ...]:
    """Axes of the dense mesh from the outermost inwards."""
    return tuple(reversed(layout.order.split("-")))


def dense_mesh(layout: Layout, *profiles: HardwareProfile) -> Mesh:
    """The mesh of attention and dense layers; ZeRO shards over dp x cp. `profiles`: of each device type, one or two."""
    names = dense_dimensions(layout)
    shape = [getattr(layout, name) for name in names]
    mesh = _mesh(names, shape, _strides(shape), profiles)
    if layout.cp == 1:
        return mesh
    both = _group("dp x cp", layout.dp * layout.cp, layout.tp * _apart(layout), layout.world_size, profiles)
    return mesh.model_copy(update={"groups": [*mesh.groups, both]})


def expert_mesh(layout: Layout, *profiles: HardwareProfile) -> Mesh:
    """The mesh of routed experts. Raises InputError when its degrees do not divide the devices."""
    degrees = layout.ep * layout.etp * layout.pp
    if layout.world_size % degrees:
        what = f"{layout.world_size} devices are not a multiple of ep {layout.ep} x etp {layout.etp} x pp {layout.pp}"
        raise input_error("PLN217", what, "experts are spread over the ranks of one pipeline stage", "choose another ep or etp")
    shape, apart = [layout.pp, layout.world_size // degrees, layout.ep, layout.etp], _apart(layout)
    stride = layout.tp * layout.cp * (layout.dp if apart == 1 else 1)
    return _mesh(EXPERT, shape, [stride, layout.ep * layout.etp * apart, layout.etp, 1], profiles)


def _apart(layout: Layout) -> int:
    """How many stages lie between neighbours of dp."""
    return layout.pp if dense_dimensions(layout)[0] == "dp" else 1


def _mesh(dimensions: Sequence[str], shape: list[int], strides: list[int], profiles: Sequence[HardwareProfile]) -> Mesh:
    world = int(np.prod(shape))
    groups = [_group(n, size, stride, world, profiles) for n, size, stride in zip(dimensions, shape, strides, strict=True)]
    return Mesh(dimensions=list(dimensions), shape=shape, groups=groups)


def _strides(shape: list[int]) -> list[int]:
    """Distance between neighbours along each dimension, the last one innermost."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return strides[::-1]


def _group(name: str, size: int, stride: int, world: int, profiles: Sequence[HardwareProfile]) -> Group:
    reach = np.array([float(size)]), np.array([float(stride)])
    crossed = [[t.tier.name for t in crossed_tiers(*reach, hardware) if t.crosses[0]] for hardware in profiles]
    tiers = dict.fromkeys(names[-1] for names in crossed if names)  # of each device type
    return Group(name=name, size=size, stride=stride, groups=world // size, tier=", ".join(tiers))


def node_types(task: Task, layout: Layout) -> list[str]:
    """The profile of every node in the order of their ranks, on two device types; empty on one.

    Stages are whole and pp is outermost: the nodes of the first stages' type come first.
    """
    in_order = [task.types[i] for i in devicetypes.in_order(layout)] if task.types else []
    return [t.hardware.name for t in in_order for _ in range(t.gpus // t.hardware.node_size)]


def rank_map(layout: Layout, node_size: int, types: Sequence[str] = ()) -> list[Node]:
    """Every node with its ranks and their coordinates in both meshes; `types`: the profile of each node, if there are two."""
    world, names = layout.world_size, dense_dimensions(layout)
    at = dict(zip(names, np.unravel_index(np.arange(world), [getattr(layout, name) for name in names]), strict=True))
    inside = (at["dp"] * layout.cp + at["cp"]) * layout.tp + at["tp"]  # place among the ranks of a stage
    spread = layout.ep * layout.etp
    dense = _listed(*(at[name] for name in names))
    expert = _listed(at["pp"], inside // spread, inside // layout.etp % layout.ep, inside % layout.etp)
    bounds = [*range(0, world, node_size), world]
    return [
        Node(
            node=i,
            hardware=types[i] if types else None,
            places=[Place(rank=r, local_rank=r - a, dense=dense[r], expert=expert[r]) for r in range(a, b)],
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def _listed(*columns: Ints) -> list[list[int]]:
    return [[int(v) for v in row] for row in np.stack(columns, axis=1)]
