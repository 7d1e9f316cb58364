"""Small rules of layouts and units, over all inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import figure, llama, profile, profile_data, task

from planner import units
from planner.errors import InputError
from planner.specs.hardware import HardwareProfile
from planner.specs.layout import chunk_layers, even_stages, format_recompute, parse_recompute

COUNTS = st.integers(1, 200).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda a: st.tuples(st.just(n), st.just(a), st.integers(0, n - a)))
)


@given(COUNTS)
def test_recompute_text_round_trips(counts):
    layers, selective, full = counts
    assert parse_recompute(format_recompute(layers, selective, full), layers) == (selective, full)


@given(st.text(max_size=12), st.integers(1, 9))
def test_recompute_text_is_valid_or_refused(text, layers):
    try:
        selective, full = parse_recompute(text, layers)
    except ValueError:
        return
    assert 0 <= selective + full <= layers


@given(st.integers(1, 300), st.integers(1, 40))
def test_layers_are_spread_and_none_is_lost(layers, parts):
    if layers >= parts:
        held = [s.layers for s in even_stages(layers, parts)]
        assert sum(held) == layers
        assert max(held) - min(held) <= 1
        assert held[-1] == min(held)
        chunks = chunk_layers(layers, parts)
        assert sum(chunks) == layers
        assert chunks == sorted(chunks, reverse=True)
        assert max(chunks) - min(chunks) <= 1


@given(st.floats(1e-3, 1e6), st.sampled_from(["B", "KiB", "GiB", "GB", "TB"]))
def test_sizes_parse_in_their_unit(value, unit):
    factor = {"B": 1, "KiB": 2**10, "GiB": 2**30, "GB": 1e9, "TB": 1e12}[unit]
    assert units.parse(f"{value!r} {unit}", "bytes") == pytest.approx(value * factor)
    with pytest.raises(ValueError, match="needs a unit"):
        units.parse(f"{value!r} {unit}", "seconds")


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0000123, "12.3 µs"), (0.0456, "45.6 ms"), (12.34, "12.3 s"), (7260, "2 h 1 min"), (1234.5, "1,230 s"),
])  # fmt: skip
def test_durations_read_well(seconds, text):
    assert units.seconds(seconds) == text


def test_a_profile_without_the_precision_is_named():
    data = profile_data(peak={"bf16": figure("989 TFLOP/s")})
    t = task(llama(), hardware=HardwareProfile.model_validate(data), precision="fp32")
    with pytest.raises(InputError, match="PLN120 profile test-machine has no peak rate for fp32"):
        t.peak  # noqa: B018
    assert task(llama(), hardware=profile()).peak == 989e12
