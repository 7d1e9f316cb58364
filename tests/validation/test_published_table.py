"""The table of published runs is well formed, cited, and agrees with itself and with the formulas its sources print."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("published.csv")


def names(text: str) -> list[str]:
    return text.split()


COLUMNS = names("""
    row_id source source_locator row_kind quality timing_origin hardware gpus gpus_per_node interconnect framework
    framework_version model_name params_b layers hidden ffn_hidden heads kv_heads head_dim vocab gated_mlp tied_embeddings
    experts topk moe_ffn seq_len tp sp pp vpp cp ep etp dp dp_shard micro_batch global_batch recompute precision attention
    compile iteration_time_s tokens_per_s_per_gpu tflops_per_gpu flops_convention mfu hfu peak_memory_gib memory_kind notes
    hw_class precision_class shard_stage
""")

REQUIRED = names("""
    row_id source source_locator row_kind quality hardware gpus gpus_per_node framework model_name layers hidden heads kv_heads
    vocab gated_mlp tied_embeddings seq_len tp pp cp ep dp dp_shard global_batch recompute precision attention notes hw_class
    precision_class
""")

NUMBERS = names("""
    gpus gpus_per_node params_b layers hidden ffn_hidden heads kv_heads head_dim vocab experts topk moe_ffn seq_len tp pp vpp cp
    ep etp dp micro_batch global_batch iteration_time_s tokens_per_s_per_gpu tflops_per_gpu mfu hfu peak_memory_gib
