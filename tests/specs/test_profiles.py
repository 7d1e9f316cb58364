"""Shipped hardware profiles: they load, their figures are sane and sourced; and errors in profiles name the place."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner import units
from planner.errors import InputError, Problem
from planner.specs.base import Spec
from planner.specs.files import data_folder, load_hardware, shipped
from planner.specs.hardware import HardwareProfile

VENDOR_GIB = {
    "a100-40gb-efa": 40,
    "a100-80gb-aleph": 80,
    "h100-sxm-dgx-cloud": 80,
    "b200-sxm-node": 180,
    "a100-80gb-efa": 80,
    "a100-80gb-hdr4": 80,
    "a100-80gb-jean-zay": 80,
    "b300-sxm": 288,
    "gb300-nvl72": 288,
    "h100-96gb-grand-teton": 96,
    "h200-sxm-node4": 141,
    "h800-sxm": 80,
    "mi325x": 256,
    "mi350x": 288,
    "mi355x": 288,
    "a100-80gb-sxm": 80,
    "a100-80gb-selene": 80,
    "a100-40gb-sxm": 40,
    "h100-sxm": 80,
    "h100-sxm-efa": 80,
    "h200-sxm": 141,
    "b200-sxm": 180,
    "gb200-nvl72": 186,
    "mi300x": 192,
    "l40s": 48,
    "rtx4090": 24,
    "local-cpu": 8,
}
"""What the vendor prints on the box; processes can allocate a little less."""

PROFILE = (data_folder("hardware_profiles") / "a100-80gb-sxm.yaml").read_text()


@pytest.fixture(params=sorted(shipped("hardware_profiles")))
def profile(request: pytest.FixtureRequest) -> HardwareProfile:
    return load_hardware(request.param)[0]


def figures(spec: Any) -> Iterator[Spec]:
    """Everything below `spec` that carries a provenance."""
    if isinstance(spec, Spec):
        if "provenance" in type(spec).model_fields:
            yield spec
        for name in type(spec).model_fields:
            yield from figures(getattr(spec, name))
    elif isinstance(spec, dict):
        for value in spec.values():
            yield from figures(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from figures(value)


def problem_of(path: Path) -> Problem:
    """The only problem of a profile."""
    with pytest.raises(InputError) as caught:
        load_hardware(str(path))
    assert len(caught.value.problems) == 1, str(caught.value)
    return caught.value.problems[0]


def edited(tmp_path: Path, start: str, line: str | None) -> tuple[Path, int]:
    """A copy of a shipped profile with its only line that begins so replaced or left out, and that line's number."""
    lines = PROFILE.splitlines()
    (at,) = [i for i, text in enumerate(lines) if text.startswith(start)]
    lines[at : at + 1] = [] if line is None else [line]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path, at + 1


