"""Small plans for the runtime's tests, built without the search or an engine."""

from __future__ import annotations

from typing import Any

from machines import profile

from planner.planfile import Breakdown, Cluster, Estimate, Inputs, Memory, MemoryInterval, Plan, TimeInterval
from planner.specs.job import Job
from planner.specs.layout import Layout, Stage, even_stages
from planner.specs.model import Attention, LayerGroup, Mlp, Model
from planner.specs.policy import Policy

LAYERS = 3
"""Not divisible by 2: stages are uneven."""


def llama(layers: int = LAYERS, hidden: int = 32, vocab: int = 64, **changes: Any) -> Model:
    """RMSNorm, rotary, grouped queries with q/k norms, gated MLP, untied."""
    attention = Attention(heads=4, kv_heads=2, qk_norm=changes.pop("qk_norm", True))
    group = LayerGroup(count=layers, attention=attention, mlp=Mlp(kind="gated", width=changes.pop("width", 48)))
    return Model(name="tiny-llama", hidden=hidden, vocab=vocab, layers=[group], **changes)


def gpt(layers: int = LAYERS, hidden: int = 32, vocab: int = 64, **changes: Any) -> Model:
    """LayerNorm with bias, learned positions, biases everywhere, gelu MLP."""
    attention = Attention(heads=4, qkv_bias=True, out_bias=True)
    group = LayerGroup(count=layers, attention=attention, mlp=Mlp(kind="gelu", width=64, bias=True))
    options = {"norm": "layernorm", "positions": "learned", "max_positions": 32, **changes}
    return Model(name="tiny-gpt", hidden=hidden, vocab=vocab, layers=[group], **options)


def gemma(hidden: int = 32, vocab: int = 64, window: int = 5, width: int = 48, tied: bool = True) -> Model:
    """Two layers with a window, then one without (gemma: 5 to 1); norms before and after, gated gelu, tied, uneven heads."""
    mlp = Mlp(kind="gated", activation="gelu_tanh", width=width)

    def group(count: int, **attention: Any) -> LayerGroup:
        heads = Attention(heads=4, kv_heads=2, head_dim=hidden // 2, qk_norm="head", **attention)
        return LayerGroup(count=count, attention=heads, mlp=mlp, norms="both")

    layers = [group(2, sliding_window=window), group(1)]
    return Model(name="tiny-gemma", hidden=hidden, vocab=vocab, tied_embeddings=tied, layers=layers)


def olmo() -> Model:
    """Norms after the sublayers, norms over the whole query, three layers."""
    attention = Attention(heads=4, kv_heads=2, qk_norm="width")
    group = LayerGroup(count=LAYERS, attention=attention, mlp=Mlp(kind="gated", width=48), norms="post")
    return Model(name="tiny-olmo", hidden=32, vocab=64, layers=[group])


def phi() -> Model:
    """One norm before attention and MLP side by side, a quarter of each head turned, a bias on the head, squared relu."""
    attention = Attention(heads=4, kv_heads=4, head_dim=16, qkv_bias=True, rope_share=0.25)
    mlp = Mlp(kind="gelu", activation="relu2", width=64, bias=True)
    group = LayerGroup(count=LAYERS, attention=attention, mlp=mlp, norms="shared", parallel=True)
    return Model(name="tiny-phi", hidden=32, vocab=64, norm="layernorm", head_bias=True, layers=[group])


def cohere() -> Model:
    """Chunked layers and one without positions, two norms without weights beside each other, gpt-oss's clamped gate."""
    mlp = Mlp(kind="gated", activation="clamped_silu", width=48)

    def group(count: int, **attention: Any) -> LayerGroup:
        return LayerGroup(count=count, attention=Attention(heads=4, **attention), mlp=mlp, parallel=True)

    layers = [group(2, chunk=8), group(1, rope_share=0.0)]
    return Model(name="tiny-cohere", hidden=32, vocab=64, norm="layernorm", norm_bias=False, norm_weight=False, layers=layers)


def estimate() -> Estimate:
    """A prediction that nothing reads."""
    sizes = {"limit_gib": 1.0, "usable_gib": 1.0, "peak_gib": 0.5, "peak_allocated_gib": 0.5, "oom_probability": 0.0}
    origin = {"relative": 1.0, "provenance": "assumed", "source": "test"}
    around = MemoryInterval(low_gib=0.25, high_gib=1.0, **origin)
    memory = Memory(**sizes, limit_by="max_memory_fraction", interval=around, peak_stage=0, peak_cause="", fits=True, stages=[])
    return Estimate(
        step_time_s=1.0,
        interval=TimeInterval(low_s=0.5, high_s=2.0, **origin),
        tokens_per_s=1.0,
        tokens_per_s_per_gpu=1.0,
        tflops_per_gpu=1.0,
        mfu=0.1,
        microbatches=1,
        bubble_fraction=0.0,
        breakdown=Breakdown(**dict.fromkeys(Breakdown.model_fields, 0.0)),
        memory=memory,
        provenance="assumed",
    )


def plan(
    model: Model | None = None,
    *,
    recompute: str | list[str] = "none",
    layers: list[int] | None = None,
    precision: str = "fp32",
    seq_len: int = 16,
    global_batch: int = 8,
    engine: str = "bundled",
    **layout: Any,
) -> Plan:
    """A plan; `layout` holds degrees and the like, `layers` and `recompute` are by pipeline rank.

    There are 2 micro-batches, or 4 in a pipeline, unless `micro_batch` says otherwise.
    """
    model = model or llama()
    pp, tp, cp, dp = (layout.get(name, 1) for name in ("pp", "tp", "cp", "dp"))
    layout.setdefault("schedule", "none" if pp == 1 else "1f1b")
    layout.setdefault("micro_batch", global_batch // dp // (2 if pp == 1 else 4))
    counts = layers or [s.layers for s in even_stages(model.n_layers, pp, virtual_stages=layout.get("virtual_stages", 1))]
    modes = [recompute] * pp if isinstance(recompute, str) else recompute
    stages = [Stage(layers=n, recompute=mode) for n, mode in zip(counts, modes, strict=True)]
    size = pp * tp * cp * dp
    cluster = Cluster(hardware="test", nodes=1, gpus=size, node_size=size, device="cpu", device_kind="cpu", peak_flops=1e11)
    return Plan(
        model=model,
        job=Job(seq_len=seq_len, global_batch=global_batch, precision=precision),
        cluster=cluster,
        hardware=profile(),
        engine=engine,
        policy=Policy(),
        layout=Layout(sequence_parallel=tp > 1, stages=stages, **layout),
        estimate=estimate(),
        inputs=Inputs(model="tiny", hardware="test", digests={}),
    )


def stages(schedule: Any) -> list[Any]:
    """The stages of a rank in a schedule of torch's, which are for one or for several."""
    return getattr(schedule, "_stages", None) or [schedule._stage]
