"""Lines of compute: a layer's products, attention and streams, what recompute repeats, the embedding and the head."""

from __future__ import annotations

import numpy as np

from planner.cost import adapters, operators, traffic
from planner.cost.operators import Product, Shapes
from planner.cost.task import Task
from planner.planning.detail.case import Kind
from planner.planning.detail.lines import FORMULAS, GEMM, STREAM, STREAMED, Lines
from planner.planning.detail.tables import Inputs
from planner.specs.layout import RECOMPUTE_MODES, SPLIT_BACKWARD


def layer_lines(lines: Lines, kind: Kind, direction: int, times: float) -> None:
    """The compute of one layer, forward (0) or backward (1)."""
    bound = _bound(kind, direction)
    for product in operators.layer_products(kind.task, kind.shapes, direction):
        seconds, inputs, figures = _product(kind.task, product)
        lines.add("compute", kind.label + product.name, seconds, times, GEMM, inputs, figures, bound)
    _dequantise_line(lines, kind, direction, times, bound)
    _attention_line(lines, kind, direction, times, bound)
    _stream_line(lines, kind, direction, times, bound)
    _host_line(lines, kind, direction, times, bound)


def _bound(kind: Kind, direction: int) -> str:
    """Whether the device or the host decides how long a layer takes; a CPU is both, and launching adds to its time."""
    if kind.task.hardware.device.kind == "cpu":
        return "device"
    device = (kind.seconds.forward, kind.seconds.backward)[direction]
    return "host" if float(kind.compute[direction][0]) > float(device[0]) else "device"


def _product(task: Task, p: Product) -> tuple[float, Inputs, tuple[str, ...]]:
    """(seconds, inputs, figures) of a product."""
    seconds = operators.sustained(task) * float(operators.product_seconds(task, p)[0])
    m, n, k, groups = (float(np.ravel(size)[0]) for size in (p.m, p.n, p.k, p.groups))
    inputs: Inputs = {name: round(v, 3) for name, v in (("M", m), ("N", n), ("K", k), ("count", groups))}
    inputs["FLOP/s reached"] = 2.0 * m * n * k * groups / seconds
    figures = _product_figures(task, p.narrow)
    if p.times != 1.0:
        inputs["slower"] = p.times
        figures = (*figures, "engine.wgrad")
    if float(operators.unaligned_head_seconds(task, p).max()) > 0.0:
        figures = (*figures, "code.ODD_RATE")
    return seconds, inputs, figures


def _product_figures(task: Task, narrow: bool) -> tuple[str, ...]:
    """The figures behind products; the head's and the adapters' are never in a narrow type."""
    peak = f"device.peak.{task.job.precision}"
    base = ("device.gemm", "device.sustained", peak, "device.memory_bandwidth", "constant.compute", "engine.product_times")
    if not narrow or task.job.linears == "same":
        return base
    return (*base, f"device.peak.{task.job.linears}", "code.NARROW_SHARE", "constant.narrow")


def _dequantise_line(lines: Lines, kind: Kind, direction: int, times: float, bound: str) -> None:
    """Copies of a quantised base in the compute type."""
    seconds = sum(float(adapters.dequantise_seconds(kind.task, kind.shapes, experts)[0]) for experts in (False, True))
    if seconds:
        name = f"{kind.label}dequantisation of the base: {('forward', 'backward')[direction]}"
        lines.add("compute", name, seconds, times, STREAM, {}, (*STREAMED, "constant.elementwise"), bound)


def _attention_line(lines: Lines, kind: Kind, direction: int, times: float, bound: str) -> None:
    """Attention itself."""
    task, word = kind.task, ("forward", "backward")[direction]
    seconds = float(operators.layer_parts(task, kind.shapes, direction)["attention"][0])
    figures, inputs = _attention_inputs(task, kind.shapes)
    formula = FORMULAS[task.accounting.attention]
    lines.add("compute", f"{kind.label}attention: {word}", seconds, times, formula, inputs, figures, bound)


