"""A hardware profile: one device kind and the network tiers around it, every figure with provenance and source.

Figures are written with units ("3.35 TB/s"). Tiers go from the inside out: tier 0 joins the devices of one fast domain
(a node, a rack), the next ones join domains. Bandwidths are per device and direction.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from planner import units
from planner.specs.base import Spec
from planner.specs.calibration import Calibration, without_recipe
from planner.specs.figures import Bandwidth, Bytes, FlopRate, Provenance, Ratio, Seconds, UsdPerHour, Watts
from planner.specs.job import Precision


class Curve(Spec):
    """Utilisation over a size: interpolated over the size's logarithm, held at its ends outside the measured range."""

    points: list[list[float]] = Field(min_length=1)
    """[size in bytes, share of the roofline] pairs, sizes ascending."""
    provenance: Provenance
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Curve:
        if any(len(p) != 2 for p in self.points) or any(p[0] <= 0 or not 0 < p[1] <= 1.5 for p in self.points):
            raise ValueError("every point is [size in bytes > 0, share in (0, 1.5]]")
        if any(a[0] >= b[0] for a, b in itertools.pairwise(self.points)):
            raise ValueError("sizes must ascend")
        return self


class DomainCurve(Spec):
    """What large collectives reach over many domains: measured, it replaces line rates where it is lower.

    Big networks lose bandwidth as a job grows (congestion, adaptive routing), which no line rate shows.
    """

    points: list[list[float]] = Field(min_length=1)
    """[domains, bus bandwidth of one whole domain in bytes/s] pairs, domains ascending; interpolated over their logarithm."""
    provenance: Provenance
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> DomainCurve:
        if any(len(p) != 2 or p[0] < 1 or p[1] <= 0 for p in self.points):
            raise ValueError("every point is [domains >= 1, bytes/s > 0]")
        if any(a[0] >= b[0] for a, b in itertools.pairwise(self.points)):
            raise ValueError("domains must ascend")
        return self


class GemmTiles(Spec):
    """Time of a matrix product by tiles and waves: seven constants, fitted to a table of measured products.

    t(M, N, K) = latency + max( min over tiles [ waves * (2 area K / (peak / units * efficiency) + tile_overhead) ],
                                bytes / (memory bandwidth * memory_efficiency) )
    with waves between the exact and the rounded-up number of waves over the device's compute units.
    """

    latency: str
    """Time of an empty product, such as "2.2 us"."""
    large: float = Field(gt=0, le=1.2)
    """Share of the peak inside 256 x 128 tiles."""
    medium: float = Field(gt=0, le=1.2)
    """Share of the peak inside 128 x 128 tiles."""
    small: float = Field(gt=0, le=1.2)
    """Share of the peak inside 64 x 64 tiles."""
    tile_overhead: str
    """Fixed time of one wave, such as "0.8 us"."""
    memory_efficiency: float = Field(gt=0, le=1.2)
    wave_rounding: float = Field(ge=0, le=1)
    """0: waves are rounded up to whole ones; 1: partial waves cost their share."""
    provenance: Provenance
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _times_are_times(self) -> GemmTiles:
        if min(self.latency_s, self.tile_overhead_s) < 0:
            raise ValueError("latency and tile_overhead cannot be negative")
        return self

    @cached_property
    def latency_s(self) -> float:
        """`latency` in seconds."""
        return units.parse(self.latency, "seconds")

    @cached_property
    def tile_overhead_s(self) -> float:
        """`tile_overhead` in seconds."""
        return units.parse(self.tile_overhead, "seconds")


class FlashAttention(Spec):
    """Share of the peak that fused attention reaches on long sequences, forward and backward."""

    forward: float = Field(gt=0, le=1)
    backward: float = Field(gt=0, le=1)
    half_length: float = Field(default=700.0, ge=0)
    """Sequence length at which half of that share is reached."""
    provenance: Provenance
    source: str = Field(min_length=1)


