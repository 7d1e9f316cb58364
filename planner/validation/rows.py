"""Rows of a table of runs as (model, job, layout): everything that a prediction needs, or the reason why it is impossible.

The columns are those of published tables of runs (see the README); blank means not stated. Nothing is guessed that
changes the answer much: a row without a micro-batch or a global batch is skipped with that reason.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from planner.cost.accounting import Accounting
from planner.cost.task import MAX_DEVICES
from planner.errors import input_error
from planner.specs import files
from planner.specs.job import Job
from planner.specs.layout import Layout, Stage, even_stages
from planner.specs.model import Attention, LayerGroup, Mlp, Model
from planner.validation import measured
from planner.validation.architectures import Family, family_of

REQUIRED = (
    "model_name", "layers", "hidden", "heads", "vocab", "seq_len", "gpus", "tp", "pp", "micro_batch", "global_batch",
)  # fmt: skip
"""Columns that a table must have; the others may be missing."""

Row = Mapping[str, str]


class Unusable(Exception):
    """Why a row cannot be predicted: a few words, the key of the skipped rows' count."""


@dataclass(frozen=True)
class Run:
    """One row, understood."""

    model: Model
    job: Job
    layout: Layout
    gpus: int
    microbatches: int
    """Of one data-parallel rank, the last one perhaps incomplete."""


