"""LoRA and QLoRA: counts against torch modules, bytes and FLOPs by hand, relations to full training, published figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from command import one_line_error
from command import planner as command
from machines import gpt, llama, llama_70b, mixture, profile, task

import planner
from cost.test_experts import deepseek_v2
from planner.cost import adapters, frozen, memory, operators, primitives
from planner.cost.accounting import Held, Traffic
from planner.cost.task import LayoutArray
from planner.engines.problems import job_problems, layout_problems
from planner.engines.registry import engine_named
from planner.errors import InputError
from planner.specs.job import Job
from planner.specs.layout import Layout
from planner.specs.model import Model
from planner.specs.projections import adapted, projections, trained_params, training_flops

NF4 = (4 + 0.126953125) / 8


def lora(model: Model | None = None, gpus: int = 8, engine: str = "megatron", hardware=None, **adapter):
    """A task with an adapter, 2,048 tokens a sequence, 32 sequences a step."""
    t = task(model, gpus, 2048, 32, engine, hardware)
    job = Job.model_validate({"seq_len": 2048, "global_batch": 32, "adapter": {"rank": 16} | adapter})
    return replace(t, job=job)


def layouts(t, *named):
    made = [Layout.model_validate({"stages": [{"layers": t.model.n_layers}], "dp": t.gpus} | n) for n in named]
    return LayoutArray.of(made, t.job)


# ---- counts ------------------------------------------------------------------------------------------------------------


def torch_decoder(model: Model, rank: int, targets: tuple[str, ...]):
    """The decoder as torch modules on no device, with a low-rank pair beside every adapted linear layer, as PEFT makes them."""
    torch = pytest.importorskip("torch")
    from torch import nn

    class Low(nn.Module):
        def __init__(self, inputs: int, outputs: int, bias: bool, adapt: bool):
            super().__init__()
            self.base = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
            if adapt:
                self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def layer() -> nn.Module:
        a, m, h, on = model.layer.attention, model.layer.mlp, model.hidden, "attention" in targets
        q, kv = a.heads * model.head_dim, (a.kv_heads or a.heads) * model.head_dim
        parts = [Low(h, q, a.qkv_bias, on), Low(h, kv, a.qkv_bias, on), Low(h, kv, a.qkv_bias, on), Low(q, h, a.out_bias, on)]
        firsts, experts = m.matrices - 1, m.experts if m.routed else 0
        for width, copies, name in ((m.dense_width, 1, "mlp"), (m.width, experts, "experts")):
            for _ in range(copies if width else 0):
                parts += [Low(h, width, m.bias, name in targets) for _ in range(firsts)]
                parts.append(Low(width, h, m.bias, name in targets))
        norms = [(nn.LayerNorm if model.norm == "layernorm" else nn.RMSNorm)(h) for _ in range(2)]
        router = [nn.Linear(h, experts, bias=False)] if experts else []
        return nn.ModuleList([*parts, *(n.requires_grad_(False) for n in (*norms, *router))])

    with torch.device("meta"):
        ends = [nn.Embedding(model.vocab, model.hidden), nn.Linear(model.hidden, model.vocab, bias=False)]
        final = (nn.LayerNorm if model.norm == "layernorm" else nn.RMSNorm)(model.hidden)
        positions = [nn.Embedding(model.max_positions, model.hidden)] if model.positions == "learned" else []
        whole = nn.ModuleList([*(n.requires_grad_(False) for n in (*ends, final, *positions))])
        whole.extend(layer() for _ in range(model.n_layers))
    return whole


@pytest.mark.parametrize(("model", "targets"), [
    (llama(3), ("attention", "mlp")), (llama(2), ("attention",)), (gpt(2), ("attention", "mlp")),
    (mixture(2), ("attention", "experts")), (mixture(2, shared=512), ("attention", "mlp")), (mixture(2), ("attention", "mlp")),
])  # fmt: skip
def test_trained_parameters_equal_torch(model, targets):
    module = torch_decoder(model, 8, targets)
    job = Job.model_validate({"seq_len": 512, "global_batch": 8, "adapter": {"rank": 8, "targets": list(targets)}})
    assert trained_params(model, job) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert model.total_params == sum(p.numel() for p in module.parameters() if not p.requires_grad)


@pytest.mark.parametrize("model", [llama(2), gpt(2), mixture(2, shared=512), deepseek_v2(3, 1)])
def test_projections_are_the_matrices_of_the_model(model):
    """Together they are what the model counts: split matrices, experts without biases, latent down-projections."""
    for group, _ in model.kinds:
        a, m, found = group.attention, group.mlp, projections(model, group)
        latent = model.hidden * ((a.q_lora_rank or 0) + (a.kv_lora_rank or 0) + a.rope_dim) if a.kind == "latent" else 0
        experts = m.experts * m.matrices * model.hidden * m.width if m.routed else 0
        assert sum(p.experts * p.weights for p in found) == model.matmul_params_of(group) + latent + experts


def test_known_counts():
    """All linear layers of Llama-2-7B at rank 64 (QLoRA's setting): 159,907,840 parameters, as PEFT prints."""
    model = planner.load_model("llama2-7b")
    job = Job.model_validate({"seq_len": 512, "global_batch": 8, "adapter": {"rank": 64}})
    assert trained_params(model, job) == 159_907_840
    whole = job.model_copy(update={"adapter": job.adapter.model_copy(update={"train_embeddings": True})})
    assert trained_params(model, whole) == 159_907_840 + 2 * 32000 * 4096 + 4096
    assert trained_params(model, Job(seq_len=512, global_batch=8)) == model.total_params


def test_latent_attention_adapts_every_projection():
    model = deepseek_v2(2, 1)
    found = {p.name: p for p in adapted(model, model.layers[0], lora(llama(), targets=["attention"]).job.adapter)}
    assert set(found) == {"query down", "query up", "key/value down", "key/value up", "attention output"}
    assert found["key/value down"].adapter_params(16) == 16 * (5120 + 512 + 64)
    assert found["key/value up"].adapter_params(16) == 16 * (512 + 128 * (128 + 128))


def test_parameters_of_a_rank_by_hand():
    """llama(): hidden 1024, q 1024, kv 512, width 2816. Column-parallel: A whole, B split; row-parallel the other way."""
    t = lora(rank=8)
    for tp in (1, 2, 4):
        x = layouts(t, {"tp": tp, "dp": 8 // tp, "sequence_parallel": tp > 1})
        columns = 5 * 1024 + (1024 + 512 + 512 + 2816 + 2816) / tp
        rows = (1024 + 2816) / tp + 2 * 1024
        assert frozen.trained_params(t, x)["layer"][0] == 8 * (columns + rows)
    assert frozen.trained_params(t, layouts(t, {}))["embedding"][0] == 0


def test_experts_adapters_are_spread():
    t = lora(mixture(experts=8), targets=["experts"])
    x = layouts(t, {"ep": 1}, {"ep": 4})
    params = frozen.trained_params(t, x)
    assert params["experts"].tolist() == [16 * 8 * 3 * 2048, 16 * 2 * 3 * 2048]
    assert params["layer"].tolist() == [0, 0]


# ---- bytes -------------------------------------------------------------------------------------------------------------


def test_states_by_hand():
    """Megatron, ZeRO 1 over 8: 2 bytes a frozen weight; adapters 2 + 4 whole, 12 over 8, and their weight-gradient buffer."""
    t = lora()
    p, model = primitives.price(t, layouts(t, {"zero": 1})), t.model
    weights = model.layer_params_of(model.layer)
    own = 16 * (5 * 1024 + 1024 + 512 + 512 + 2 * 2816 + 1024 + 2816 + 2 * 1024)
    assert p.state[0] == 2 * weights + own * (6 + 12 / 8)
    assert p.state_first[0] == 2 * model.vocab * model.hidden
    assert p.state_last[0] == 2 * (model.vocab * model.hidden + model.hidden)
    assert p.fixed[0] == 2 * own + 32 * 2**20


@pytest.mark.parametrize(("base", "size", "scales"), [("same", 2.0, 0), ("fp8", 1.0, 0), ("int8", 1.0, 4), ("nf4", NF4, 0)])
def test_bytes_of_the_base(base, size, scales):
    """Matrices as stored, norms in the compute type; int8 has a scale for each output."""
    t = lora(engine="deepspeed", base=base)
    matrices = t.model.matmul_params_of(t.model.layer)
    outputs = 1024 + 512 + 512 + 1024 + 2816 * 2 + 1024
    stored = frozen.frozen_bytes(t, layouts(t, {}))
    assert stored["layer"][0] == pytest.approx(size * matrices + scales * outputs + 2 * 2 * 1024, rel=1e-12)
    assert stored["embedding"][0] == 2 * 32000 * 1024


def test_double_quantisation_takes_0_127_bits():
    """QLoRA (arXiv 2305.14314), section 3."""
    assert 8 * lora(base="nf4").job.adapter.weight_bytes(2) - 4 == pytest.approx(0.127, abs=5e-4)


def test_sharded_base_is_gathered_as_stored():
    """ZeRO 3 holds an eighth, gathers two layers as stored, and dequantises one matrix: the widest, 1024 x 2816."""
    t = lora(engine="deepspeed", base="nf4")
    x = layouts(t, {"zero": 3}, {"zero": 2})
    trained, base = frozen.sources(t, x)
    rule = base.task.accounting.zero[3]
    assert rule.backward == (Held("params", 1, shard=True),)
    assert {(i.op, i.per, i.size) for i in rule.traffic} == {("all_gather", "microbatch", 1)}
    assert base.task.accounting.zero[2].traffic == ()
    assert rule.unit == (Held("params", 1, shard=False),) * 2
    p, stored = primitives.price(t, x), base.counts["layer"]
    copy, own = 2 * 1024 * 2816, trained.counts["layer"][0]
    temporaries = memory.activation_bytes(t, x).backward
    assert p.transient[0] - temporaries[0] == pytest.approx(2 * stored[0] + copy + 6 * own, abs=3)
    assert p.transient[1] - temporaries[1] == pytest.approx(copy + 2 * own, abs=3)
    assert Traffic("all_gather", 1, "microbatch", "forward") in rule.traffic


def test_inputs_of_frozen_matrices_are_not_kept():
    """Without an adapter on the MLP its input (hidden) and the product before its last matrix (width) go."""
    both, attention = lora(), lora(targets=["attention"])
    full = task(llama(), 8, 2048, 32, "megatron")
    x = layouts(full, {})
    act = [int(primitives.price(t, x).act0[0]) for t in (full, both, attention)]
    assert act[1] - act[0] == 2048 * 2 * 16 * 7  # A's outputs of seven matrices
    assert act[1] - act[2] == 2048 * 2 * (16 * 3 + 1024 + 2816)
    again = [int(primitives.price(t, x).act2[0]) for t in (full, both, attention)]
    assert again[0] == again[1] == again[2]


# ---- time --------------------------------------------------------------------------------------------------------------


def flops(t, direction: int) -> float:
    s = operators.shapes_of(t, layouts(t, {}))
    return sum(float((2.0 * p.m * p.n * p.k * p.groups)[0]) for p in operators.layer_products(t, s, direction))


def test_products_by_hand():
    """A token costs 2 FLOPs a weight forward and 2 backward, and 6 for each weight of A and B."""
    t = lora()
    n, own = t.model.matmul_params_of(t.model.layer), frozen.trained_params(t, layouts(t, {}))["layer"][0]
    assert flops(t, 0) == 2048 * 2 * (n + own)
    assert flops(t, 1) == 2048 * (2 * n + 4 * own)


def test_training_flops_of_a_job():
    """4 N and 6 for adapters, attention as ever; of full training what the model says."""
    t = lora()
    model, own = t.model, 8 * frozen.trained_params(t, layouts(t, {}))["layer"][0]
    n = 8 * model.matmul_params_of(model.layer) + model.vocab * model.hidden
    attention = model.flops_per_token(2048) - 6 * n
    assert training_flops(model, t.job) == 4 * n + 6 * own + attention
    assert training_flops(model, task().job) == model.flops_per_token(2048)


def test_dequantisation_reads_stored_bytes_and_writes_two():
    t = lora(engine="deepspeed", base="nf4")
    s = operators.shapes_of(t, layouts(t, {}))
    n = t.model.matmul_params_of(t.model.layer)
    assert adapters.dequantise_seconds(t, s, False)[0] == pytest.approx(n * (NF4 + 2) / (3.35e12 * 0.8), rel=1e-9)
    assert adapters.dequantise_seconds(lora(), s, False)[0] == 0


def parts(engine: str, layout: dict, adapter: dict | None, gpus: int = 8):
    e = planner.estimate(llama_70b(), profile(), layout=layout, seq_len=4096, global_batch=32, gpus=gpus, engine=engine,
                         adapter=adapter).estimate  # fmt: skip
    return e.step_time_s, e.breakdown, e.memory.peak_gib, e.memory.fits


@pytest.mark.parametrize(("engine", "layout"), [
    ("megatron", {"pp": 4, "zero": 1, "recompute": "full"}), ("deepspeed", {"zero": 3, "recompute": "full"}),
])  # fmt: skip
def test_lora_is_faster_than_full_training_and_needs_far_less(engine, layout):
    step, time, peak, fits = parts(engine, layout, {"rank": 16})
    full_step, full_time, full_peak, full_fits = parts(engine, layout, None)
    # Of three products one goes, the weight gradient, which takes 1.05 of another's time.
    assert 2 / 3.05 < time.compute / full_time.compute < 1
    assert step < full_step
    assert fits
    assert not full_fits
    assert peak < 0.5 * full_peak
    assert time.optimizer < 0.02 * full_time.optimizer


def test_quantised_base_needs_less_memory_and_more_time():
    layout = {"zero": 3, "recompute": "full"}
    same, nf4 = (parts("deepspeed", layout, {"rank": 16, "base": base}, 2) for base in ("same", "nf4"))
    assert nf4[2] < 0.5 * same[2]
    assert (same[3], nf4[3]) == (False, True)
    assert nf4[1].compute > same[1].compute
    assert nf4[1].zero_comm < 0.5 * same[1].zero_comm


# ---- engines, commands, published figures ------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "base", "layout", "expected"), [
    ("megatron", "same", {"tp": 2, "dp": 2, "pp": 2, "schedule": "1f1b", "sequence_parallel": True}, set()),
    ("megatron", "fp8", {"dp": 8, "zero": 1}, set()),
    ("megatron", "nf4", {"tp": 8, "sequence_parallel": True}, {"PLN561"}),
    ("megatron+fsdp", "same", {"dp": 8, "zero": 3}, {"PLN562"}),
    ("deepspeed", "nf4", {"dp": 8, "zero": 3}, set()),
    ("deepspeed", "nf4", {"tp": 8}, {"PLN563"}),
    ("deepspeed", "int8", {"dp": 8, "zero": 3}, {"PLN564"}),
    ("bundled", "same", {"dp": 8}, {"PLN560"}),
    ("nanotron", "same", {"dp": 8}, {"PLN560"}),
])  # fmt: skip
def test_engines_that_train_adapters(engine, base, layout, expected):
    t = lora(engine=engine, base=base)
    pp = layout.get("pp", 1)
    made = Layout.model_validate({"stages": [{"layers": 8 // pp}] * pp} | layout)
    assert {p.code for p in layout_problems(t, engine_named(engine), made)} == expected
    whole = {"PLN560", "PLN561"} & expected
    assert {p.code for p in job_problems(t, engine_named(engine))} == whole
    assert not layout_problems(task(llama(), 8, 2048, 32, engine), engine_named(engine), made)


def test_published_memory():
    """Three public figures, which also hold what caches and fragments: PEFT's documentation, "DeepSpeed", runs Llama-2-70B
    at rank 8 over all linear layers, 2,048 tokens, with full recompute and ZeRO 3: 64 GB on each of 8 H100 at micro-batch 8,
    36.6 GB on each of 2 devices with an nf4 base at micro-batch 2. QLoRA (arXiv 2305.14314) trains 65B at rank 64, 512 tokens
    in 48 GB; its optimizer states are paged, so they do not count."""
    layout = {"zero": 3, "recompute": "full"}
    named = {"seq_len": 2048, "engine": "deepspeed"}
    runs = [(8, 8, "same", 64.0), (2, 2, "nf4", 36.6)]
    for gpus, micro, base, measured in runs:
        found = planner.estimate("llama2-70b", "h100-sxm", gpus=gpus, global_batch=gpus * micro * 4, **named,
                                 layout=layout | {"micro_batch": micro}, adapter={"rank": 8, "base": base})  # fmt: skip
        assert 0.8 * measured < found.estimate.memory.peak_gib * 2**30 / 1e9 < 1.02 * measured
    llama_65b = llama(80, 8192, 64, 64, 22016, 32000)
    small = planner.estimate(llama_65b, "h100-sxm", gpus=1, global_batch=16, **named | {"seq_len": 512},
                             layout={"recompute": "full"}, adapter={"rank": 64, "base": "nf4"}).estimate.memory  # fmt: skip
    paged = small.stages[0].optimizer
    assert 40 < (small.peak_gib - paged) * 2**30 / 1e9 < 48


def test_plans_of_a_70b():
    """Full training does not fit on a node; LoRA does, and QLoRA on one device."""
    named = {"seq_len": 4096, "global_batch": 32, "alternatives": 1}
    whole = planner.plan("llama3-70b", "h100-sxm", gpus=8, engine="megatron", adapter={"rank": 16}, **named)
    quantised = planner.plan("llama3-70b", "h100-sxm", gpus=1, engine="deepspeed", adapter={"rank": 16, "base": "nf4"}, **named)
    assert whole.certificate.status == quantised.certificate.status == "optimal"
    assert 0.3 < whole.estimate.mfu < 0.6
    assert quantised.estimate.tokens_per_s_per_gpu < whole.estimate.tokens_per_s_per_gpu
    assert whole.job.adapter.targets == ["attention", "mlp"]


def test_example_is_feasible_and_says_what_is_trained():
    path = "examples/configurations/llama3-70b-lora.yaml"
    assert command("check", path).returncode == 0
    assert "(70.6 B parameters, 207 M trained, LoRA rank 16)" in command("estimate", path).stdout


ESTIMATE = ["estimate", "llama3-8b", "--hw", "h100-sxm", "--nodes", "1", "--seq-len", "4096", "--global-batch", "32"]


@pytest.mark.parametrize(("flags", "code", "text"), [
    (["--lora-base", "nf4"], "PLN107", "without --lora-rank"),
    (["--lora-rank", "0"], "PLN107", "--lora-rank 0"),
    (["--lora-rank", "8", "--lora-base", "nf5"], "PLN107", "--lora-base 'nf5'"),
    (["--lora-rank", "8", "--lora-targets", "mlp,mlp"], "PLN107", "names a target twice"),
    (["--lora-rank", "8", "--lora-targets", "experts", "--engine", "megatron"], "PLN134", "llama3-8b has none"),
    (["--lora-rank", "8"], "PLN560", "engine bundled"),
])  # fmt: skip
def test_wrong_flags_are_told(flags, code, text):
    assert text in one_line_error(command(*ESTIMATE, *flags), code, 2)


def test_adapter_of_a_model_without_those_parts():
    with pytest.raises(InputError, match="PLN134"):
        planner.estimate(mixture(), profile(), layout={}, seq_len=512, global_batch=8, gpus=1, engine="megatron",
                         adapter={"rank": 8, "targets": ["mlp"]})  # fmt: skip


def test_no_adapter_changes_nothing():
    """Trained are then all parameters, under the engine's own rules."""
    t = task(llama(), 8, 2048, 32, "deepspeed")
    x = layouts(t, {"zero": 3})
    (only,) = frozen.sources(t, x)
    assert only.task is t
    assert all(np.array_equal(v, memory.rank_params(t, x)[k]) for k, v in only.counts.items())
