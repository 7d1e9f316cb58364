"""A complete hardware profile from measurements: what was measured here, and what a named profile stands in for."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from planner.measure import fit, network
from planner.measure.gemm import compute_types
from planner.measure.records import Row
from planner.measure.sources import Data, Sources
from planner.measure.sustained import both_ways
from planner.specs.figures import Figure
from planner.specs.hardware import Device, GemmTiles, HardwareProfile
from planner.units import GIB


def document(s: Sources) -> Data:
    """The whole profile as plain data; see `text.write` for the file."""
    m = s.measurements
    kind = m.environment["kind"]
    draft = _draft(s)
    device = draft.device
    bytes_each, peak = fit.ELEMENT_BYTES[kind], device.peak[compute_types(kind)[0]].base  # type: ignore[index]
    data = draft.model_dump(mode="json", exclude_none=True)
    gemm = _gemm(s, device, peak, bytes_each)
    data["device"]["gemm"] = gemm
    data["device"]["attention"] = _attention(s, device, peak)
    fitted = device.model_copy(update={"gemm": GemmTiles(**gemm)})
    data["device"]["sustained"] = _sustained(s, fitted, peak, bytes_each)
    data["network"] = _network(s, draft)
    data["overlap_slowdown"] = _overlap(s)
    data["device"] |= _from_datasheet(s, "power", s.same.device.power if s.same else None)
    data |= _from_datasheet(s, "price", s.same.price if s.same else None)
    if s.same is not None and s.same.engines:
        data["engines"] = {e: s.copied(s.same, "engines' constants", c) for e, c in s.same.engines.items()}
    return _ordered(data)


def _from_datasheet(s: Sources, key: str, figure: Figure | None) -> Data:
    return {} if figure is None or s.same is None else {key: s.copied(s.same, key, figure)}


def _draft(s: Sources) -> HardwareProfile:
    """A profile with everything that needs no fit, and placeholders for the rest."""
    environment = s.measurements.environment
    unknown: Data = {"provenance": "assumed", "source": "to be fitted"}
    device = {
        "name": environment["device"], "kind": environment["kind"], "compute_units": environment["compute_units"],
        "peak": _peaks(s), **_memory(s), **_overheads(s),
        "sustained": {"value": 1.0} | unknown, "host_link": _host_link(s),
        "gemm": fit.tiles(dict.fromkeys(fit._TILES, 0.5)).model_dump(mode="json"),
        "attention": {"forward": 0.5, "backward": 0.4, "half_length": 700.0} | unknown,
    }  # fmt: skip
    tier = {"name": "node", "bandwidth": _tier_bandwidth(s), "latency": {"value": "1 us"} | unknown,
            "efficiency": {"points": [[1.0, 0.5]]} | unknown}  # fmt: skip
    return HardwareProfile.model_validate({
        "name": s.name, "description": f"measured: {s.stamp}", "device": device, "node_size": s.node_size,
        "network": [tier], "overlap_slowdown": {"value": 1.0} | unknown,
    })  # fmt: skip


# ---- the device ----------------------------------------------------------------------------------------------------


def _best_rate(rows: list[Row]) -> float:
    flops = 2.0 * fit.column(rows, "m") * fit.column(rows, "n") * fit.column(rows, "k")
    return float(np.max(flops / fit.seconds_of(rows)))


def _peaks(s: Sources) -> Data:
    """Dense peaks: the datasheet's of a known device, else the best rate seen."""
    m, kind = s.measurements, s.measurements.environment["kind"]
    if s.same is not None and kind != "cpu":
        return {str(t): s.copied(s.same, "peaks", f) for t, f in s.same.device.peak.items()}
    main = compute_types(kind)[0]
    found = {}
    for name in compute_types(kind):
        rows = m.of("gemm", f"best {name}") + (m.of("gemm", "product") if name == main else [])
        found[name] = s.measured(f"{_best_rate(rows) / 1e9:.4g} GFLOP/s", "best rate of large products")
    return found