def read_table(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV table or of measurements. Raises InputError when a needed column is missing."""
    if measured.is_measurement(path):
        yield from measured.read(path)
        return
    reader = csv.DictReader(io.StringIO(files.read_text(path).removeprefix("\ufeff")))
    try:
        columns = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        why = f"line {reader.line_num}: {error}"
        raise input_error(
            "PLN141", f"{path} is no table of comma-separated values", why, "quote long or broken cells"
        ) from None
    if len(columns) == 1 and ";" in columns[0]:
        raise input_error("PLN141", f"{path} is separated by semicolons", "", "separate its columns by commas")
    missing = [c for c in REQUIRED if c not in columns]
    if missing:
        why = f"it has {', '.join(columns[:8])}{' ...' if len(columns) > 8 else ''}" if columns else "it is empty"
        what = f"{path} has no column {', '.join(missing)}"
        raise input_error("PLN141", what, why, "a table of runs has one row a run and these columns; see the README")
    for line, row in rows:
        yield line, {k: (v or "").strip() for k, v in row.items() if k is not None and not isinstance(v, list)}


def number(row: Row, column: str) -> float | None:
    """A column's number, None when blank. Raises Unusable when it is no number."""
    text = row.get(column, "")
    if text == "" or text.lower() in ("nan", "none", "unknown"):
        return None
    try:
        value = float(text)
    except ValueError:
        raise Unusable(f"{column} is no number") from None
    if not math.isfinite(value):
        raise Unusable(f"{column} is no number")
    return value


LIMITS = {"layers": 10_000, "gpus": MAX_DEVICES, "seq_len": 2**27, "global_batch": 2**24, "pp": 10_000, "experts": 2**16}
"""Larger figures than anything trained: a slip of units, refused before it costs time. Other whole numbers: 2^31."""


def positive(row: Row, column: str, low: float, high: float) -> float | None:
    """A measured figure inside a sane range, None when blank. Raises Unusable."""
    value = number(row, column)
    if value is not None and not low <= value <= high:
        raise Unusable(f"{column} is not between {low:g} and {high:g}")
    return value


def whole(row: Row, column: str, default: int | None = None) -> int:
    """A column's whole number. Raises Unusable when it is blank without a default, or not whole."""
    value = number(row, column)
    if value is None:
        if default is None:
            raise Unusable(f"{column} not stated")
        return default
    if value != int(value) or value <= 0:
        raise Unusable(f"{column} is not a positive whole number")
    if value > LIMITS.get(column, 2**31 - 1):
        raise Unusable(f"{column} exceeds {LIMITS.get(column, 2**31 - 1):,}")
    return int(value)


def run_of(row: Row, accounting: Accounting, zero_default: int = 0) -> Run:
    """The row as a run of an engine. Raises Unusable."""
    if row.get("plan"):
        plan = measured.plan_of(row["plan"])
        return Run(plan.model, plan.job, plan.layout, plan.cluster.gpus, plan.layout.microbatches(plan.job))
    if "lora" in (row.get("model_name", "") + row.get("notes", "")).lower():
        raise Unusable("adapter training (LoRA)")
    if row.get("row_kind") == "layer_micro":
        raise Unusable("a single layer, not a step")
    try:
        model = model_of(row)
        job = Job(
            seq_len=whole(row, "seq_len"), global_batch=whole(row, "global_batch"),
            precision=_precision(row), linears=_linears(row),
        )  # fmt: skip
        layout, gpus, microbatches = _layout(row, model, job, accounting, zero_default)
    except ValidationError as error:
        raise Unusable(f"inconsistent: {error.errors()[0]['msg'].removeprefix('Value error, ')[:80]}") from None
    return Run(model, job, layout, gpus, microbatches)


# ---- model -------------------------------------------------------------------------------------------------------


def model_of(row: Row) -> Model:
    """The model of a row: its columns, and what is known of its family."""
    family = family_of(row.get("model_name", ""))
    if family.missing:
        raise Unusable(f"not modelled: {family.missing}")
    hidden, heads = whole(row, "hidden"), whole(row, "heads")
    gated = (number(row, "gated_mlp") or 0) > 0
    attention = _attention(row, family, hidden, heads)
    width = whole(row, "ffn_hidden", 0 if number(row, "moe_ffn") else 4 * hidden) or None
    layers = _groups(row, family, attention, gated, width)
    learned = not gated and "llama" not in row.get("model_name", "").lower()
    return Model(
        name=row.get("model_name", "").encode("ascii", "replace").decode()[:200] or "model",
        hidden=hidden,
        vocab=_vocabulary(row),
        norm="rmsnorm" if gated else "layernorm",
        positions="learned" if learned else "rotary",
        max_positions=whole(row, "seq_len") if learned else None,
        tied_embeddings=(number(row, "tied_embeddings") or 0) > 0,
        layers=layers,
    )


def _vocabulary(row: Row) -> int:
    """Vocabulary rows. Where tp does not divide the stated ones they were padded, to 128 tp as Megatron does."""
    vocab, tp = whole(row, "vocab"), whole(row, "tp")
    return vocab if vocab % tp == 0 else -(-vocab // (128 * tp)) * 128 * tp


def _attention(row: Row, family: Family, hidden: int, heads: int) -> dict[str, Any]:
    if family.attention.get("kind") == "latent":
        return {"heads": heads, **family.attention}
    kv = whole(row, "kv_heads", heads)
    stated = number(row, "head_dim")
    head_dim = int(stated) if stated else None if hidden % heads == 0 else hidden // heads
    return {"heads": heads, "kv_heads": kv, "head_dim": head_dim, **family.attention}


def _groups(row: Row, family: Family, attention: dict[str, Any], gated: bool, width: int | None) -> list[LayerGroup]:
    n, experts = whole(row, "layers"), whole(row, "experts", 1)
    kind: Any = "gated" if gated else "gelu"
    expert = whole(row, "moe_ffn", width) if experts > 1 else 0
    dense = Mlp(kind=kind, width=width or expert)
    mlp = dense
    if experts > 1:
        shared = int(family.shared_experts * expert)
        mlp = Mlp(kind=kind, width=expert, experts=experts, top_k=whole(row, "topk"), shared_width=shared)
    result: list[LayerGroup] = []
    for i in range(n):
        routed = experts > 1 and i >= family.dense_first and (i + 1) % family.routed_every == 0
        window = family.window if family.window_every and i % family.window_every == 0 else None
        group = LayerGroup(
            count=1, attention=Attention(**attention, sliding_window=window), mlp=mlp if routed or experts == 1 else dense
        )
        if result and (result[-1].attention, result[-1].mlp) == (group.attention, group.mlp):
            result[-1] = result[-1].model_copy(update={"count": result[-1].count + 1})
        else:
            result.append(group)
    return result


# ---- job ---------------------------------------------------------------------------------------------------------


def _precision(row: Row) -> Any:
    text = (row.get("precision_class") or row.get("precision") or "bf16").lower()
    if "fp32" in text or "float32" in text:
        return "fp32"
    return "fp16" if text == "fp16" else "bf16"


def _linears(row: Row) -> Any:
    text = (row.get("precision_class") or row.get("precision") or "").lower()
    return "fp4" if "fp4" in text else "fp8" if "fp8" in text else "same"


# ---- layout ------------------------------------------------------------------------------------------------------


def _layout(row: Row, model: Model, job: Job, accounting: Accounting, zero_default: int) -> tuple[Layout, int, int]:
    tp, pp, cp = whole(row, "tp"), whole(row, "pp"), whole(row, "cp", 1)
    gpus_stated, dp_stated = number(row, "gpus"), number(row, "dp")
    if gpus_stated is None and dp_stated is None:
        raise Unusable("neither gpus nor dp stated")
    gpus = int(gpus_stated) if gpus_stated else int((dp_stated or 1) * tp * pp * cp)
    if gpus % (tp * pp * cp):
        raise Unusable("gpus is not a multiple of tp x pp x cp")
    dp = int(dp_stated) if dp_stated else gpus // (tp * pp * cp)
    if dp * tp * pp * cp != gpus:
        raise Unusable("tp x pp x cp x dp is not gpus")
    micro = whole(row, "micro_batch")
    vpp = whole(row, "vpp", 1) if pp > 1 else 1
    if whole(row, "ep", 1) > 1 and not any(g.mlp.routed for g, _ in model.kinds):
        raise Unusable("ep without experts")
    if pp * vpp > model.n_layers and not accounting.balanced_stages:
        raise Unusable("more stages than layers")
    stage = number(row, "shard_stage")
    zero = int(stage) if stage is not None else zero_default
    if zero == 3 and pp > 1 and accounting.pipeline_zero is not None:
        zero = accounting.pipeline_zero
    mode = row.get("recompute", "")
    mode = mode if mode in ("selective", "full") else "none"
    by_cost = accounting.balanced_stages and pp > 1
    stages = balanced_stages(model, pp, mode) if by_cost else even_stages(model.n_layers, pp, mode)
    layout = Layout(
        tp=tp, cp=cp, pp=pp, dp=dp, ep=whole(row, "ep", 1), etp=whole(row, "etp", 1),
        zero=zero if dp * cp > 1 or zero >= 2 else 0, micro_batch=micro,
        schedule="none" if pp == 1 else "interleaved" if vpp > 1 else "1f1b", virtual_stages=vpp,
        sequence_parallel=tp > 1 and (number(row, "sp") or 0) > 0, stages=stages,
    )  # fmt: skip
    return layout, gpus, max(1, math.ceil(job.global_batch / (dp * micro)))


def balanced_stages(model: Model, pp: int, recompute: str) -> list[Stage]:
    """Layers cut by cost, the head counted in: a stage takes layers until it passes its share; late ones may get none.

    A layer costs its weights, the head V h: nanotron's rule, which reproduces its published splits (16 layers over 4
    stages: 6, 5, 5, 0).
    """
    layer = sum(count * model.active_params_of(g) for g, count in model.kinds) / model.n_layers
    total = layer * model.n_layers + model.vocab * model.hidden
    ends = [min(model.n_layers, math.floor(total * (r + 1) / pp / layer) + 1) for r in range(pp - 1)] + [model.n_layers]
    counts = [e - b for b, e in zip([0, *ends[:-1]], ends, strict=True)]
    return [Stage(layers=n, recompute=recompute if n else "none") for n in counts]
