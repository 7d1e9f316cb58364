"""Profiles of the clusters behind published runs: node bandwidths, narrow peaks and measured curves by nodes."""

from __future__ import annotations

import itertools

import pytest

from planner.specs.files import load_hardware, shipped

NODE_GBIT = {
    "a100-80gb-hdr4": 800,
    "a100-80gb-jean-zay": 400,
    "a100-80gb-efa": 400,
    "a100-40gb-efa": 400,
    "h100-sxm-efa": 3200,
    "h100-96gb-grand-teton": 3200,
    "h800-sxm": 3200,
    "h200-sxm-node4": 1600,
    "b300-sxm": 6400,
    "gb300-nvl72": 3200,
    "mi325x": 3200,
    "mi350x": 3200,
    "mi355x": 3200,
}
"""Line rate of a host's adapters together."""


@pytest.mark.parametrize("name", NODE_GBIT)
def test_a_node_has_the_adapters_of_its_cluster(name: str):
    profile = load_hardware(name)[0]
    outer = profile.network[-1]
    assert outer.bandwidth.base * profile.node_size == pytest.approx(NODE_GBIT[name] * 1e9 / 8)
    assert outer.size is None


def test_narrow_peaks_are_multiples_of_bf16():
    for name in shipped("hardware_profiles"):
        peak = {kind: figure.base for kind, figure in load_hardware(name)[0].device.peak.items()}
        if "fp8" in peak:
            assert peak["fp8"] / peak["bf16"] == pytest.approx(2, rel=0.02), name
        if "fp4" in peak:
            assert 3.9 < peak["fp4"] / peak["bf16"] < 6.1, name


def test_bandwidth_by_nodes_falls_and_stays_below_the_line_rate():
    profile = load_hardware("h100-sxm-efa")[0]
    curve = profile.network[1].by_domains
    assert curve is not None
    assert [p[0] for p in curve.points] == [1, 2, 4, 8, 16, 32, 64]
    assert all(a[1] > b[1] for a, b in itertools.pairwise(curve.points))
    assert all(bus < profile.node_size * profile.network[1].bandwidth.base for nodes, bus in curve.points if nodes > 1)


def test_variants_change_only_what_they_say():
    h100, teton, h800 = (load_hardware(n)[0] for n in ("h100-sxm", "h100-96gb-grand-teton", "h800-sxm"))
    assert teton.device.gemm == h800.device.gemm == h100.device.gemm
    assert teton.device.sustained.base > h100.device.sustained.base
    assert h800.network[0].bandwidth.base < h100.network[0].bandwidth.base / 2
    assert load_hardware("h200-sxm-node4")[0].device == load_hardware("h200-sxm")[0].device