def _memory(s: Sources) -> Data:
    """Capacity, bandwidth, and the share of it that streaming kernels reach."""
    m, cpu = s.measurements, s.measurements.environment["kind"] == "cpu"
    total = (m.value("overheads", "total memory") or 0.0) / (m.environment["devices"] if cpu else 1)
    capacity = "the host's memory, shared by its processes" if cpu else "total capacity reported by the driver"
    reached = fit.stream_rate(m)
    others = {name: statistics.median(rates) / reached for name in ("norm", "adamw") if (rates := fit.stream_rates(m, name))}
    note = ", ".join(f"{name} at {share:.2f} of copies and adds" for name, share in others.items())
    if s.same is not None and not cpu:
        bandwidth: Data = s.copied(s.same, "memory bandwidth", s.same.device.memory_bandwidth)
        share = reached / s.same.device.memory_bandwidth.base
    else:
        best = max(r for name in fit.STREAMS for r in fit.stream_rates(m, name))
        bandwidth, share = s.measured(_rate(best), "best rate of copies and adds"), reached / best
    return {
        "memory": s.measured(f"{total / GIB:.2f} GiB", capacity), "memory_bandwidth": bandwidth,
        "memory_efficiency": s.measured(round(min(share, 1.0), 3), f"copies and adds at {_rate(reached)}", note),
    }  # fmt: skip


def _overheads(s: Sources) -> Data:
    """Context, communicator, workspace and launch."""
    m, world = s.measurements, s.measurements.environment["devices"]
    before = (m.value("overheads", "context before kernels") or 0.0) / GIB
    held = m.value("overheads", "context") or 0.0
    found = {"context": s.measured(_gib(held), "held outside the allocator with a layer's kernels", f"{before:.2f} GiB before")}
    one, first = m.value("collectives", "communicator"), m.value("collectives", "first communicator")
    if one is not None and first is not None and s.node_size == world:
        note = f"the first one {first / GIB:.2f} GiB with what the library loads"
        found["communicator"] = s.measured(_gib(max(one, 1 << 20)), f"one more communicator of {world} ranks", note)
    elif s.base is not None:
        here = {} if one is None else {"note": f"{one / GIB:.2f} GiB for one more of {world} ranks: {s.stamp}"}
        found["communicator"] = s.copied(s.base, "communicator", s.base.device.communicator) | here
    workspace = m.value("overheads", "workspace")
    if workspace is None:
        found["workspace"] = {"value": "0.01 GiB", "provenance": "assumed", "source": "scratch of the CPU's kernels"}
    else:
        found["workspace"] = s.measured(_gib(workspace), "of one product, inside the allocator")
    launch = m.value("overheads", "launch") or 0.0
    found["launch"] = s.measured(f"{launch * 1e6:.2f} us", "host time of one small operation, launched in a row")
    return found


def _host_link(s: Sources) -> Data:
    rows = s.measurements.of("memory", "to device", "to host")
    if not rows:
        return {"value": _rate(fit.stream_rate(s.measurements)), "provenance": "assumed", "source": "memory is host memory"}
    rates = {r.name: r.sizes["bytes"] / r.value for r in rows}
    note = ", ".join(f"{name} {_rate(rate)}" for name, rate in rates.items())
    return s.measured(_rate(min(rates.values())), "pinned copies, the slower direction, all devices at once", note)


def _gemm(s: Sources, device: Device, peak: float, element_bytes: float) -> Data:
    m = s.measurements
    rows = m.of("gemm", "product")
    found = fit.fit_gemm(rows, device, peak, element_bytes)
    whole = device.model_copy(update={"gemm": fit.tiles(found.values)})
    beside = []
    for name in ("weight gradient", "grouped"):
        if others := m.of("gemm", name):
            ratio = fit.seconds_of(others) / fit.predicted_gemm(others, whole, peak, element_bytes)
            beside.append(f"{len(others)} {name} products take {statistics.geometric_mean(ratio):.2f} of what it says")
    kind = compute_types(m.environment["kind"])[0]
    told = f"fitted to {len(rows)} {kind} products: mean absolute error {found.error:.1%} on the {found.count} longer ones"
    v = found.values
    return {
        "latency": f"{v['latency'] * 1e6:.3f} us", "large": round(v["large"], 4), "medium": round(v["medium"], 4),
        "small": round(v["small"], 4), "tile_overhead": f"{v['tile_overhead'] * 1e6:.3f} us",
        "memory_efficiency": round(v["memory_efficiency"], 4), "wave_rounding": round(v["wave_rounding"], 4),
        "provenance": "fitted", "source": "; ".join([told, *beside, s.stamp]),
    }  # fmt: skip