""")

WORDS = {
    "row_kind": {"e2e", "proxy_model", "failed_oom"},
    "quality": {"A", "B", "C", "F"},
    "recompute": {"none", "selective", "full", "unknown"},
    "attention": {"flash", "unfused", "unknown"},
    "precision_class": {"bf16", "fp16", "16bit", "fp8", "mxfp8"},
    "timing_origin": {
        "iteration_time",
        "tokens_per_s",
        "derived_from_tflops",
        "block_time_or_throughput",
        "utilisation_only",
        "",
    },
    "gated_mlp": {"0", "1"},
    "tied_embeddings": {"0", "1"},
    "sp": {"0", "1", ""},
    "compile": {"0", "1", ""},
    "shard_stage": {"0", "1", "2", "3", ""},
}

Row = dict[str, str]


def read() -> list[Row]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


ROWS = read()
EACH = pytest.mark.parametrize("row", ROWS, ids=[row["row_id"] for row in ROWS])


def whole(row: Row, *columns: str) -> list[int]:
    return [int(row[column]) for column in columns]


def test_columns_are_those_of_a_log_for_validate() -> None:
    with TABLE.open(newline="", encoding="utf-8") as file:
        records = list(csv.reader(file, strict=True))
    assert records[0] == COLUMNS
    assert {len(record) for record in records} == {len(COLUMNS)}


def test_row_ids_are_unique() -> None:
    assert len({row["row_id"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("count", "belongs"),
    [
        pytest.param(60, lambda row: row["iteration_time_s"], id="step time"),
        pytest.param(15, lambda row: row["peak_memory_gib"], id="memory"),
        pytest.param(6, lambda row: row["row_kind"] == "failed_oom", id="out of memory"),
        pytest.param(8, lambda row: row["experts"] and row["iteration_time_s"], id="mixture of experts"),
    ],
)
def test_enough_rows_of_every_kind(count: int, belongs: Callable[[Row], object]) -> None:
    assert sum(bool(belongs(row)) for row in ROWS) >= count


@EACH
def test_row_states_its_run_and_cites_it(row: Row) -> None:
    assert [column for column in REQUIRED if not row[column].strip()] == []
    # A paper's number, or a repository and a path.
    assert re.search(r"arXiv \d{4}\.\d{5}|[\w.-]+/[\w.-]+ ", row["source_locator"])
    assert re.fullmatch(r"P\d{3}", row["row_id"])


@EACH
def test_values_are_of_their_columns(row: Row) -> None:
    assert {column: row[column] for column, words in WORDS.items() if row[column] not in words} == {}
    for column in NUMBERS:
        if row[column]:
            assert math.isfinite(float(row[column]))
            assert float(row[column]) > 0, column


@EACH
def test_layout_fills_the_gpus_and_the_batch(row: Row) -> None:
    gpus, per_node, tp, pp, cp, dp, ep = whole(row, "gpus", "gpus_per_node", "tp", "pp", "cp", "dp", "ep")
    heads, kv_heads, batch = whole(row, "heads", "kv_heads", "global_batch")
    assert tp * pp * cp * dp == gpus
    assert gpus % per_node == 0
    assert batch % (dp * int(row["micro_batch"] or 1)) == 0
    assert heads % tp == 0
    assert heads % kv_heads == 0
    assert (gpus // pp) % ep == 0
    assert int(row["layers"]) >= pp * int(row["vpp"] or 1)
    if row["sp"] == "1":
        assert tp > 1


@EACH
def test_mixture_of_experts_is_whole_or_absent(row: Row) -> None:
    stated = [bool(row[column]) for column in ("experts", "topk", "moe_ffn")]
    assert all(stated) or not any(stated)
    if all(stated):
        experts, topk, ep = whole(row, "experts", "topk", "ep")
        assert topk < experts
        assert experts % ep == 0
    else:
        assert row["ep"] == "1"


@EACH
def test_outcome_and_figures_agree(row: Row) -> None:
    times = [row[column] for column in ("iteration_time_s", "tokens_per_s_per_gpu")]
    if row["row_kind"] == "failed_oom":
        assert row["quality"] == "F"
        assert not any([*times, row["timing_origin"], row["peak_memory_gib"], row["mfu"], row["tflops_per_gpu"]])
    elif row["timing_origin"] == "utilisation_only":
        assert not any(times)
        assert row["tflops_per_gpu"]
    else:
        assert all(times)
        assert row["quality"] in {"A", "B"}
    assert bool(row["peak_memory_gib"]) == bool(row["memory_kind"])
    if "verified=memory" in row["notes"]:
        assert row["quality"] in {"B", "C"}


@EACH
def test_throughput_follows_from_the_step_time(row: Row) -> None:
    if row["iteration_time_s"]:
        batch, seq, gpus = whole(row, "global_batch", "seq_len", "gpus")
        tokens = batch * seq / (float(row["iteration_time_s"]) * gpus)
        assert tokens == pytest.approx(float(row["tokens_per_s_per_gpu"]), rel=0.02)


@EACH
def test_printed_utilisation_follows_from_the_step_time(row: Row) -> None:
    """Where the source prints its formula, the figure it printed comes out of the time in the table."""
    if not row["iteration_time_s"]:
        return
    seq, layers, hidden, vocab = whole(row, "seq_len", "layers", "hidden", "vocab")
    rate = float(row["tokens_per_s_per_gpu"]) / 1e12
    per_layer = 1 + seq / (6 * hidden)
    convention = row["flops_convention"]
    if convention.startswith("hardware: F=96*B*s*L*h^2"):
        achieved = rate * 96 * layers * hidden**2 * (per_layer + vocab / (16 * layers * hidden))
        assert achieved == pytest.approx(float(row["tflops_per_gpu"]), rel=0.02)
    elif convention.startswith("model: 72*B*L*s*h^2") and row["mfu"]:
        achieved = rate * 72 * layers * hidden**2 * (per_layer + vocab / (12 * layers * hidden))
        assert 100 * achieved / 312 == pytest.approx(float(row["mfu"]), abs=0.3)
    elif convention.startswith("model: 6*N") and row["mfu"] and row["params_b"]:
        peak = {"A100-80": 312, "A100-40": 312, "H100-80": 989}.get(row["hw_class"])
        if peak:
            achieved = rate * (6e9 * float(row["params_b"]) + 12 * layers * hidden * seq)
            assert 100 * achieved / peak == pytest.approx(float(row["mfu"]), rel=0.03)
