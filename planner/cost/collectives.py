"""How long collectives take: latency and size over bandwidth, on the tiers that a group really crosses. Seconds.

Ranks are numbered with tp innermost, then cp, dp, pp outermost. A group of n ranks with stride st (the product of the
inner degrees) crosses tier t when it does not fit into one domain of tier t - 1. Groups that cross a domain's border at
the same time share its uplinks: each has as many as it has ranks in the domain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planner.cost.task import Bools, Floats
from planner.specs.hardware import DomainCurve, HardwareProfile, Tier

_MOVED = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def _efficiency(tier: Tier, n_bytes: Floats) -> Floats:
    """Share of the bandwidth that a collective over a tensor of `n_bytes` reaches: log-interpolated, held at the ends."""
    points = tier.efficiency.points
    sizes = np.log([p[0] for p in points])
    return np.interp(np.log(np.maximum(n_bytes, 1.0)), sizes, [p[1] for p in points])


def _measured_rate(curve: DomainCurve, domains: Floats) -> Floats:
    """Bus bandwidth of a whole domain as measured over `domains` of them; groups that share it are not slowed further.

    The measured curve falls with the number of domains for reasons other than the adapters' line rate, so a group that uses
    an eighth of the adapters does not get an eighth of it (fitted on 1 to 64 nodes of an EFA cluster).
    """
    points = curve.points
    return np.interp(np.log(np.maximum(domains, 1.0)), np.log([p[0] for p in points]), [p[1] for p in points])


def _once(copies: int, places: Floats) -> Floats:
    """Share of the bytes that remains when `copies` of a row that go to random ones of `places` are sent once to each."""
    places = np.maximum(places, 1.0)
    return places * (1.0 - (1.0 - 1.0 / places) ** copies) / copies


class Crossing(NamedTuple):
    """A network tier and the groups that cross it."""

    tier: Tier
    inner: float
    """Devices of one domain inside this tier."""
    crosses: Bools


def crossed_tiers(n: Floats, stride: Floats, hardware: HardwareProfile) -> list[Crossing]:
    """Which groups of `n` ranks at `stride` cross each tier, the inner one first; every crossed tier costs time."""
    span, inner, found = n * stride, 1.0, []
    for tier in hardware.network:
        found.append(Crossing(tier, inner, (n > 1) & (span > inner)))
        inner = float(tier.size) if tier.size is not None else np.inf
    return found


def collective_seconds(
    op: str, n: Floats, stride: Floats, n_bytes: Floats, hardware: HardwareProfile, copies: int = 1
) -> Floats:
    """Time of `op` over groups of `n` ranks at `stride`; `n_bytes` is the full tensor (the gathered one).

    A ring moves (n - 1) / n of the tensor through every link, an all-reduce twice that, or less where the switches add
    (Thakur 2005; NCCL's algorithm bandwidths). Latency: the ring's steps, or two tree depths when that is less.
    All-to-all counts only bytes that leave the domain on outer tiers; with `copies` > 1, the bytes hold each row that many
    times, and a row is sent only once to each rank, or to each domain. There every rank sends `n_bytes` of its own, through
    its own uplink; the other operations share one tensor over the uplinks of a domain's ranks.
    """
    n, stride, n_bytes = np.broadcast_arrays(np.asarray(n, float), stride, n_bytes)
    moved = (n - 1.0) / np.maximum(n, 1.0) * n_bytes
    total = np.zeros(n.shape)
    latency = np.zeros(n.shape)
    for depth, (tier, inner, crosses) in enumerate(crossed_tiers(n, stride, hardware)):
        ranks = np.clip(np.floor(inner / stride), 1.0, n)  # ranks of the group inside one inner domain
        domains = np.ceil(n / ranks)
        if tier.size is not None:
            domains = np.minimum(domains, np.maximum(1.0, np.ceil(tier.size / np.maximum(stride, inner))))
        switched = op == "all_reduce" and tier.all_reduce is not None and tier.all_reduce_by_domains is None
        factor = tier.all_reduce.base if switched and tier.all_reduce else _MOVED[op]
        share = moved if op != "all_to_all" or depth == 0 else n_bytes * np.maximum(n - ranks, 0.0) / np.maximum(n, 1.0)
        if copies > 1:
            share = share * _once(copies, n if depth == 0 else domains)
        uplinks = ranks if depth and op != "all_to_all" else 1.0
        rate = tier.bandwidth.base * uplinks * _efficiency(tier, n_bytes)
        curve = tier.all_reduce_by_domains if op == "all_reduce" else tier.by_domains
        if curve is not None:
            rate = np.minimum(rate, _measured_rate(curve, domains) / (ranks if op == "all_to_all" else 1.0))
        total = np.where(crosses, np.maximum(total, factor * share / rate), total)
        steps = np.minimum(domains - 1.0, 2.0 * np.ceil(np.log2(np.maximum(domains, 1.0))))
        latency = np.where(crosses, latency + factor * tier.latency.base * steps, latency)
    return total + latency


def neighbour_seconds(n_bytes: Floats, hardware: HardwareProfile) -> tuple[Floats, ...]:
    """Time to send `n_bytes` to a neighbour over each tier; a pipeline pays for the outermost tier that it crosses."""
    return tuple(tier.latency.base + n_bytes / (tier.bandwidth.base * _efficiency(tier, n_bytes)) for tier in hardware.network)
