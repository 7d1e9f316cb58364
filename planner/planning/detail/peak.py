"""What lives only at a rank's peak: beside a backward (`peaks.moments`), or when backward ends and the optimizer runs."""

from __future__ import annotations

from planner.cost import adapters, memory, peaks
from planner.cost.peaks import Moment
from planner.cost.task import Task
from planner.planning.detail.held import Held
from planner.planning.detail.tables import Inputs
from planner.specs.layout import RECOMPUTE_MODES
from planner.units import GIB

_CARRIED = "reduction buffer carried from the micro-batch before"
_BESIDE = {
    "head": ("", _CARRIED),
    "layer": ("", _CARRIED),
    "head_reduction": (" beside the reduction of the head", "reduction of the head's unit"),
    "reduction": (" beside the reduction of the one before", "that reduction, beyond its freed activations"),
    "finish": ("", ""),
    "head_finish": ("", ""),
}
"""By moment: its words, and the name of what lies beside the unit's own backward."""

_FINISH = {
    "finish": "gradients and reduction of a layer, beyond its freed activations",
    "head_finish": "gradients and reduction of the head",
}


def peak_lines(held: Held) -> str:
    """What lives only at the peak of backward; the peak in words."""
    c, s = held.c, held.rank
    p, first, last = c.at(s)
    mode = int(c.stages.strongest[s])
    peak, moment = _peak(peaks.moments(p, first, mode), held.peak.headed)
    if peak in _FINISH:
        held.add("transient", _FINISH[peak], int(moment.unit[0]), {}, "engine.zero")
    elif peak == "head":
        _head_lines(held)
    else:
        _layer_lines(held, int(moment.unit[0]) - int(p.transient[0]))
    words, name = _BESIDE[peak]
    beside = int(moment.beside[0])
    held.add("transient", name, beside, {}, "engine.zero")
    rank = "last rank" if last[0] else "first rank" if first[0] else "middle rank"
    unit = f"backward of the head, logits in {_logits_kind(c.task)}" if peak == "head" else "backward of a layer"
    unit = {"finish": "end of a layer's backward", "head_finish": "end of the head's backward"}.get(peak, unit)
    again = f", {RECOMPUTE_MODES[mode]} recompute" if mode else ""
    return f"{rank}, {unit}{words if beside else ''}{again}, {held.flight} in flight"


def _peak(m: peaks.Moments, headed: bool) -> tuple[str, Moment]:
    """The largest of a rank's moments, with its name; the first one of equal ones."""
    head = {"head": m.head, "head_reduction": m.head_reduction, "head_finish": m.head_finish}
    found = (head if headed else {"layer": m.layer}) | {"reduction": m.reduction, "finish": m.finish}
    return max(found.items(), key=lambda item: int(item[1].bytes[0]))


def _logits_kind(task: Task) -> str:
    """The type that the loss works in."""
    return "fp32" if task.accounting.logit_bytes > 4 else task.job.precision


def _head_lines(held: Held) -> None:
    """Temporaries of the head's backward."""
    c, kind = held.c, held.c.base
    heads = int(memory.activation_bytes(kind.task, c.x).head[0])
    a, s = kind.task.accounting, kind.shapes
    parts = {name: float(n[0]) for name, n in memory.head_bytes(kind.task, c.x).items()}
    inputs: Inputs = {
        "tokens": float(s.tokens[0]),
        "bytes a logit": a.logit_bytes if kind.task.job.compute_bytes == 2 else a.logit_bytes_fp32,
        "more where split over tp": a.logit_bytes_split if c.layout.tp > 1 else 0.0,
        "vocabulary": kind.task.model.vocab / (c.layout.tp if a.logits_split else 1),
        **({f"{name}, GiB": n / GIB for name, n in parts.items()} if a.loss_in_pieces else {}),
    }
    figures = ("engine.logit_bytes", "engine.logit_bytes_split", "engine.head_hidden", "engine.head_gathered")
    held.add("transient", f"logits, loss and head inputs ({_logits_kind(kind.task)})", heads, inputs, *figures)
    rest = int(kind.p.head_transient[0]) - heads
    held.add("transient", "gathered parameters and gradient of the head", rest, {}, "engine.zero")


def _layer_lines(held: Held, again: int) -> None:
    """Temporaries of one layer's backward."""
    kind = held.largest("transient")
    temporaries = int(memory.activation_bytes(kind.task, held.c.x).backward[0])
    a, rest = kind.task.accounting, int(kind.p.transient[0]) - temporaries
    inputs: Inputs = {"rows of the MLP width": a.backward_mlp, "rows of hidden": a.backward_hidden}
    figures = ("engine.backward_mlp", "engine.backward_hidden")
    held.add("transient", "temporaries of a layer's backward", temporaries, inputs, *figures)
    copy = int(adapters.dequantised_bytes(kind.task, held.c.x)[0])
    held.add("transient", "dequantised copy of the largest matrix", copy, {})
    held.add("transient", "gathered parameters and gradients of a layer", rest - copy, {}, "engine.zero")
    held.add("transient", "recomputed activations of a layer", again, {}, "engine.saved")


def embedding_lines(held: Held) -> str:
    """What lives beside the states at the embedding's gradient; the moment in words."""
    p, _, _ = held.c.at(held.rank)
    if held.ending == "closing":
        held.add("transient", "reduction of the embedding", int(p.closing[0]), {}, "engine.zero")
        return "end of backward, whole gradients being reduced"
    held.add("transient", "gradient, reduction or next gather of the embedding", int(p.between[0]), {}, "engine.zero")
    return f"first rank, end of a backward: the embedding between two micro-batches, {held.flight} in flight"


def update_lines(held: Held) -> str:
    """What lives beside the states when backward ends; the moment in words."""
    p, first, _ = held.c.at(held.rank)
    unit, last = ("embedding", p.last_embedding) if first[0] else ("last layer", p.last_layer)
    held.add("transient", "reduction buffer of the unit before the last", int(p.last_reduction[0]), {}, "engine.zero")
    held.add("transient", f"gradients and reduction of the {unit}", int(last[0]), {}, "engine.zero")
    return "end of backward and optimizer update"
