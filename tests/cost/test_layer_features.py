"""What each feature of a layer costs, against hand-made figures and against the same model without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from machines import llama, mixture, profile, task

from planner.cost import memory, primitives, step
from planner.cost.task import LayoutArray, Task
from planner.planning.estimate import estimate_layout
from planner.specs.layout import Layout, even_stages
from planner.specs.model import Model


def priced(t: Task, **degrees: int):
    layout = Layout.model_validate({"stages": [{"layers": t.model.n_layers}], **degrees})
    return primitives.price_with_parts(t, LayoutArray.of([layout], t.job))


def changed(model: Model, attention: dict | None = None, mlp: dict | None = None, **fields) -> Model:
    """A model of one group with some fields of its layers set."""
    group = model.layers[0]
    update = {"attention": group.attention.model_copy(update=attention or {}), "mlp": group.mlp.model_copy(update=mlp or {})}
    group = group.model_copy(update=update | {k: v for k, v in fields.items() if k in type(group).model_fields})
    rest = {k: v for k, v in fields.items() if k in Model.model_fields}
    return Model.model_validate(model.model_dump() | {"layers": [group.model_dump()]} | rest)


def test_parallel_blocks_halve_tensor_parallel_traffic():
    plain, t = llama(), task(llama(), 8, engine="megatron")
    parallel = task(changed(plain, parallel=True, norms="shared"), 8, engine="megatron")
    degrees = {"tp": 8, "sequence_parallel": True}
    (_, one), (_, two) = priced(parallel, **degrees), priced(t, **degrees)
    assert one.tp[0] == pytest.approx(two.tp[0] / 2)


def test_norms_cost_memory_and_time():
    shapes = (llama(), changed(llama(), norms="both"), changed(llama(), norms="shared", parallel=True))
    base, both, shared = (priced(task(m, seq_len=32768))[0] for m in shapes)
    row = 32768 * llama().hidden * 2
    assert int(both.act0[0] - base.act0[0]) == 2 * row
    assert int(base.act0[0] - shared.act0[0]) == row
    assert int(both.act2[0]) == int(base.act2[0])
    assert shared.forward[0] < base.forward[0] < both.forward[0]


@pytest.mark.parametrize(
    ("attention", "keys"),
    [({}, 1024.0), ({"sliding_window": 512}, 512 * (1 - 512 / 4096)), ({"chunk": 512}, 256.0), ({"causal": False}, 2048.0)],
)
def test_keys_that_a_query_sees(attention, keys):
    model = changed(llama(), attention)
    a = model.layers[0].attention
    assert a.mean_keys_of(2048) == keys
    full = {"sliding_window": 512, "chunk": 512}.get(next(iter(attention), ""), 2048)
    assert a.keys_of(2048) == full
    products = 6.0 * (model.layers[0].count * model.active_params_of(model.layers[0]) + model.vocab * model.hidden)
    width = model.layers[0].count * 12.0 * model.q_width
    assert model.flops_per_token(2048) == pytest.approx(products + width * full)
    assert model.flops_per_token(2048, "causal") == pytest.approx(products + width * keys)


def test_local_and_linear_attention_are_faster():
    times = [
        int(priced(task(changed(llama(), a), seq_len=32768))[0].forward[0])
        for a in ({}, {"chunk": 8192}, {"sliding_window": 1024}, {"kind": "linear"})
    ]
    assert times == sorted(times, reverse=True)


def test_imbalance_counts_once_experts_are_spread():
    even, uneven = mixture(), changed(mixture(), mlp={"imbalance": 1.5})
    for ep, same in ((1, True), (8, False)):
        one, two = (priced(task(m, 8, engine="megatron"), ep=ep, dp=8)[0] for m in (even, uneven))
        assert (int(one.forward[0]) == int(two.forward[0])) is same
        assert (int(one.act0[0]) == int(two.act0[0])) is same
    t = task(uneven, 8, engine="megatron")
    x = LayoutArray.of([Layout.model_validate({"ep": 8, "dp": 8, "stages": [{"layers": 4}]})], t.job)
    assert float(memory.slots(uneven.layers[0].mlp, x.ep)[0]) == 1.5


def test_multi_token_modules_live_on_the_last_rank():
    plain, more = llama(), changed(llama(), mtp=1)
    assert more.total_params == plain.total_params
    assert more.mtp_params == plain.layer_params_of(plain.layers[0]) + 2 * plain.hidden**2 + 3 * plain.hidden
    layout = Layout.model_validate(
        {"pp": 2, "dp": 4, "schedule": "1f1b", "stages": [s.model_dump() for s in even_stages(plain.n_layers, 2)]}
    )
    one, two = (estimate_layout(task(m, 8, engine="megatron"), layout).memory.stages for m in (plain, more))
    assert one[0].allocated == two[0].allocated
    # fp32 gradients and masters, bf16 weights, Adam: 18 bytes a parameter at ZeRO 0.
    states = sum(getattr(two[1], part) - getattr(one[1], part) for part in ("params", "grads", "optimizer")) * 2**30
    assert states == pytest.approx(18 * more.mtp_params, rel=1e-3)
    p, q = (priced(task(m, 8, engine="megatron"), dp=8)[0] for m in (plain, more))
    assert int(q.head[0]) > 2 * int(p.head[0]) + int(p.forward[0] + p.backward[0])


def test_an_encoder_has_its_own_width_and_tokens():
    front = {"hidden": 1024, "tokens": 1024, "patch": 588, "positions": 256, "merge": 4, "projector": [4096]}
    vision = {
        "count": 6, "attention": {"heads": 16, "causal": False, "chunk": 256}, "mlp": {"kind": "gelu", "width": 4096},
        "front": front,
    }  # fmt: skip
    text = llama()
    model = Model.model_validate(text.model_dump() | {"layers": [vision, text.layers[0].model_dump()]})
    projector = 4096 * 4096 + 4096 + 4096 * text.hidden + text.hidden
    assert model.front_params == 1024 * (588 + 256) + projector
    layer = 4 * 1024**2 + 2 * 1024 * 4096 + 2 * 2 * 1024
    assert model.total_params == text.total_params + 6 * layer + model.front_params
    t = task(model, 8, engine="megatron", hardware=profile(memory="200 GiB"), global_batch=64)
    layout = Layout.model_validate({"tp": 2, "pp": 2, "dp": 2, "schedule": "1f1b", "sequence_parallel": True, "micro_batch": 16,
                                    "stages": [{"layers": 8}, {"layers": model.n_layers - 8}]})  # fmt: skip
    assert step.layers_by_kind(t, layout).tolist() == [[6, 2], [0, model.n_layers - 8]]
    encoder, decoder = (primitives.price(t.only(k), LayoutArray.of([layout], t.job)) for k in (0, 1))
    assert 0 < encoder.forward[0] < decoder.forward[0]
    assert int(encoder.receive[0]) == 16 * 1024 * 1024 * 2 // 2
    whole = estimate_layout(t, layout)
    assert sum(s.params for s in whole.memory.stages) > 0
    assert np.isfinite(whole.step_time_s)


def test_encoders_come_before_the_language_model():
    text = llama().model_dump()
    front = {"hidden": 1024, "tokens": 1024, "patch": 588}
    vision = {"count": 2, "attention": {"heads": 16}, "mlp": {"kind": "gelu", "width": 4096}, "front": front}
    with pytest.raises(ValueError, match="come before"):
        Model.model_validate(text | {"layers": [*text["layers"], vision]})
    with pytest.raises(ValueError, match="the language model has none"):
        Model.model_validate(text | {"layers": [vision]})


def test_unaligned_vocabularies_slow_the_head_alone():
    """In 16 bits rows of the head's matrices begin at odd elements, or at even ones, or aligned."""
    heads, layers = [], []
    for vocab in (50257, 50258, 50264):
        p, _ = priced(task(llama(vocab=vocab), engine="megatron"))
        heads.append(int(p.head[0]))
        layers.append(int(p.forward[0]))
    assert len(set(layers)) == 1
    assert heads[0] > 1.5 * heads[1] > 1.5 * heads[2]


def test_traffic_under_nothing_stays_exposed():
    """nanotron's ZeRO 1 gathers the parameters when the step is done, where nothing runs beside."""
    t = task(llama(), 8, engine="nanotron")
    rule = t.accounting.zero[1]
    reduce, gather = rule.traffic

    def with_traffic(*traffic):
        accounting = replace(t.accounting, zero={1: replace(rule, traffic=traffic)})
        return priced(replace(t, accounting=accounting), dp=8, zero=1)[0]

    as_is, hidden, less = (
        with_traffic(reduce, gather),
        with_traffic(reduce, replace(gather, under="forward")),
        with_traffic(reduce),
    )
    assert int(as_is.comm[0]) == pytest.approx(int(hidden.comm[0]), abs=1)
    gathered = int(as_is.comm[0] - less.comm[0])
    assert gathered > 0
    assert int(as_is.floor[0] - less.floor[0]) == pytest.approx(gathered, abs=2)
    assert int(hidden.floor[0] - less.floor[0]) == pytest.approx(t.accounting.dp_floor * gathered, abs=2)
