"""What each engine accepts and refuses, from the one table that search, check, emit and runtime share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import gpt, llama, task

from planner.cost.task import DeviceType
from planner.engines.problems import layout_problems
from planner.engines.registry import ENGINES, engine_named
from planner.errors import InputError
from planner.search.space import declared_space, enumerate_rows
from planner.specs.layout import SCHEDULES, Layout, Stage, even_stages


def layout(layers: int = 8, **named) -> Layout:
    pp = named.get("pp", 1)
    named.setdefault("sequence_parallel", named.get("tp", 1) > 1)
    named.setdefault("schedule", "none" if pp == 1 else "1f1b")
    named.setdefault("stages", [s.model_dump() for s in even_stages(layers, pp)])
    return Layout.model_validate(named)


def codes(engine: str, gpus: int, model=None, **named) -> set[str]:
    t = task(model or llama(), gpus, 2048, 32, engine)
    return {p.code for p in layout_problems(t, engine_named(engine), layout(**named))}


@pytest.mark.parametrize(("engine", "gpus", "named", "expected"), [
    ("bundled", 8, {"tp": 2, "pp": 2, "dp": 2}, set()),
    ("megatron", 8, {"tp": 2, "cp": 2, "dp": 2}, set()),
    ("bundled", 8, {"dp": 4}, {"PLN201"}),
    ("bundled", 3, {"tp": 3}, {"PLN201", "PLN202", "PLN203", "PLN204", "PLN212", "PLN510"} - {"PLN201"}),
    ("bundled", 3, {"dp": 3}, {"PLN205"}),
    ("bundled", 1, {"schedule": "1f1b"}, {"PLN206"}),
    ("bundled", 2, {"pp": 2, "virtual_stages": 2}, {"PLN207"}),
    ("bundled", 2, {"pp": 2, "schedule": "interleaved", "virtual_stages": 8}, {"PLN208", "PLN223"}),
    ("bundled", 4, {"pp": 4, "micro_batch": 16, "schedule": "interleaved", "virtual_stages": 2}, {"PLN209"}),
    ("bundled", 2, {"pp": 2, "schedule": "zbv"}, {"PLN207"}),
    ("bundled", 2, {"pp": 2, "schedule": "dualpipev", "virtual_stages": 4}, {"PLN207", "PLN223"} - {"PLN223"}),
    ("bundled", 2, {"pp": 2, "schedule": "interleaved-zb", "virtual_stages": 4}, set()),
    ("bundled", 2, {"pp": 2, "schedule": "zbv", "virtual_stages": 2, "micro_batch": 8}, set()),
    ("bundled", 4, {"pp": 4, "micro_batch": 16, "schedule": "interleaved-zb", "virtual_stages": 2}, {"PLN209"}),
    ("bundled", 4, {"pp": 4, "micro_batch": 8, "schedule": "zbv", "virtual_stages": 2}, {"PLN581"}),
    ("bundled", 4, {"pp": 4, "micro_batch": 8, "schedule": "dualpipev", "virtual_stages": 2}, {"PLN582"}),
    ("bundled", 4, {"pp": 2, "dp": 2, "zero": 3, "schedule": "zbv", "virtual_stages": 2}, {"PLN583"}),
    ("bundled", 4, {"pp": 2, "dp": 2, "zero": 2, "schedule": "dualpipev", "virtual_stages": 2}, set()),
    ("megatron", 4, {"pp": 4, "schedule": "zbv", "virtual_stages": 2}, {"PLN580"}),
    ("torchtitan", 4, {"pp": 4, "schedule": "zbv", "virtual_stages": 2}, {"PLN580"}),
    ("torchtitan+eager", 4, {"pp": 4, "schedule": "zbv", "virtual_stages": 2}, set()),
    ("megatron+eager", 4, {"pp": 4, "schedule": "zbv", "virtual_stages": 2}, {"PLN580"}),
    ("bundled", 1, {"zero": 1}, {"PLN210"}),
    ("bundled", 1, {"sequence_parallel": True}, {"PLN211"}),
    ("megatron", 2, {"cp": 2, "ep": 2}, {"PLN214"}),
    ("bundled", 16, {"tp": 16}, {"PLN510"}),
    ("megatron", 16, {"tp": 16}, set()),
    ("bundled", 4, {"pp": 4, "micro_batch": 16}, {"PLN511"}),
    ("bundled", 4, {"pp": 4, "micro_batch": 16, "schedule": "gpipe"}, set()),
    ("bundled", 2, {"tp": 2, "sequence_parallel": False}, {"PLN513"}),
    ("megatron", 2, {"tp": 2, "sequence_parallel": False}, set()),
    ("bundled", 2, {"cp": 2}, set()),
    ("bundled", 16, {"cp": 2, "tp": 8}, {"PLN514"}),
    ("bundled", 16, {"cp": 16}, {"PLN514"}),
    ("bundled", 16, {"cp": 16, "context": "ring"}, set()),
    ("bundled", 16, {"cp": 2, "tp": 8, "context": "ring"}, set()),
    ("bundled", 2, {"dp": 2, "context": "ring"}, {"PLN565"}),
    ("bundled+compile", 2, {"cp": 2, "context": "ring"}, {"PLN568"}),
    ("bundled+selective-products", 2, {"cp": 2, "context": "ring"}, {"PLN569"}),
    ("torchtitan", 2, {"cp": 2, "zero": 2, "context": "ring"}, {"PLN566"}),
    ("megatron", 2, {"cp": 2, "context": "ring"}, {"PLN566"}),
    ("bundled", 8, {"dp": 8, "zero": 3, "shard": 4}, set()),
    ("bundled", 8, {"dp": 8, "zero": 3, "shard": 3}, {"PLN506"}),
    ("bundled", 8, {"dp": 8, "shard": 4}, {"PLN507"}),
    ("bundled", 8, {"dp": 8, "zero": 2, "shard": 1}, {"PLN507"}),
    ("torchtitan", 8, {"dp": 8, "zero": 3, "shard": 4}, set()),
    ("megatron", 8, {"dp": 8, "zero": 1, "shard": 4}, {"PLN508"}),
    ("megatron", 8, {"dp": 8, "zero": 3}, {"PLN521"}),
    ("megatron", 2, {"pp": 2, "schedule": "gpipe"}, {"PLN522"}),
    ("megatron", 2, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}, {"PLN523"}),
])  # fmt: skip
def test_accepts_and_refuses(engine, gpus, named, expected):
    assert codes(engine, gpus, **named) == expected


@pytest.mark.parametrize(("engine", "named", "expected"), [
    ("bundled", {"tp": 2, "pp": 3, "dp": 2}, set()),
    ("megatron", {"tp": 4, "pp": 3, "type_order": "reversed"}, set()),
    ("bundled", {"tp": 2, "pp": 2, "dp": 3}, {"PLN575", "PLN205"}),
    ("megatron", {"tp": 4, "dp": 3}, {"PLN575", "PLN205"}),
    ("megatron", {"tp": 2, "pp": 6, "schedule": "interleaved", "virtual_stages": 2, "stages": [{"layers": 2}] * 6},
     {"PLN576", "PLN201", "PLN209", "PLN208", "PLN222"}),
    ("megatron", {"tp": 2, "pp": 3, "dp": 2, "order": "tp-cp-pp-dp"}, {"PLN577", "PLN225"}),
    ("torchtitan", {"tp": 2, "pp": 3, "dp": 2}, {"PLN578"}),
])  # fmt: skip
def test_two_device_types(engine, named, expected):
    """12 devices of which 4 are of one type: stages of 1, 2 or 4 devices."""
    one = task(llama(), 12, 2048, 32, engine)
    t = replace(one, types=(DeviceType(one.hardware, 4), DeviceType(one.hardware, 8)))
    found = {p.code for p in layout_problems(t, engine_named(engine), layout(**named))}
    assert found & {"PLN575", "PLN576", "PLN577", "PLN578", "PLN579"} == expected & {"PLN575", "PLN576", "PLN577", "PLN578"}


def test_the_order_of_types_needs_two():
    assert codes("bundled", 2, pp=2, type_order="reversed") == {"PLN579"}


def test_only_the_last_stage_may_have_unequal_chunks():
    chunked = {"schedule": "interleaved", "virtual_stages": 4, "pp": 4, "dp": 1}
    fine, short = [{"layers": 4}] * 3 + [{"layers": 7}], [{"layers": 4}] * 2 + [{"layers": 7}, {"layers": 4}]
    for engine in ("bundled", "megatron", "torchtitan"):
        assert codes(engine, 4, llama(19), **chunked, stages=fine) == set()
        assert codes(engine, 4, llama(19), **chunked, stages=short) == {"PLN223"}
    assert codes("nanotron", 4, llama(19), **chunked, stages=fine) == {"PLN552", "PLN570"}
    assert "PLN570" in codes("deepspeed", 4, llama(19), **chunked, stages=fine)
    short = {"pp": 2, "dp": 1, "virtual_stages": 2, "stages": [{"layers": 10}, {"layers": 9}]}
    for schedule in ("interleaved-zb", "zbv", "dualpipev"):
        assert codes("bundled", 2, llama(19), **short, schedule=schedule) == {"PLN586"}


def test_tied_embeddings_cannot_be_pipelined_by_the_bundled_runtime():
    assert codes("bundled", 2, gpt(tied=True), pp=2) == {"PLN512"}
    assert codes("bundled", 2, gpt(tied=True), dp=2) == set()
    assert codes("megatron", 2, gpt(tied=True), pp=2) == set()


def test_stages_must_match_the_model():
    assert codes("bundled", 2, pp=2, stages=[{"layers": 8}]) == {"PLN221"}
    assert codes("bundled", 2, pp=2, stages=[{"layers": 4}, {"layers": 3}]) == {"PLN222"}
    mixed = [{"layers": 4, "recompute": "full:1"}, {"layers": 4}]
    assert codes("bundled", 2, pp=2, schedule="interleaved", virtual_stages=2, stages=mixed) == {"PLN224"}
    whole = [{"layers": 4, "recompute": "full"}, {"layers": 4}]
    assert codes("bundled", 2, pp=2, schedule="zbv", virtual_stages=2, stages=whole) == {"PLN584"}
    with pytest.raises(ValueError, match="counts more layers"):
        Stage(layers=2, recompute="full:3")


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_row_of_the_space_obeys_every_rule(engine):
    """The search's array form and the single layout's form of the rules agree."""
    t, e = task(llama(), 8, 2048, 32, engine), engine_named(engine)
    x = enumerate_rows(t, e, declared_space(t, e, {}, [])).layouts
    assert len(x) > 5  # fsdp1 has no degrees but dp
    for row in range(0, len(x), 7):
        names = ("tp", "cp", "pp", "dp", "zero", "micro_batch", "virtual_stages")
        values = {n: int(getattr(x, n)[row]) for n in names}
        schedule = SCHEDULES[int(x.schedule[row])]
        one = layout(**values, schedule=schedule, sequence_parallel=bool(x.sequence_parallel[row]))
        assert {p.code for p in layout_problems(t, e, one)} <= {"PLN223"}


def test_rules_have_distinct_codes_and_names():
    for engine in ENGINES.values():
        rules = engine.all_rules
        assert len({r.code for r in rules}) == len({r.name for r in rules}) == len(rules)


def test_recipes_belong_to_their_engine():
    assert "PLN516" in {rule.code for rule in engine_named("bundled+compile").rules}
    with pytest.raises(InputError, match="megatron has no trait 'compile'"):
        engine_named("megatron+compile")


def test_unknown_engine():
    with pytest.raises(InputError, match="did you mean megatron"):
        engine_named("megatrn")