def variant(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "variant.yaml"
    path.write_text(text)
    return path


# ---- shipped profiles ----------------------------------------------------------------------------------------------


def test_every_shipped_profile_is_listed_here():
    assert set(shipped("hardware_profiles")) == set(VENDOR_GIB)


def test_name_is_the_file_name(profile: HardwareProfile):
    assert profile.name in shipped("hardware_profiles")
    assert profile.description


def test_memory_is_below_what_the_vendor_prints(profile: HardwareProfile):
    memory = profile.device.memory.base / units.GIB
    assert 0.4 * VENDOR_GIB[profile.name] < memory < VENDOR_GIB[profile.name]
    fixed = profile.device.context.base + profile.device.workspace.base + 4 * profile.device.communicator.base
    assert fixed < 0.15 * profile.device.memory.base


def test_peaks_are_present_and_ordered(profile: HardwareProfile):
    peak = {kind: figure.base for kind, figure in profile.device.peak.items()}
    assert {"bf16", "fp16", "fp32"} <= set(peak)
    assert peak["bf16"] == peak["fp16"]
    if profile.device.kind != "cpu":
        assert peak["fp32"] < peak["bf16"] < peak.get("fp8", 1e18)
        assert 1e14 < peak["bf16"] < 1e16


def test_rates_are_in_a_sane_order(profile: HardwareProfile):
    device = profile.device
    assert device.memory_bandwidth.base >= device.host_link.base
    assert 0.6 < device.memory_efficiency.base <= 1
    assert 1 <= device.sustained.base < 1.5
    assert 1 <= profile.overlap_slowdown.base <= 1.5
    assert 0 < device.launch.base < 1e-4


def test_the_best_tile_reaches_a_plausible_share_of_the_peak(profile: HardwareProfile):
    gemm = profile.device.gemm
    assert 0.5 < max(gemm.large, gemm.medium, gemm.small) < 1
    assert gemm.latency_s < 2e-5
    assert gemm.tile_overhead_s < 1e-5


def test_tiers_get_slower_from_inside_out(profile: HardwareProfile):
    tiers = profile.network
    assert profile.max_devices is None  # the outermost tier joins any number
    for inner, outer in itertools.pairwise(tiers):
        assert outer.bandwidth.base < inner.bandwidth.base
        assert outer.latency.base > inner.latency.base
    if tiers[0].size is not None:
        assert tiers[0].size % profile.node_size == 0
    for tier in tiers:
        shares = [share for _, share in tier.efficiency.points]
        assert shares == sorted(shares) or profile.device.kind == "cpu"


def test_every_figure_has_a_source_and_no_path_of_a_machine(profile: HardwareProfile):
    found = list(figures(profile))
    assert len(found) >= 18
    for figure in found:
        source = figure.source  # type: ignore[attr-defined]
        assert len(source) >= 5, figure
        assert not re.search(r"(^|\s)/\w", source), figure


def test_datasheet_devices_match_their_vendors():
    h100, h200 = load_hardware("h100-sxm")[0], load_hardware("h200-sxm")[0]
    assert h100.device.peak["bf16"].base == 989e12
    assert h100.device.memory_bandwidth.base == 3.35e12
    assert h200.device.memory_bandwidth.base == 4.8e12
    assert h100.network[1].bandwidth.base == 50e9
    gb200 = load_hardware("gb200-nvl72")[0]
    assert (gb200.node_size, gb200.network[0].size) == (4, 72)


# ---- extends -------------------------------------------------------------------------------------------------------


def test_extends_keeps_the_rest():
    base, small = load_hardware("a100-80gb-sxm")[0], load_hardware("a100-40gb-sxm")[0]
    assert small.extends == "a100-80gb-sxm"
    assert small.device.memory.base < 0.51 * base.device.memory.base
    assert small.device.memory_bandwidth.base == 1.555e12
    kept = set(type(base.device).model_fields) - {"name", "memory", "memory_bandwidth"}
    assert {k: getattr(small.device, k) for k in kept} == {k: getattr(base.device, k) for k in kept}
    assert (small.network, small.node_size) == (base.network, base.node_size)


def test_extends_replaces_a_list_as_a_whole():
    base, efa = load_hardware("h100-sxm")[0], load_hardware("h100-sxm-efa")[0]
    assert efa.device == base.device
    assert [t.name for t in efa.network] == ["nvlink", "efa"]
    assert efa.network[0].bandwidth == base.network[0].bandwidth
    assert efa.network[1].efficiency.points[-1][1] < base.network[1].efficiency.points[-1][1]


def test_extends_twice_and_by_path(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("extends: a100-40gb-sxm\nname: mine\nnode_size: 4\n")
    path = variant(tmp_path, "extends: mine.yaml\nname: ours\ndevice: {name: ours}\n")
    profile, document = load_hardware(str(path))
    base = load_hardware("a100-40gb-sxm")[0]
    assert (profile.name, profile.device.name, profile.node_size) == ("ours", "ours", 4)
    assert profile.device.memory == base.device.memory
    assert document.digest != load_hardware("a100-40gb-sxm")[1].digest  # every file that took part counts


def test_extends_an_unknown_profile(tmp_path: Path):
    problem = problem_of(variant(tmp_path, "name: mine\nextends: h100-sxn\n"))
    assert (problem.code, problem.location.line, problem.location.col) == ("PLN110", 2, 1)
    assert "h100-sxm" in problem.fix


def test_extends_itself(tmp_path: Path):
    problem = problem_of(variant(tmp_path, "name: mine\nextends: variant.yaml\n"))
    assert (problem.code, problem.location.line) == ("PLN109", 2)


def test_an_override_is_checked_too(tmp_path: Path):
    text = "extends: h100-sxm\nname: mine\ndevice:\n  memory: {value: 80 GB/s, provenance: assumed, source: nobody}\n"
    path = variant(tmp_path, text)
    problem = problem_of(path)
    assert (problem.code, problem.location.file, problem.location.line) == ("PLN108", str(path), 4)
    assert "bytes" in problem.what


def test_unknown_key_in_an_override(tmp_path: Path):
    problem = problem_of(variant(tmp_path, "extends: h100-sxm\nname: mine\ndevice:\n  memmory: 3\n"))
    assert (problem.code, problem.location.line, problem.location.col) == ("PLN104", 4, 3)
    assert "'memory'" in problem.fix


# ---- errors --------------------------------------------------------------------------------------------------------


def test_a_missing_figure_is_named(tmp_path: Path):
    path, _ = edited(tmp_path, "  memory_bandwidth:", None)
    problem = problem_of(path)
    assert problem.code == "PLN105"
    assert problem.what.startswith("device.memory_bandwidth")
    assert (problem.location.file, problem.location.line) == (str(path), PROFILE.splitlines().index("device:") + 1)


@pytest.mark.parametrize(
    ("start", "line", "code", "says"),
    [
        (
            "  memory_bandwidth:",
            "  memory_bandwidth: {value: 2 TB, provenance: assumed, source: no}",
            "PLN108",
            "bytes/s",
        ),
        ("  memory:", "  memory: {value: 80, provenance: assumed, source: none}", "PLN108", "needs a unit"),
        ("  memory:", "  memory: {value: -80 GiB, provenance: assumed, source: none}", "PLN108", "positive"),
        ("  sustained:", "  sustained: {value: 1 s, provenance: assumed, source: none}", "PLN108", "plain number"),
        ("  launch:", "  launch: {value: soon, provenance: assumed, source: none}", "PLN108", "number with a unit"),
        ("  compute_units:", "  compute_units: -1", "PLN107", "-1"),
        ("  compute_units:", "  compute_units: 108.0", "PLN106", "wrong type"),
        ("  kind:", "  kind: cudda", "PLN106", "cudda"),
        ("node_size:", "nodesize: 8", "PLN104", "nodesize"),
    ],
)
def test_a_wrong_figure_names_file_line_and_column(tmp_path: Path, start: str, line: str, code: str, says: str):
    path, number = edited(tmp_path, start, line)
    with pytest.raises(InputError) as caught:
        load_hardware(str(path))
    problem = next(p for p in caught.value.problems if p.code == code)
    assert says in problem.what + problem.why
    assert (problem.location.file, problem.location.line) == (str(path), number)
    assert problem.location.col == 1 + len(line) - len(line.lstrip())
    assert str(caught.value).startswith(f"{path}:")


def test_a_figure_without_a_source_is_refused(tmp_path: Path):
    path, number = edited(tmp_path, "  memory:", "  memory: {value: 80 GiB, provenance: measured}")
    problem = problem_of(path)
    assert (problem.code, problem.location.line) == ("PLN105", number)
    assert "source" in problem.fix


def test_provenance_is_one_of_four(tmp_path: Path):
    path, number = edited(tmp_path, "  memory:", "  memory: {value: 80 GiB, provenance: measure, source: me}")
    problem = problem_of(path)
    assert (problem.code, problem.location.line) == ("PLN106", number)
    assert "measured" in problem.fix


def test_tier_sizes_must_grow(tmp_path: Path):
    tiers = PROFILE[PROFILE.index("network:") : PROFILE.index("overlap_slowdown:")]
    small = tiers.replace("  - name: infiniband\n", "  - name: infiniband\n    size: 12\n")
    path = variant(tmp_path, PROFILE.replace(tiers, small))
    problem = problem_of(path)
    assert problem.code == "PLN108"
    assert "[8, 12]" in problem.what


def test_curve_sizes_must_ascend(tmp_path: Path):
    start = "      points: [[262144, 0.02]"
    at = next(i for i, text in enumerate(PROFILE.splitlines()) if text.startswith(start))
    path = variant(tmp_path, PROFILE.replace("[262144, 0.02]", "[99999999999, 0.02]"))
    problem = problem_of(path)
    assert problem.code == "PLN108"
    assert "ascend" in problem.what
    assert at - 3 <= problem.location.line - 1 <= at


def test_duplicate_key(tmp_path: Path):
    problem = problem_of(variant(tmp_path, PROFILE + "node_size: 4\n"))
    assert (problem.code, problem.location.line) == ("PLN102", len(PROFILE.splitlines()) + 1)


def test_unknown_profile_suggests_shipped_ones():
    with pytest.raises(InputError) as caught:
        load_hardware("h100_sxm")
    assert "h100-sxm" in caught.value.problems[0].fix