def _attention_inputs(task: Task, s: Shapes) -> tuple[tuple[str, ...], Inputs]:
    """(figures, inputs) of attention."""
    a, model, length = task.accounting, task.model, task.job.seq_len
    inputs: Inputs = {
        "sequences": float(s.micro_batch[0]), "queries": length / float(s.cp[0]), "keys": length,
        "heads": model.heads / float(s.tp[0]), "head_dim": model.attention_dim_of(model.layer),
    }  # fmt: skip
    if (window := model.layer.attention.sliding_window) and a.windows:
        inputs["window"] = window
    figures = ["device.sustained", f"device.peak.{task.job.precision}", "constant.compute"]
    if a.attention == "unfused":
        figures += ["code.UNFUSED_RATE", "engine.score_bytes", *STREAMED]
        return tuple(figures), inputs
    if a.ring_rate is not None and bool(s.ring[0]):
        figures.append("engine.ring_rate")
        inputs["FLOP/s of a unit at most"] = a.ring_rate[0]
    if a.attention_rate != 1.0:
        figures.append("engine.attention_rate")
        inputs["rate over the profile's"] = a.attention_rate
    return ("device.attention", *figures), inputs


def _stream_line(lines: Lines, kind: Kind, direction: int, times: float, bound: str) -> None:
    """Norms, activations, residuals: kernels that only move memory."""
    task, word, d = kind.task, ("forward", "backward")[direction], kind.task.hardware.device
    seconds = float(operators.layer_parts(task, kind.shapes, direction)["elementwise"][0])
    moved = seconds / task.constant("elementwise") * d.memory_bandwidth.base * d.memory_efficiency.base
    inputs: Inputs = {"bytes": moved, "tokens": float(kind.shapes.tokens[0])}
    figures = (*STREAMED, f"engine.elementwise_{word}", "constant.elementwise", *_routing_figures(task))
    if bool(kind.shapes.ring[0]) and any(map(any, task.accounting.ring_merge)):
        figures = (*figures, "engine.ring_merge")
    name = f"{kind.label}norms, activations, residuals: {word}"
    lines.add("compute", name, seconds, times, STREAM, inputs, figures, bound)


def _routing_figures(task: Task) -> tuple[str, ...]:
    """The figures behind what moves routed rows, beside the elementwise bytes."""
    a = task.accounting
    if not task.model.layer.mlp.routed:
        return ()
    padded = ("engine.padding_bytes",) if a.padding_bytes and task.job.linears != "same" else ()
    return (*padded, *(("engine.expert_slots",) if a.expert_slots != 1.0 else ()))


def _host_line(lines: Lines, kind: Kind, direction: int, times: float, bound: str) -> None:
    """What the host adds to a layer that it cannot launch as fast as the device runs it."""
    t, task, word = kind.seconds, kind.task, ("forward", "backward")[direction]
    device, host = float(getattr(t, word)[0]), float(getattr(t, f"host_{word}")[0])
    if direction == 1 and lines.c.layout.schedule in SPLIT_BACKWARD:
        _split_line(lines, kind, times, bound)
        return
    gathers = float(traffic.gather_host(task, np.array([lines.c.rule]), direction)[0])
    beside = float((getattr(t, f"tp_{word}") + getattr(t, f"cp_{word}"))[0])
    routed = task.model.layer.mlp.routed
    loops = routed and any(task.accounting.kernels_expert)
    narrow = task.job.linears != "same" and any(task.accounting.kernels_narrow)
    tp = lines.c.layout.tp > 1
    there = (("gather", gathers > 0), ("tp", tp), ("narrow", narrow), ("routed", routed), ("expert", loops))
    more = tuple(f"engine.kernels_{name}" for name, present in there if present)
    figures = ("device.launch", f"engine.kernels_{word}", "constant.host", *more)
    inputs: Inputs = {"device s": device, "host s": host + gathers, "traffic beside it s": beside}
    rest = float(kind.compute[direction][0]) - device
    lines.add("compute", f"{kind.label}host floor: {word}", rest, times, FORMULAS["host"], inputs, figures, bound)


def _split_line(lines: Lines, kind: Kind, times: float, bound: str) -> None:
    """What running a layer's backward in two halves adds to the device's time of the whole."""
    halves, whole = (
        traffic.split_compute(kind.task, lines.c.x, kind.seconds, np.zeros(1, dtype=np.int64)),
        kind.seconds.backward,
    )
    inputs: Inputs = {
        "for inputs s": float(halves[0][0]), "for weights s": float(halves[1][0]), "whole on the device s": float(whole[0]),
    }  # fmt: skip
    figures = ("device.launch", "engine.kernels_split", "engine.split_bytes", "constant.host", *STREAMED)
    rest = float((halves[0] + halves[1] - whole)[0])
    lines.add("compute", f"{kind.label}backward in two halves", rest, times, FORMULAS["split"], inputs, figures, bound)


