"""Fits invert the cost model's own formulas: measurements made with known constants give these constants back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.cost.collectives import collective_seconds, neighbour_seconds
from planner.measure import fit, gemm, network, profile, sources, sustained, text
from planner.measure.attention import _CALLS
from planner.measure.records import Measurements, Row, merged, read, write
from planner.specs import files
from planner.specs.hardware import FlashAttention, HardwareProfile

PEAK = 989e12
NOISE = 0.01
CONSTANTS = {
    "latency": 3e-6, "large": 0.71, "medium": 0.72, "small": 0.66, "tile_overhead": 1.6e-6, "memory_efficiency": 0.7,
    "wave_rounding": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def h100() -> HardwareProfile:
    return files.load_hardware("h100-sxm")[0]


def noisy(values: Any, seed: int = 1) -> Any:
    return values * np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(values)))


def products(h100: HardwareProfile) -> list[Row]:
    device = h100.device.model_copy(update={"gemm": fit.tiles(CONSTANTS)})
    rows = [Row("gemm", "product", s._asdict(), 0.0) for s in gemm.shapes("cuda")[:100]]
    times = noisy(fit.predicted_gemm(rows, device, PEAK, 2.0))
    return [Row(r.section, r.name, r.sizes, float(t)) for r, t in zip(rows, times, strict=True)]


def attention(h100: HardwareProfile, backend: str, slower: float) -> list[Row]:
    known = FlashAttention(forward=0.61, backward=0.52, half_length=900.0, provenance="fitted", source="known")
    device = h100.device.model_copy(update={"attention": known})
    rows = [Row("attention", f"{backend} {way}", c._asdict(), 0.0) for c in _CALLS["cuda"] for way in ("forward", "backward")]
    times = noisy(fit.predicted_attention(rows, device, PEAK)) * slower
    return [Row(r.section, r.name, r.sizes, float(t)) for r, t in zip(rows, times, strict=True)]


def collectives(truth: HardwareProfile, ranks: tuple[int, ...] = (2, 4, 8)) -> list[Row]:
    rows = []
    for n in ranks:
        for size in (1 << p for p in range(12, 31, 2)):
            for op in network.FITTED:
                one = np.ones(1)
                seconds = float(collective_seconds(op, one * n, one, one * size, truth)[0])
                rows.append(Row("collectives", op, {"ranks": n, "bytes": size}, seconds))
    sent = float(neighbour_seconds(np.ones(1) * (1 << 26), truth)[0][0])
    rows.append(Row("collectives", "send", {"ranks": 2, "bytes": 1 << 26}, sent))
    return rows


def test_products_give_their_constants_back(h100: HardwareProfile) -> None:
    rows = products(h100)
    found = fit.fit_gemm(rows, h100.device, PEAK, 2.0)
    assert found.error < 2.5 * NOISE
    assert found.values["large"] == pytest.approx(CONSTANTS["large"], rel=0.05)
    assert found.values["memory_efficiency"] == pytest.approx(CONSTANTS["memory_efficiency"], rel=0.1)
    fitted = h100.device.model_copy(update={"gemm": fit.tiles(found.values)})
    unseen = [Row("gemm", "product", {"m": m, "n": n, "k": k, "groups": g}, 0.0)
              for m, n, k, g in ((6144, 5120, 5120, 1), (3000, 11008, 4096, 1), (512, 2816, 2048, 16))]  # fmt: skip
    truth = h100.device.model_copy(update={"gemm": fit.tiles(CONSTANTS)})
    ratio = fit.predicted_gemm(unseen, fitted, PEAK, 2.0) / fit.predicted_gemm(unseen, truth, PEAK, 2.0)
    assert np.abs(ratio - 1).max() < 0.04


def test_one_odd_timing_does_not_steer_the_fit(h100: HardwareProfile) -> None:
    rows = products(h100)
    rows[0] = Row("gemm", "product", rows[0].sizes, 10 * rows[0].value)
    assert fit.fit_gemm(rows, h100.device, PEAK, 2.0).values["large"] == pytest.approx(CONSTANTS["large"], rel=0.05)


def test_attention_gives_its_constants_back_of_the_fastest_kernel(h100: HardwareProfile) -> None:
    m = Measurements({}, attention(h100, "cudnn", 1.0) + attention(h100, "flash", 1.9) + attention(h100, "default", 1.9))
    assert fit.best_backend(m) == "cudnn"
    found = fit.fit_attention(m.of("attention", "cudnn forward", "cudnn backward"), h100.device, PEAK)
    assert found.values["forward"] == pytest.approx(0.61, rel=0.03)
    assert found.values["backward"] == pytest.approx(0.52, rel=0.03)
    assert found.values["half_length"] == pytest.approx(900, rel=0.15)


def test_collectives_give_a_tier_that_predicts_them(h100: HardwareProfile) -> None:
    points = [[65536.0, 0.02], [1048576.0, 0.2], [16777216.0, 0.5], [268435456.0, 0.75], [1073741824.0, 0.8]]
    truth = network.with_tier(h100, 4e-6, 1.6, points)
    rows = collectives(truth)
    found = network.fit_tier(rows, h100)
    assert found.error < 0.03
    assert found.latency == pytest.approx(4e-6, rel=0.2)
    assert found.all_reduce == pytest.approx(1.6, rel=0.03)
    shares = [share for _, share in found.points]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.8, rel=0.03)
    assert abs(found.errors["send"]) < 0.05


def test_overlap_inverts_what_the_model_says() -> None:
    from planner.cost.compute import overlapped

    rows = []
    for op, traffic in (("all_gather", 7e-3), ("all_reduce", 12e-3)):
        both = 9e-3 + float(overlapped(np.array(9e-3), np.array(traffic), 1.3, 0.0))
        values = {"compute alone": 9e-3, "traffic alone": traffic, "both": both}
        rows += [Row("overlap", f"{op}: {name}", {}, value) for name, value in values.items()]
    assert fit.overlap_slowdown(Measurements({}, rows)) == pytest.approx(1.3)


# ---- whole profiles ------------------------------------------------------------------------------------------------


def machine(h100: HardwareProfile, device: str, devices: int, local: int) -> Measurements:
    environment = {
        "kind": "cuda", "device": device, "devices": devices, "local_devices": local, "compute_units": 132,
        "stamp": f"{devices} x {device}, 2030-01-01", "date": "2030-01-01",
    }  # fmt: skip
    truth = network.with_tier(h100, 4e-6, 1.6, [[65536.0, 0.02], [1048576.0, 0.2], [268435456.0, 0.75]])
    fitted = h100.device.model_copy(update={"gemm": fit.tiles(CONSTANTS)})
    chain = [Row("sustained", "product", s._asdict(), 0.0) for s in sustained.both_ways("cuda")]
    hot = 1.07 * float(fit.predicted_gemm(chain, fitted, PEAK, 2.0).sum())
    held = {"total memory": 85e9, "context": 0.7e9, "context before kernels": 0.6e9, "workspace": 3.4e7, "launch": 5e-6}
    rows = [Row("overheads", name, {}, value) for name, value in held.items()]
    rows += [Row("gemm", f"best {t}", gemm.LARGE["cuda"]._asdict(), 2.0 * 8192**3 / rate)
             for t, rate in (("bf16", 7e14), ("fp16", 7e14), ("fp32", 5e13))]  # fmt: skip
    rows += products(h100) + attention(h100, "default", 1.0)
    rows += [Row("memory", op, {"bytes": 1 << 31}, (1 << 31) / 2.9e12) for op in ("copy", "add", "norm", "adamw")]
    rows += [Row("memory", op, {"bytes": 1 << 28}, (1 << 28) / 5e10) for op in ("to device", "to host")]
    rows += [Row("sustained", "first", {}, hot / 1.1), Row("sustained", "hot", {}, hot)]
    if devices > 1:
        rows += [Row("collectives", name, {}, 4e8) for name in ("communicator", "first communicator")]
        rows += collectives(truth, (devices,))
        rows += [Row("overlap", f"all_gather: {n}", {}, t)
                 for n, t in (("compute alone", 9e-3), ("traffic alone", 7e-3), ("both", 10e-3))]  # fmt: skip
    return Measurements(environment, rows)


def built(tmp_path: Any, m: Measurements, **options: Any) -> tuple[HardwareProfile, str]:
    s = sources.sources(m, options.get("base"), options.get("beyond"), "mine", options.get("node_size"))
    written = text.profile_text(profile.document(s), s.stamp, s.taken)
    path = tmp_path / "mine.yaml"
    path.write_text(written)
    return files.load_hardware(str(path))[0], written


def test_a_whole_node_of_a_known_device(h100: HardwareProfile, tmp_path: Any) -> None:
    found, written = built(tmp_path, machine(h100, h100.device.name, 8, 8))
    assert found.device.peak["bf16"].base == 989e12
    assert found.device.memory_efficiency.base == pytest.approx(2.9 / 3.35, abs=1e-3)
    assert found.device.sustained.base == pytest.approx(1.07, abs=0.03)
    assert found.overlap_slowdown.base == pytest.approx(1 + 1 / 7, abs=1e-3)
    assert (found.network[0].size, found.network[0].all_reduce.base) == (8, pytest.approx(1.6, rel=0.03))  # type: ignore[union-attr]
    assert found.network[1] == h100.network[1]
    assert found.engines == h100.engines
    assert "network tier infiniband (h100-sxm)" in written.splitlines()[1]
    assert "2030-01-01" in found.device.gemm.source


def test_part_of_a_node_leaves_the_network_to_the_base(h100: HardwareProfile, tmp_path: Any) -> None:
    found, written = built(tmp_path, machine(h100, h100.device.name, 2, 2), node_size=8)
    assert found.network[0].efficiency.points == h100.network[0].efficiency.points
    assert "times what 2 devices took" in found.network[0].efficiency.source
    assert found.overlap_slowdown.base == h100.overlap_slowdown.base
    assert "network tier nvlink (h100-sxm)" in written.splitlines()[1]


def test_an_unknown_device_has_its_best_rate_as_peak_and_no_network_beyond_the_node(
    h100: HardwareProfile, tmp_path: Any
) -> None:
    found, _ = built(tmp_path, machine(h100, "NVIDIA Unheard Of", 4, 4))
    peak = found.device.peak["bf16"]
    assert peak.provenance == "measured"
    assert 6e14 < peak.base < PEAK
    assert (len(found.network), found.max_devices, found.device.power, found.price) == (1, 4, None, None)
    assert "fp8" not in found.device.peak
    assert not found.engines


def test_medians_over_ranks_and_raw_files_keep_everything(tmp_path: Any) -> None:
    row = Row("gemm", "product", {"m": 1, "n": 2, "k": 3, "groups": 1}, 1.0)
    environment = {"device": "x", "kind": "cpu", "devices": 3, "stamp": "s"}
    ranks = [Measurements(environment, [Row(row.section, row.name, row.sizes, v)]) for v in (1.0, 5.0, 2.0)]
    ranks[1].rows.append(Row("overheads", "launch", {}, 1e-6))
    whole = merged(ranks)
    assert [r.value for r in whole.rows] == [2.0, 1e-6]
    write(whole, tmp_path / "raw")
    again = read(tmp_path / "raw")
    assert again.environment == environment
    assert sorted(again.rows, key=str) == sorted(whole.rows, key=str)