def _attention(s: Sources, device: Device, peak: float) -> Data:
    m = s.measurements
    backend = fit.best_backend(m)
    rows = m.of("attention", f"{backend} forward", f"{backend} backward")
    found = fit.fit_attention(rows, device, peak)
    what = "scaled_dot_product_attention" if backend == "default" else f"{backend} attention, the fastest kernel"
    default = m.of("attention", "default forward", "default backward")
    note = ""
    if backend != "default" and default:
        at = {(r.name.split()[1], *r.sizes.values()): r.value for r in rows}
        pairs = [(r.value, at[key]) for r in default if (key := (r.name.split()[1], *r.sizes.values())) in at]
        note = f"; torch's own choice takes {statistics.geometric_mean(a / b for a, b in pairs):.2f} times as long"
    told = f"{what}, {found.count} timings forward and backward: mean absolute error {found.error:.1%}{note}"
    v = {k: round(x, 0 if k == "half_length" else 3) for k, x in found.values.items()}
    return {**v, "provenance": "fitted", "source": f"{told}; {s.stamp}"}


def _sustained(s: Sources, device: Device, peak: float, element_bytes: float) -> Data:
    chain = [Row("sustained", "product", shape._asdict(), 0.0) for shape in both_ways(s.measurements.environment["kind"])]
    value = fit.sustained(s.measurements, chain, device, peak, element_bytes)
    if value is None:
        return {"value": 1.0, "provenance": "assumed", "source": "not measured: no time was left"}
    hot, first = (s.measurements.value("sustained", name) or 1.0 for name in ("hot", "first"))
    what = "a layer's products back to back for seconds, over what the constants of gemm say"
    bounded = round(min(max(value, 1.0), 3.0), 3)
    return s.measured(bounded, what, f"ratio {value:.3f}; {hot / first:.3f} of the first pass")


# ---- the network ---------------------------------------------------------------------------------------------------


def _tier_bandwidth(s: Sources) -> Data:
    """Line rate between the devices of a node: the datasheet's of a known device, else the most that was seen."""
    if s.same is not None and s.same.device.kind != "cpu" and s.same.node_size > 1:
        return s.same.network[0].bandwidth.model_dump(mode="json", exclude_none=True)
    rows = [r for r in s.measurements.of("collectives") if "ranks" in r.sizes]
    if not rows:
        return {"value": "1 GB/s", "provenance": "assumed", "source": "not measured"}
    return s.measured(_rate(network.bus_bandwidth(rows)), "most that a rank moved in any collective")


def _network(s: Sources, draft: HardwareProfile) -> list[Data]:
    """The tier inside the node, measured if all its devices were; those beyond from the profile that stands in."""
    rows = [r for r in s.measurements.of("collectives") if "ranks" in r.sizes]
    world = int(s.measurements.environment["devices"])
    outer = [] if s.beyond is None else s.beyond.network[1:]
    wider = s.base is not None and s.base.network[0].size is not None and s.base.network[0].size > s.base.node_size
    if rows and s.node_size == world and not wider:
        cpu = s.measurements.environment["kind"] == "cpu"
        inside = _measured_tier(s, draft, rows) | ({} if cpu and not outer else {"size": s.node_size})
    else:
        assert s.base is not None
        inside = _compared_tier(s, rows)
    tiers = [t for t in outer if t.size is None or t.size > s.node_size]
    copied = [s.copied(s.beyond, f"network tier {t.name}", t) for t in tiers] if s.beyond else []
    return [inside, *copied]