def recompute_lines(lines: Lines, kind: Kind, k: int, times: float) -> None:
    """Compute that selective (0) or full (1) recompute repeats."""
    task, label = kind.task, f"{kind.label}{RECOMPUTE_MODES[k + 1]} recompute"
    forward, figures = operators.layer_parts(task, kind.shapes, 0), _part_figures(task, kind.shapes)
    parts = operators.repeated_parts(task, kind.shapes, RECOMPUTE_MODES[k + 1], forward)
    words, listed = {"gemm": "products", "experts": "experts' products"}, 0.0
    for part, share in task.accounting.recomputed[RECOMPUTE_MODES[k + 1]].items():
        seconds = share * float(parts[part][0])
        listed += seconds
        if seconds:
            inputs: Inputs = {"share of forward": share}
            behind = (*figures[part], "engine.recomputed")
            name = f"{label}: {words.get(part, part)}"
            lines.add("recompute", name, seconds, times, FORMULAS["recompute"], inputs, behind)
    rest = float(kind.seconds.recompute[k][0]) - listed
    host, bound = ("device.launch", "engine.kernels_forward", "constant.host"), "host" if rest > 1e-12 else "device"
    lines.add("recompute", f"{label}: host floor", rest, times, FORMULAS["host"], {}, host, bound)
    again = kind.seconds.again(k)
    hidden = float((traffic.recompute_seconds(task, lines.c.x, again, kind.compute[1], kind.traffic) - again)[0])
    if hidden:
        formula = "ZeRO traffic that hides under it and was counted as exposed (planner.cost.traffic.recompute_seconds)"
        lines.add("recompute", f"{label}: traffic behind it", hidden, times, formula, {}, (*lines.c.overlapped, "constant.dp"))


def _part_figures(task: Task, s: Shapes) -> dict[str, tuple[str, ...]]:
    """The figures behind each kind of operator in forward."""
    return {
        "gemm": _product_figures(task, True),
        "experts": _product_figures(task, True),
        "attention": _attention_inputs(task, s)[0],
        "elementwise": (*STREAMED, "engine.elementwise_forward", "constant.elementwise"),
    }


def end_lines(lines: Lines) -> None:
    """Embedding and head, where the slowest rank has them."""
    c, kind = lines.c, lines.c.base
    task, s = kind.task, kind.shapes
    first, last = c.ends(c.slowest)
    if first:
        rows: Inputs = {"tokens": float(s.tokens[0]), "hidden": task.model.hidden}
        lines.add("compute", "embedding", float(kind.seconds.embedding[0]), c.m, STREAM, rows, STREAMED)
    if last:
        listed = 0.0
        for product in operators.head_products(task, s):
            seconds, inputs, figures = _product(task, product)
            lines.add("compute", product.name, seconds, c.m, GEMM, inputs, figures)
            listed += seconds
        _loss_line(lines, kind, float(kind.seconds.head[0]) - listed)


def _loss_line(lines: Lines, kind: Kind, seconds: float) -> None:
    """The loss."""
    task, a = kind.task, kind.task.accounting
    tp = float(kind.shapes.tp[0])
    split, more = (tp, a.loss_traffic_split * (tp > 1)) if a.logits_split else (1.0, 0.0)
    inputs: Inputs = {
        "tokens": float(kind.shapes.tokens[0]), "vocabulary": task.model.vocab / split,
        "bytes each": (a.loss_traffic + more) * task.job.compute_bytes / 2.0,
    }  # fmt: skip
    if a.loss_in_pieces:
        inputs["bytes in all"] = float(operators.loss_bytes(task, kind.shapes)[0])
    figures = (*STREAMED, "engine.loss_traffic", *(("engine.loss_traffic_split",) if more else ()), "constant.elementwise")
    lines.add("compute", "loss", seconds, lines.c.m, STREAM, inputs, figures)
