"""Plans for two device types: the file, what each type would do alone, prices, what does not fit, and the shipped example."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from machines import figure, llama, profile

import planner
from planner import planfile
from planner.errors import InfeasibleError, InputError
from planner.planfile import Plan
from planner.planning.request import task_of_plan
from planner.specs.hardware import HardwareProfile

ROOT = Path(__file__).parents[2]
MODEL = llama(8, 2048, 16, 8, 5632)


def typed(name: str, memory: str, rate: str, **more) -> HardwareProfile:
    peak = {"bf16": figure(rate), "fp32": figure("60 TFLOP/s")}
    made = profile(memory=memory, node_size=4, peak=peak, name=f"device {name}", power=figure(more.get("power", "400 W")))
    price = None if "price" not in more else {"price": figure(more["price"])}
    return HardwareProfile.model_validate(made.model_dump(mode="json", exclude_none=True) | {"name": name} | (price or {}))


FAST, SLOW = (
    typed("fast", "10 GiB", "989 TFLOP/s", power="700 W", price="3 USD/h"),
    typed("slow", "7 GiB", "312 TFLOP/s", price="1 USD/h"),
)


def small(shares, **more) -> Plan:
    return planner.plan(MODEL, shares, seq_len=1024, global_batch=32, **more)


@cache
def both() -> Plan:
    return small(((FAST, 1), (SLOW, 2)), tokens="1B")


def test_the_file_holds_both_types(tmp_path):
    plan = both()
    planfile.write(plan, tmp_path / "plan.json")
    again = planner.load_plan(str(tmp_path / "plan.json"))
    assert again.to_json() == plan.to_json()
    assert again.digest == plan.digest
    assert plan.version == "2.2"
    assert [(t.hardware, t.nodes, t.gpus) for t in plan.cluster.types] == [("fast", 1, 4), ("slow", 2, 8)]
    assert (plan.cluster.gpus, plan.cluster.nodes) == (12, 3)
    assert plan.cluster.peak_flops == pytest.approx((4 * 989e12 + 8 * 312e12) / 12)
    q = plan.layout.tp * plan.layout.cp * plan.layout.dp
    names = [m.hardware for m in plan.estimate.memory.stages]
    assert sorted(names) == ["fast"] * (4 // q) + ["slow"] * (8 // q)
    assert names == sorted(names, reverse=plan.layout.type_order == "reversed")
    limits = {m.hardware: m.limit_gib for m in plan.estimate.memory.stages}
    assert limits == {"fast": pytest.approx(0.92 * 10), "slow": pytest.approx(0.92 * 7)}
    assert small(((FAST, 1), (SLOW, 2)), tokens="1B").to_json() == plan.to_json()


def test_a_file_of_one_type_says_nothing_about_types():
    plan = planner.plan(MODEL, FAST, nodes=2, seq_len=1024, global_batch=32)
    text = plan.to_json()
    assert plan.version == "2.1"
    assert not any(word in text for word in ("type_order", '"types"', "second_hardware"))
    assert all("limit_gib" not in m and "hardware" not in m for m in json.loads(text)["estimate"]["memory"]["stages"])


def test_explain_compares_with_one_type():
    plan = both()
    e = planner.explain(plan)
    alone = {t.what: t for t in e.one_type}
    fast = planner.plan(MODEL, FAST, nodes=1, seq_len=1024, global_batch=32, alternatives=1)
    slow = planner.plan(MODEL, SLOW, gpus=12, seq_len=1024, global_batch=32, alternatives=1)
    assert alone["fast alone"].step_time_s == fast.estimate.step_time_s
    assert alone["every device a slow"].step_time_s == slow.estimate.step_time_s
    assert alone["every device a slow"].gpus == 12
    assert all(t.proven for t in e.one_type)
    assert [r.hardware for r in e.ranks] == [m.hardware for m in plan.estimate.memory.stages]
    assert [n.hardware for n in e.nodes] == sorted(["fast", "slow", "slow"], reverse=plan.layout.type_order == "reversed")
    one = planner.explain(planner.plan(MODEL, FAST, nodes=1, seq_len=1024, global_batch=32))
    assert "one_type" not in one.model_dump()


def test_why_not_the_other_order():
    plan = both()
    other = "as-named" if plan.layout.type_order == "reversed" else "reversed"
    answer = planner.explain(plan, why_not={"type_order": other}).why_not
    assert answer.verdict in ("slower", "equal", "does not fit")


def test_the_estimate_of_the_plan_is_the_plan():
    plan = both()
    again = planner.estimate(MODEL, ((FAST, 1), (SLOW, 2)), layout=plan.layout, seq_len=1024, global_batch=32)
    assert again.estimate == plan.estimate
    parts = again.estimate.breakdown
    assert sum(getattr(parts, name) for name in type(parts).model_fields) == pytest.approx(again.estimate.step_time_s)


def test_prices_and_powers_are_of_the_mean_device():
    e = both().economy
    assert e.price_usd_per_device_hour.value == pytest.approx((4 * 3 + 8 * 1) / 12)
    assert e.power_watts.value == pytest.approx((4 * 700 + 8 * 400) / 12)


def test_what_does_not_fit_names_a_change():
    with pytest.raises(InfeasibleError) as caught:
        small(((FAST, 1), (typed("tiny", "2 GiB", "312 TFLOP/s"), 1)))
    problem = caught.value.problems[0]
    assert problem.code == "PLN301"
    assert "4 x device fast + 4 x device tiny" in problem.what
    assert "a device (" in problem.fix


def test_two_types_must_fit_together():
    other = {
        "PLN150": ((FAST, 1), (SLOW, 1), (typed("third", "8 GiB", "1 TFLOP/s"), 1)),
        "PLN152": ((FAST, 1), (FAST, 1)),
        "PLN153": ((FAST, 1), (SLOW.model_copy(update={"node_size": 8}), 1)),
        "PLN155": ((FAST, 1), (SLOW.model_copy(update={"device": SLOW.device.model_copy(update={"kind": "rocm"})}), 1)),
        "PLN156": ((FAST, 1), (SLOW.model_copy(update={"network": SLOW.network[:1]}), 1)),
        "PLN157": ((FAST, 1), (SLOW, 0)),
        "PLN107": ("h100-sxm", "a100-80gb-sxm"),
    }
    for code, shares in other.items():
        with pytest.raises(InputError) as caught:
            small(shares)
        assert caught.value.problems[0].code == code
    with pytest.raises(InputError, match="PLN151"):
        small(((FAST, 1), (SLOW, 1)), nodes=2)
    with pytest.raises(InputError, match="PLN154"):
        small(((FAST, 1), (SLOW, 1)), objective="memory")
    with pytest.raises(InputError, match="PLN578"):
        small(((FAST, 1), (SLOW, 1)), engine="torchtitan")


def test_the_shipped_example_is_planned_to_a_proof():
    path = ROOT / "examples/configurations/llama3-70b-two-types.yaml"
    assert planner.check(str(path)) == []
    plan = planner.plan(
        "llama3-70b", [("h100-sxm", 4), ("a100-40gb-sxm", 4)], seq_len=4096, global_batch=256, alternatives=1
    )  # fmt: skip
    assert plan.certificate.status == "optimal"
    held = dict.fromkeys(("h100-sxm", "a100-40gb-sxm"), 0)
    for stage, memory in zip(plan.layout.stages, plan.estimate.memory.stages, strict=True):
        held[memory.hardware] += stage.layers
    assert held["h100-sxm"] > 2 * held["a100-40gb-sxm"]
    from planner.cost.devicetypes import layout_cost
    from planner.specs import files
    from planner.specs.layout import Configuration

    by_hand = files.build(Configuration, files.parse_document(str(path))).layout
    task, _ = task_of_plan(plan)
    assert plan.certificate.objective_ns < int(layout_cost(task, by_hand).total.step[0])
    whole = planner.plan("llama3-70b", "h100-sxm", nodes=4, seq_len=4096, global_batch=256, alternatives=1)
    assert plan.estimate.step_time_s < whole.estimate.step_time_s