class Device(Spec):
    """One accelerator (or one CPU process)."""

    name: str
    kind: Literal["cuda", "rocm", "cpu"]
    compute_units: int = Field(gt=0)
    """Streaming multiprocessors, compute units, or cores a process."""
    peak: dict[Precision | Literal["fp8", "fp4"], FlopRate]
    """Dense peak a type, no sparsity."""
    memory: Bytes
    """What a process can allocate in all, as the runtime reports it (less than the vendor's figure)."""
    memory_bandwidth: Bandwidth
    memory_efficiency: Ratio
    """Share of that bandwidth that streaming kernels reach."""
    context: Bytes
    """Held by the driver and the loaded kernels, outside any allocator."""
    communicator: Bytes
    """Buffers of one communicator (one process group over more than one rank), outside the allocator."""
    workspace: Bytes
    """Library workspaces inside the allocator (cuBLAS)."""
    launch: Seconds
    """Host time to launch one small kernel."""
    gemm: GemmTiles
    attention: FlashAttention
    sustained: Ratio
    """How much slower compute runs in seconds-long training than in a kernel table (1 = not slower)."""
    host_link: Bandwidth
    power: Watts | None = None

    @model_validator(mode="after")
    def _sustained_is_a_slowdown(self) -> Device:
        if not 1 <= self.sustained.base <= 3:
            raise ValueError("sustained is a factor on compute time, from 1 to 3")
        if self.context.base + self.workspace.base >= self.memory.base:
            raise ValueError("context and workspace leave no memory")
        if self.memory_efficiency.base > 1:
            raise ValueError("memory_efficiency is a share of the bandwidth, at most 1")
        return self


class Tier(Spec):
    """One level of the network."""

    name: str
    size: int | None = Field(default=None, gt=1)
    """Devices that this tier joins; left out for the outermost tier, which joins any number."""
    bandwidth: Bandwidth
    """Per device and direction: a node's NICs divided by its devices."""
    latency: Seconds
    """Of one step of a collective."""
    efficiency: Curve
    """Share of the bandwidth that a ring reaches, over the bytes of the full tensor (the gathered one)."""
    by_domains: DomainCurve | None = None
    """Bus bandwidth of collectives by how many domains (nodes) they join, where it was measured."""
    all_reduce_by_domains: DomainCurve | None = None
    """The same of all-reduces, which trees and in-network reduction carry otherwise than rings."""
    all_reduce: Ratio | None = None
    """How often an all-reduce passes the tensor through a link: 2 (a ring) when left out, less where switches add."""


class HardwareProfile(Spec):
    """A device kind, the nodes it comes in, and the network tiers around it."""

    name: str
    description: str = ""
    extends: str | None = None
    """The profile that this file was merged onto."""
    device: Device
    node_size: int = Field(gt=0)
    """Devices of one node (one host)."""
    network: list[Tier] = Field(min_length=1)
    overlap_slowdown: Ratio
    """Factor on compute time while a collective runs beside it."""
    price: UsdPerHour | None = None
    """Of one device."""
    engines: dict[str, Calibration] = Field(default_factory=dict)
    """Fitted constants by engine, `any` for the others."""

    @model_validator(mode="after")
    def _tiers_grow(self) -> HardwareProfile:
        sizes = [t.size for t in self.network]
        if any(s is None for s in sizes[:-1]):
            raise ValueError("only the last tier may leave out its size")
        known = [s for s in sizes if s is not None]
        if known and max(known[0], self.node_size) % min(known[0], self.node_size):
            raise ValueError(f"node_size {self.node_size} and the first tier's size {known[0]} do not divide each other")
        if not 1 <= self.overlap_slowdown.base <= 3:
            raise ValueError("overlap_slowdown is a factor on compute time, from 1 to 3")
        if any(a >= b or b % a for a, b in itertools.pairwise(known)):
            raise ValueError(f"tier sizes must grow, each a multiple of the one before: {sizes}")
        return self

    @property
    def max_devices(self) -> int | None:
        """The most devices this profile joins, None when unlimited."""
        return self.network[-1].size

    def calibration(self, engine: str) -> Calibration:
        """Fitted constants of an engine, those of `any` engine where it has none of its own."""
        for name in (engine, without_recipe(engine), "any"):
            if name in self.engines:
                return self.engines[name]
        return Calibration()
