"""Rows of a table as models, jobs and layouts; what cannot be predicted says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.engines.registry import accounting_named
from planner.errors import InputError
from planner.validation import predict, profilemap
from planner.validation.rows import Unusable, model_of, run_of
from tests.validation.runs import row, rows_of_layouts, write

MEGATRON = accounting_named("megatron")


def text(**changes: Any) -> dict[str, str]:
    return {k: "" if v is None else str(v) for k, v in row(**changes).items()}


def test_a_dense_row() -> None:
    run = run_of(text(), MEGATRON)
    assert run.model.total_params == 8_030_261_248
    assert (run.layout.tp, run.layout.dp, run.layout.zero, run.layout.sequence_parallel) == (2, 8, 1, True)
    assert (run.gpus, run.microbatches) == (16, 8)


@pytest.mark.parametrize(
    ("name", "columns", "total", "active"),
    [
        # parameters as published: DeepSeek-V3 671 B of which 37 B active, Mixtral 46.7 / 12.9, Qwen3 235 / 22 and 30.5 / 3.3
        (
            "DeepSeek-V3",
            {"layers": 61, "hidden": 7168, "ffn_hidden": 18432, "heads": 128, "kv_heads": 128, "vocab": 129280,
             "experts": 256, "topk": 8, "moe_ffn": 2048, "tp": 1, "sp": 0},
            671.0, 37.5,
        ),
        (
            "Mixtral-8x7B",
            {"hidden": 4096, "ffn_hidden": None, "vocab": 32000, "experts": 8, "topk": 2, "moe_ffn": 14336},
            46.7, 12.9,
        ),
        (
            "Qwen3 235B-A22B",
            {"layers": 94, "hidden": 4096, "ffn_hidden": 12288, "heads": 64, "kv_heads": 4, "head_dim": 128,
             "vocab": 151936, "experts": 128, "topk": 8, "moe_ffn": 1536},
            235.1, 22.1,
        ),
        (
            "Llama 4 Maverick 400B-A17B",
            {"layers": 48, "hidden": 5120, "ffn_hidden": 16384, "heads": 40, "kv_heads": 8, "head_dim": 128,
             "vocab": 202048, "experts": 128, "topk": 1, "moe_ffn": 8192},
            400.7, 17.2,
        ),
    ],
)  # fmt: skip
def test_mixtures_of_experts(name: str, columns: dict[str, Any], total: float, active: float) -> None:
    model = model_of(text(model_name=name, **columns))
    assert model.total_params / 1e9 == pytest.approx(total, rel=0.003)
    weights = sum(n * model.active_params_of(g) for g, n in model.kinds) + 2 * model.embedding_params
    assert weights / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"micro_batch": None}, "micro_batch not stated"),
        ({"global_batch": None}, "global_batch not stated"),
        ({"layers": "many"}, "layers is no number"),
        ({"tp": 0}, "tp is not a positive whole number"),
        ({"dp": 3}, "tp x pp x cp x dp is not gpus"),
        ({"gpus": 15}, "gpus is not a multiple of tp x pp x cp"),
        ({"gpus": None, "dp": None}, "neither gpus nor dp stated"),
        ({"pp": 64, "gpus": 1024}, "more stages than layers"),
        ({"model_name": "Llama LoRA"}, "adapter training (LoRA)"),
        ({"model_name": "Qwen3-Next 80B"}, "not modelled: linear-attention or state-space layers"),
        ({"layers": 100_000_000}, "layers exceeds 10,000"),
        ({"seq_len": 2_000_000_000}, "seq_len exceeds 134,217,728"),
        ({"ep": 8}, "ep without experts"),
        ({"heads": 31, "kv_heads": 8}, "inconsistent: heads 31 is not divisible by kv_heads 8"),
        ({"iteration_time_s": "nan", "seq_len": None}, "seq_len not stated"),
    ],
)
def test_unusable_rows_say_why(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason.replace("(", r"\(").replace(")", r"\)")):
        run_of(text(**changes), MEGATRON)


@pytest.mark.parametrize(
    "changes",
    [
        {"iteration_time_s": -1}, {"iteration_time_s": 1e-320}, {"peak_memory_gib": -3},
        {"iteration_time_s": None, "tokens_per_s_per_gpu": -5}, {"iteration_time_s": None, "tokens_per_s_per_gpu": 1e-320},
    ],
)  # fmt: skip
def test_measured_figures_outside_a_sane_range_are_skipped(tmp_path: Path, changes: dict[str, Any]) -> None:
    columns = {"peak_memory_gib": None, "tokens_per_s_per_gpu": None}
    predicted = predict.predict_file(write(tmp_path / "runs.csv", [row(**columns), row(**columns | changes)]))
    assert len(predicted.rows) == 1
    assert "is not between" in next(iter(predicted.skipped))


@pytest.mark.parametrize(
    ("text", "what"),
    [("a;b;c\n1;2;3\n", "separated by semicolons"), ('"' + "x" * 200_000 + '"\n', "PLN141"), ("", "it is empty")],
)
def test_broken_tables_are_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="(?s).*" + what):
        predict.predict_file(str(path))


def test_names_beyond_ascii_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "runs.csv", [row(model_name="Llama \u2013 8B")]))
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert predict.predict_file(str(path)).rows[0].model == "Llama ? 8B"


def test_stages_by_cost_match_published_splits() -> None:
    """nanotron's splits of 16 layers of width 2048 with a 131k vocabulary."""
    accounting = accounting_named("nanotron")
    shape = {"layers": 16, "hidden": 2048, "ffn_hidden": 8192, "kv_heads": 32, "vocab": 131072, "tp": 1, "sp": 0}
    for pp, layers in ((2, [11, 5]), (4, [6, 5, 5, 0]), (8, [3, 3, 2, 3, 2, 3, 0, 0])):
        run = run_of(text(model_name="nanotron 1B", **shape, pp=pp, dp=16 // pp), accounting)
        assert [s.layers for s in run.layout.stages] == layers


def test_vocabularies_that_tp_does_not_divide_were_padded() -> None:
    """Megatron pads to 128 tp; what one rank holds whole is as stated."""
    accounting = accounting_named("megatron")
    found = [run_of(text(vocab=50257, gpus=8, tp=tp, pp=1, dp=8 // tp, sp=0), accounting).model.vocab for tp in (1, 2, 4)]
    assert found == [50257, 50432, 50688]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    table = write(tmp_path / "runs.csv", [{"model_name": "x", "gpus": 8}])
    with pytest.raises(InputError) as caught:
        predict.predict_file(table)
    assert caught.value.problems[0].code == "PLN141"
    assert "seq_len" in caught.value.problems[0].what


def test_a_prediction_is_the_estimate(tmp_path: Path) -> None:
    """The table's batches and `planner estimate` are one cost model."""
    import planner

    predicted = predict.predict_file(write(tmp_path / "runs.csv", rows_of_layouts()))
    assert len(predicted.rows) == 10
    layout = {"tp": 2, "pp": 4, "dp": 2, "virtual_stages": 2, "schedule": "interleaved", "recompute": "full", "zero": 1}
    made = planner.estimate(
        "llama3-8b", "h100-sxm", layout={**layout, "sequence_parallel": True}, seq_len=8192, global_batch=64, gpus=16,
        engine="megatron",
    )  # fmt: skip
    assert predicted.rows[-1].predicted_time == pytest.approx(made.estimate.step_time_s, rel=1e-9)
    assert predicted.rows[-1].predicted_memory == pytest.approx(made.estimate.memory.peak_allocated_gib, rel=1e-9)
    assert sum(predicted.rows[3].terms.values()) == pytest.approx(predicted.rows[3].predicted_time, rel=1e-9)


def test_mixed_layers_cost_the_sum_of_their_kinds(tmp_path: Path) -> None:
    """A model of dense and routed layers lies between the two pure ones, in time and in memory."""
    moe = {"experts": 8, "topk": 2, "moe_ffn": 4096, "ffn_hidden": 14336, "dp": 16, "tp": 1, "sp": 0, "ep": 8}
    names = ("Llama 3 8B", "Llama 4 Maverick", "Mixtral")
    rows = [row(row_id="0", tp=1, sp=0, dp=16, ep=1, experts=None, topk=None, moe_ffn=None)]
    rows += [row(row_id=str(i), model_name=name, **moe) for i, name in enumerate(names[1:], 1)]
    dense, mixed, routed = predict.predict_file(write(tmp_path / "runs.csv", rows)).rows
    low, high = sorted((dense.predicted_time, routed.predicted_time))
    assert low < mixed.predicted_time < high * 1.25  # the mixed one has a shared expert besides


def test_failed_rows_are_labels(tmp_path: Path) -> None:
    rows = [row(), row(row_id="2", row_kind="failed_oom", quality="F", iteration_time_s=None)]
    rows += [row(row_id="3", row_kind="failed_oom_or_crash", quality="F", iteration_time_s=None)]
    predicted = predict.predict_file(write(tmp_path / "runs.csv", rows), None, frozenset("AB"))
    assert [r.outcome for r in predicted.rows] == ["ran", "oom", "failed"]


def test_tokens_a_second_stand_for_a_step_time(tmp_path: Path) -> None:
    rows = [row(iteration_time_s=None, tokens_per_s_per_gpu=8192.0)]
    predicted = predict.predict_file(write(tmp_path / "runs.csv", rows))
    assert predicted.rows[0].measured_time == pytest.approx(64 * 8192 / 8192 / 16)


def test_every_engine_and_profile_of_the_shipped_map_exists() -> None:
    rules = profilemap.load_map(None)
    from planner.specs import files

    for rule in rules.profiles:
        assert files.load_hardware(rule.profile)[0].name == rule.profile
    for engine in rules.engines:
        assert accounting_named(engine.engine).name == engine.engine


def test_a_users_map_goes_first(tmp_path: Path) -> None:
    own = tmp_path / "map.yaml"
    own.write_text(
        "profiles:\n  - {when: {hw_class: H100}, profile: h200-sxm}\n"
        "engines:\n  - {when: {}, engine: torchtitan}\n"
        'traits:\n  - {when: {tp: ">1"}, add: async-tp}\n'
        'exclude:\n  - {when: {tp: "==2"}, metric: time, why: mine}\n',
        encoding="utf-8",
    )
    rows = [row(shard_stage=3), row(row_id="2", shard_stage=3, tp=1, sp=0, dp=16)]
    table = write(tmp_path / "runs.csv", rows)
    first, second = predict.predict_file(table, str(own)).rows
    assert (first.profile, first.engine, first.excluded) == ("h200-sxm", "torchtitan+async-tp", "mine")
    assert (second.engine, second.excluded) == ("torchtitan", "")


def test_blank_columns_take_their_frameworks_defaults(tmp_path: Path) -> None:
    """expert_tensor_parallel_size of Megatron-Core follows tp where a recipe does not set it."""
    own = tmp_path / "map.yaml"
    own.write_text('blanks:\n  - {when: {framework: "megatron"}, column: etp, as: tp}\n', encoding="utf-8")
    rules = profilemap.load_map(str(own))
    blank = {"framework": "Megatron-LM", "tp": "4", "etp": ""}
    assert rules.completed(blank)["etp"] == "4"
    assert rules.completed(blank | {"etp": "1"})["etp"] == "1"
    assert rules.completed(blank | {"framework": "nanotron"})["etp"] == ""


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("engines:\n  - {when: {}, engine: megatrn}\n", "no engine called 'megatrn'"),
        ("traits:\n  - {when: {}, add: fast}\n", "no engine trait called 'fast'"),
        ("profiles:\n  - {when: {source: '('}, profile: h100-sxm}\n", "no regular expression"),
        ("profiles: []\n", "holds no rules"),
        ("profils: []\n", "profils"),
    ],
)
def test_bad_maps_are_refused(tmp_path: Path, body: str, what: str) -> None:
    own = tmp_path / "map.yaml"
    own.write_text(body, encoding="utf-8")
    with pytest.raises(InputError, match="(?s).*" + what):
        profilemap.load_map(str(own))