def _measured_tier(s: Sources, draft: HardwareProfile, rows: list[Row]) -> Data:
    found = network.fit_tier(rows, draft)
    others = ", ".join(f"{op} {e:+.0%}" for op, e in found.errors.items() if op not in network.FITTED)
    groups = sorted({r.sizes["ranks"] for r in rows})
    told = (
        f"fitted to {found.count} all-gathers, reduce-scatters and all-reduces of groups of {', '.join(map(str, groups))}, "
        f"over the full tensor: mean absolute error {found.error:.1%}"
        + (f"; predicted over measured: {others}" if others else "")
    )
    shown = (
        s.base.network[0].name if s.base is not None else "node" if s.measurements.environment["kind"] != "cpu" else "loopback"
    )
    return {
        "name": shown, "bandwidth": _tier_bandwidth(s),
        "latency": s.measured(f"{found.latency * 1e6:.3g} us", "one step, with the efficiency curve", provenance="fitted"),
        "all_reduce": s.measured(round(found.all_reduce, 3), "passes of an all-reduce, with the curve", provenance="fitted"),
        "efficiency": {
            "points": [[int(size), round(share, 4)] for size, share in found.points],
            "provenance": "fitted", "source": f"{told}; {s.stamp}",
        },
    }  # fmt: skip


def _compared_tier(s: Sources, rows: list[Row]) -> Data:
    """The base's tier where part of its devices were measured: how far those are from it is said."""
    assert s.base is not None
    tier: Data = s.copied(s.base, f"network tier {s.base.network[0].name}", s.base.network[0])
    large = [r for r in rows if r.sizes["bytes"] >= 1 << 24 and r.name in network.FITTED]
    if large:
        ratio = network.predicted(large, s.base) / fit.seconds_of(large)
        devices = s.measurements.environment["devices"]
        told = f"{statistics.geometric_mean(ratio):.2f} times what {devices} devices took, from 16 MiB"
        efficiency = tier["efficiency"]
        before = efficiency["source"].partition("; this curve gives ")[0]
        tier["efficiency"] = efficiency | {"source": f"{before}; this curve gives {told} ({s.stamp})"}
    return tier


def _overlap(s: Sources) -> Data:
    """Measured where the whole node was; a part of it loads its links otherwise, so that its ratio is a note only."""
    value = fit.overlap_slowdown(s.measurements)
    whole = s.node_size == s.measurements.environment["devices"]
    if value is not None and (whole or s.base is None):
        what = "a layer's products beside all-gathers, reduce-scatters and all-reduces: what both take beyond the longer one"
        return s.measured(round(min(max(value, 1.0), 3.0), 3), what, f"mean ratio {value:.3f}")
    if s.base is None:
        return {"value": 1.15, "provenance": "assumed", "source": "usual on GPUs"}
    found: Data = s.copied(s.base, "overlap slowdown", s.base.overlap_slowdown)
    here = (
        f"{value:.2f} with {s.measurements.environment['devices']} devices that do nothing but compute and exchange: {s.stamp}"
    )
    return found if value is None else found | {"note": here}


def _rate(value: float) -> str:
    return f"{value / 1e12:.4g} TB/s" if value >= 1e12 else f"{value / 1e9:.4g} GB/s"


def _gib(value: float) -> str:
    return f"{value / GIB:.3f} GiB"


_KEYS = ("name", "description", "device", "node_size", "network", "overlap_slowdown", "price", "engines")
_DEVICE_KEYS = (
    "name", "kind", "compute_units", "peak", "memory", "memory_bandwidth", "memory_efficiency", "context", "communicator",
    "workspace", "launch", "sustained", "host_link", "power", "gemm", "attention",
)  # fmt: skip


def _ordered(data: Data) -> Data:
    """The keys in the order of the shipped files, without empty notes."""
    data["device"] = {k: data["device"][k] for k in _DEVICE_KEYS if k in data["device"]}
    return _without_empty({k: data[k] for k in _KEYS if k in data})


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_empty(v) for k, v in value.items() if v not in ("", {})}
    return [_without_empty(v) for v in value] if isinstance(value, list) else value
