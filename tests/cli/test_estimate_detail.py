"""`planner estimate --detail`: the lines of each table add up to the estimate, and say where they come from."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from command import one_line_error, planner
from machines import llama, profile
from ruamel.yaml import YAML

import planner as package
from planner.cost import step
from planner.cost.blending import Stack
from planner.cost.primitives import price
from planner.cost.task import LayoutArray, StageArray, Task
from planner.engines.registry import engine_named
from planner.planning.detail import Detail, detail_of
from planner.specs.job import Job
from planner.specs.layout import Layout
from planner.specs.model import Model
from planner.specs.policy import Policy
from planner.units import GIB

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp": ("bundled", {"dp": 8}),
    "zero3": ("bundled", {"dp": 8, "zero": 3}),
    "tp, sp": ("bundled", {"tp": 4, "dp": 2, "zero": 1, "sequence_parallel": True}),
    "1f1b": ("bundled", {"pp": 4, "dp": 2, "schedule": "1f1b"}),
    "gpipe": ("bundled", {"pp": 4, "dp": 2, "schedule": "gpipe"}),
    "interleaved": ("bundled", {"pp": 4, "dp": 2, "schedule": "interleaved", "virtual_stages": 2, "zero": 2}),
    "interleaved-zb": ("bundled", {"pp": 4, "dp": 2, "schedule": "interleaved-zb", "virtual_stages": 2, "zero": 2}),
    "zbv": ("bundled", {"pp": 4, "dp": 2, "schedule": "zbv", "virtual_stages": 2, "zero": 1}),
    "dualpipev": ("torchtitan+eager", {"pp": 4, "dp": 2, "schedule": "dualpipev", "virtual_stages": 2, "zero": 2}),
    "one round": ("bundled", {"pp": 2, "dp": 4, "micro_batch": 8, "layers": [5, 3]}),
    "one round, uneven chunks": (
        "bundled",
        {"pp": 2, "dp": 4, "micro_batch": 8, "schedule": "interleaved", "virtual_stages": 3, "layers": [3, 5]},
    ),
    "rounds, uneven chunks": (
        "bundled",
        {"pp": 2, "dp": 4, "schedule": "interleaved", "virtual_stages": 3, "layers": [3, 5], "zero": 2},
    ),
    "full": ("bundled", {"tp": 2, "dp": 4, "zero": 3, "sequence_parallel": True, "recompute": "full"}),
    "mixed recompute": ("bundled", {"pp": 2, "dp": 4, "zero": 3, "recompute": "full:1,selective:2"}),
    "megatron dp": ("megatron", {"dp": 8, "zero": 1}),
    "megatron tp": ("megatron", {"tp": 2, "dp": 4, "zero": 1, "sequence_parallel": False}),
    "megatron cp": ("megatron", {"cp": 4, "dp": 2, "zero": 1}),
    "megatron tp pp cp": ("megatron", {"tp": 2, "pp": 2, "cp": 2, "schedule": "1f1b", "recompute": "selective"}),
    "megatron interleaved": ("megatron", {"pp": 4, "dp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "megatron full": ("megatron", {"tp": 2, "pp": 2, "dp": 2, "recompute": "full"}),
    "lora dp": ("deepspeed", {"dp": 8, "zero": 2, "recompute": "selective:3"}),
    "lora zero3": ("deepspeed", {"dp": 8, "zero": 3}),
    "lora zero3 nf4": ("deepspeed", {"dp": 8, "zero": 3, "recompute": "full"}),
    "lora tp pp": ("megatron", {"tp": 2, "pp": 2, "dp": 2, "zero": 1, "sequence_parallel": True}),
    "two nodes, traits": ("megatron+2021", {"tp": 8, "dp": 2, "zero": 1, "sequence_parallel": False}),
}

NOT_YET = "gradients that no backward has made yet"
"""The line that takes off what the lines of gradients before it hold."""


@cache
def _made(name: str) -> tuple[Any, Detail]:
    engine, layout = LAYOUTS[name]
    gpus = 16 if "two nodes" in name else 8
    adapter = {"rank": 16, "base": "nf4" if "nf4" in name else "same"} if "lora" in name else None
    job = {"seq_len": 2048, "global_batch": 64, "engine": engine, "adapter": adapter}
    plan = package.estimate(llama(), profile(), layout=layout, gpus=gpus, **job)
    return plan, detail_of(plan, engine=engine)


def _by_part(detail: Detail) -> dict[str, float]:
    parts: dict[str, float] = {}
    for term in detail.time or ():
        parts[term.part] = parts.get(term.part, 0.0) + term.total
    return parts


@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_add_up_to_the_step_time(name):
    plan, detail = _made(name)
    seconds, parts = plan.estimate.step_time_s, _by_part(detail)
    assert sum(t.total for t in detail.time) == pytest.approx(seconds, rel=1e-6)
    assert abs(parts["rounding"]) < 1e-5 * seconds
    for part in ("compute", "recompute", "tp_comm", "cp_comm", "zero_comm", "pp_comm", "bubble", "dp_comm", "optimizer"):
        assert parts.get(part, 0.0) == pytest.approx(getattr(plan.estimate.breakdown, part), abs=1e-6 * seconds), part


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_add_up_to_what_is_allocated(name):
    plan, detail = _made(name)
    ranks = [r for r in detail.memory for _ in range(_count(r.ranks))]
    assert len(ranks) == plan.layout.pp
    for rank, stage in zip(ranks, plan.estimate.memory.stages, strict=True):
        lines = {p.name: p.n_bytes for p in rank.parts}
        assert sum(p.n_bytes for p in rank.parts) == pytest.approx(rank.allocated, rel=1e-9)
        assert abs(lines.get("rounding", 0.0)) < 1000
        assert all(n >= 0 for k, n in lines.items() if k not in ("rounding", NOT_YET))
        assert rank.allocated == pytest.approx(stage.allocated * GIB, abs=2)
        assert rank.total == pytest.approx(stage.total * GIB, abs=2)
        assert rank.headroom == pytest.approx(stage.headroom * GIB, abs=4)
        for part in ("params", "optimizer"):
            found = sum(p.n_bytes for p in rank.parts if p.part == part)
            assert found == pytest.approx(getattr(stage, part) * GIB, rel=1e-6)
        assert "backward" in rank.cause


def _count(ranks: str) -> int:
    first, _, last = ranks.partition("-")
    return int(last or first) - int(first) + 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_are_those_of_the_step(name):
    plan, detail = _made(name)
    parts, layout = _by_part(detail), plan.layout
    for part in {c.part for c in detail.comm}:
        assert sum(c.exposed for c in detail.comm if c.part == part) == pytest.approx(parts[part], rel=1e-9)
    overlap = engine_named(plan.engine if "two nodes" not in name else LAYOUTS[name][0]).accounting.tp_overlap
    for c in detail.comm:
        assert c.busy == pytest.approx(c.calls * c.seconds_per_call)
        assert c.tiers
        if c.part == "tp_comm" and not c.where.startswith("head"):
            assert c.exposed == pytest.approx((1 - overlap) * c.busy), c.where  # the bytes are those that were priced
    groups = {c.group for c in detail.comm}
    shared = layout.dp * layout.cp
    expected = {"tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "dp x cp": shared}
    assert groups == {k for k, n in expected.items() if n > 1}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_figure_that_a_line_names_has_its_source(name):
    _, detail = _made(name)
    known = {f.name: f for f in detail.source}
    lines = [*detail.time, *detail.comm, *(p for r in detail.memory for p in (*r.parts, *r.outside))]
    assert {n for line in lines for n in line.figures} == set(known)
    assert all(f.source for f in known.values())
    for line in detail.time:
        if line.least_certain:
            assert known[line.least_certain].provenance == line.provenance
        assert line.formula
        assert line.part in ("rounding",) or line.figures, line.name


def test_a_product_has_its_shape():
    _, detail = _made("megatron tp")
    qkv = next(t for t in detail.time if t.name == "query, key, value: forward")
    assert [qkv.inputs[k] for k in ("M", "N", "K", "count")] == [2048, 1024, 1024, 1]
    assert qkv.times == 8 * 16
    assert qkv.bound in ("device", "host")
    assert "gemm_seconds" in qkv.formula


def test_traits_are_the_origin_of_what_they_change():
    _, detail = _made("two nodes, traits")
    found = {f.name: f for f in detail.source}
    assert found["engine.loss_traffic"].source.startswith("trait 2021")
    assert detail.growth > 1
    assert "constant.scale" in found


MIXED = {
    "name": "mixed", "hidden": 1024, "vocab": 32000,
    "layers": [
        {"count": 2, "attention": {"heads": 16}, "mlp": {"kind": "gated", "width": 2816}},
        {"count": 6, "attention": {"heads": 16},
         "mlp": {"kind": "gated", "width": 1408, "experts": 16, "top_k": 4, "shared_width": 1408}},
        {"count": 4, "attention": {"heads": 16, "sliding_window": 512},
         "mlp": {"kind": "gated", "width": 1408, "experts": 16, "top_k": 4}},
    ],
}  # fmt: skip
MIXED_LAYOUTS = [
    ("megatron+bf16-grads", {"tp": 2, "pp": 2, "dp": 4, "ep": 4, "zero": 1, "schedule": "1f1b", "sequence_parallel": True,
                             "stages": [{"layers": 7, "recompute": "full:2"}, {"layers": 5}]}),
    ("bundled", {"dp": 16, "zero": 3, "stages": [{"layers": 12, "recompute": "selective"}]}),
    ("megatron+deep-ep", {"cp": 2, "pp": 4, "dp": 2, "ep": 2, "zero": 1, "schedule": "interleaved", "virtual_stages": 3,
                          "stages": [{"layers": 3}] * 4}),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "degrees"), MIXED_LAYOUTS)
def test_mixed_layers_add_up_by_kind(engine, degrees):
    model, job, hardware = Model.model_validate(MIXED), Job(seq_len=2048, global_batch=64), profile()
    layout = Layout.model_validate(degrees)
    task = Task(model, job, hardware, layout.world_size, engine_named(engine).accounting)
    x, stages = LayoutArray.of([layout], job), StageArray.of([layout])
    kinds = [price(task.only(k), x) for k in range(3)]
    blended = step.blended_ranks(task, Stack.of([p.take(stages.row) for p in kinds]), [layout], x.microbatches)
    cost = step.step_cost(kinds[0], x, stages, blended)
    allocated = step.stage_cost(kinds[0], x, stages, blended).allocated
    seconds = float(cost.step[0]) / 1e9
    estimate = SimpleNamespace(step_time_s=seconds, memory=SimpleNamespace(limit_gib=72.0))
    plan: Any = SimpleNamespace(
        model=model, job=job, hardware=hardware, profiles=(hardware,),
        cluster=SimpleNamespace(gpus=layout.world_size, types=()), engine=engine,
        policy=Policy(), layout=layout, estimate=estimate,
    )  # fmt: skip
    detail = detail_of(plan)
    assert sum(t.total for t in detail.time) == pytest.approx(seconds, rel=1e-6)
    assert abs(_by_part(detail)["rounding"]) < 1e-5 * seconds
    ranks = [r for r in detail.memory for _ in range(_count(r.ranks))]
    assert [r.allocated for r in ranks] == allocated.tolist()
    for rank in ranks:
        rounding = sum(p.n_bytes for p in rank.parts if p.part == "rounding")
        assert sum(p.n_bytes for p in rank.parts) == pytest.approx(rank.allocated, rel=1e-9)
        assert abs(rounding) < 1000


# ---- the command -------------------------------------------------------------------------------------------------

WORDS = ["estimate", "llama3-8b", "--hw", "h100-sxm", "--nodes", "1", "--seq-len", "8192", "--global-batch", "64", "--tp", "2"]


def _strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_json_holds_the_plan_and_the_detail():
    plain = _strict(planner(*WORDS, "--format", "json").stdout)
    result = planner(*WORDS, "--format", "json", "--detail", "time,memory", "--detail", "comm", "--detail", "source")
    assert (result.returncode, result.stderr) == (0, "")
    data = _strict(result.stdout)
    detail = data.pop("detail")
    assert data == plain
    assert {"time", "memory", "comm", "source"} <= detail.keys()
    assert sum(t["total"] for t in detail["time"]) == pytest.approx(data["estimate"]["step_time_s"], rel=1e-6)
    only = _strict(planner(*WORDS, "--format", "json", "--detail", "comm").stdout)["detail"]
    assert only["comm"] == detail["comm"]
    assert "time" not in only


def test_other_formats_and_inputs(tmp_path):
    plan = tmp_path / "plan.json"
    table = planner(*WORDS, "--detail", "time,memory,comm,source", "-o", str(plan))
    assert table.returncode == 0, table.stderr
    for text in ("Terms of one step", "gemm_seconds", "logits", "all_gather", "device.peak.bf16", "datasheet"):
        assert text in table.stdout, text
    csv = planner("estimate", str(plan), "--detail", "time", "--format", "csv")
    assert csv.stdout.startswith("part,name,seconds,times,total,share")
    markdown = planner("estimate", str(plan), "--detail", "memory", "--format", "markdown")
    assert markdown.stdout.startswith("| rank |")
    assert "| ranks | cause | part |" in markdown.stdout
    configuration = planner("estimate", "examples/configurations/llama3-8b.yaml", "--detail", "comm", "--format", "yaml")
    assert configuration.returncode == 0, configuration.stderr
    assert YAML(typ="safe").load(configuration.stdout)["detail"]["comm"]


@pytest.mark.parametrize("value", ["times", "time,bytes", ""])
def test_an_unknown_table_is_one_clear_error(value):
    message = one_line_error(planner(*WORDS, "--detail", value), "PLN107")
    assert "time, memory, comm, source" in message
