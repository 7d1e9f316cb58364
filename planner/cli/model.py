"""`planner model`: look at a model, import one."""

from __future__ import annotations

import itertools
import string
from typing import Annotated, Any

import typer

from planner.cli import common

app = typer.Typer(help="Look at a model.", no_args_is_help=True, rich_markup_mode=None)


@app.command("inspect")
@common.guarded
def inspect(
    model: common.ModelArgument,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=1, help="Sequence length for FLOPs a token; the model's own when left out.")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="table, json or yaml (our model file).")] = "table",
    as_type: common.AsType = None,
) -> None:
    """Show sizes, exact total and active parameter counts and FLOPs of a model; with --format yaml, write our model file."""
    from planner.specs import files

    common.checked_format(output_format, ("table", "json", "yaml"))
    loaded, _ = files.load_model(model, as_type=as_type)
    if output_format == "yaml":
        common.write_result(common.to_yaml(loaded.model_dump(mode="json", exclude_none=True, exclude_defaults=True)))
        return
    facts = _facts(loaded, seq_len or loaded.max_positions or 4096)
    if output_format == "json":
        common.write_result(common.to_json({"model": loaded.model_dump(mode="json"), **facts}))
    else:
        _print(loaded, facts)


def _facts(model: Any, seq_len: int) -> dict[str, Any]:
    """Counts of parameters and FLOPs under stable names."""
    return {
        "params": {
            "total": model.total_params,
            "active": model.active_params,
            "embedding": model.embedding_params,
            "positions": model.position_params,
            "front_ends": {front.name: front.params(model.hidden) for front in model.fronts},
            "layers": [_layer_facts(model, group) for group in model.layers],
            "final_norm": model.norm_params,
            "head": model.head_params,
            "multi_token": model.mtp_params,
        },
        "flops_per_token": {
            "seq_len": seq_len,
            "full_attention": model.flops_per_token(seq_len),
            "causal": model.flops_per_token(seq_len, "causal"),
            "full_recompute": model.flops_per_token(seq_len, "recompute"),
        },
    }


def _layer_facts(model: Any, group: Any) -> dict[str, Any]:
    """One group: parameters of each of its layers, and what kind of layer that is."""
    a, m = group.attention, group.mlp
    span = "window" if a.sliding_window else "chunk" if a.chunk else "state" if a.kind == "linear" else "full"
    return {
        "count": group.count,
        "params": model.layer_params_of(group),
        "active_params": model.visited_params_of(group),
        "front_end": group.front.name if group.front else None,
        "attention": a.kind,
        "span": span,
        "span_tokens": a.sliding_window or a.chunk,
        "experts": m.experts if m.routed else 0,
        "top_k": m.top_k if m.routed else 0,
        "shared_width": m.shared_width,
        "what": f"{_attention_text(model, group, span)}; {_mlp_text(group)}",
    }


def _attention_text(model: Any, group: Any, span: str) -> str:
    a = group.attention
    kind = {"softmax": "", "latent": "latent ", "linear": "linear "}[a.kind] + ("" if a.causal else "bidirectional ")
    reach = {"window": f" over {a.sliding_window or 0:,} tokens", "chunk": f" in chunks of {a.chunk or 0:,}"}.get(span, "")
    full = "full " if span == "full" else ""
    kv = "" if a.kind == "latent" else f", {a.kv_heads or a.heads} kv"
    extra = ["no positions"] if model.positions == "rotary" and a.rope_share == 0 and a.causal else []
    extra += [f"norm of q and k over the {a.qk_norm}"] if a.qk_norm != "none" else []
    extra += ["sinks"] if a.sinks else []
    parts = [f"{full}{kind}attention{reach}", f"{a.heads} heads{kv}, width {model.head_dim_of(group)}", *extra]
    return ", ".join(parts)


def _mlp_text(group: Any) -> str:
    m = group.mlp
    if not m.routed:
        text = f"{m.kind} MLP {m.width:,}"
    else:
        shared = f" and shared {m.shared_width:,}" if m.shared_width else ""
        text = f"{m.top_k} of {m.experts} {m.kind} experts {m.width:,}{shared}"
    norms = {"pre": "", "post": "; norms after", "both": "; norms before and after", "shared": "; one norm"}[group.norms]
    return text + norms + ("; parallel" if group.parallel else "")


def _letter(kind: int) -> str:
    """A short name of a kind of layers."""
    return string.ascii_uppercase[kind] if kind < 26 else str(kind + 1)


def _order(model: Any) -> str:
    """The sequence of kinds, folded where it repeats: (5 x A, 1 x B) x 10, 2 x A."""
    runs = [(len(list(same)), _letter(kind)) for kind, same in itertools.groupby(model.kind_of_layer)]

    def text(part: list[tuple[int, str]]) -> str:
        return ", ".join(f"{count} x {kind}" for count, kind in part)

    for period in range(1, len(runs) // 2 + 1):
        times = 1
        while runs[times * period : (times + 1) * period] == runs[:period]:
            times += 1
        if times > 1 and len(runs) - times * period <= period:
            rest = text(runs[times * period :])
            return f"({text(runs[:period])}) x {times}" + (f", {rest}" if rest else "")
    return text(runs)


def _print(model: Any, facts: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from planner.report.terminal import console
    from planner.units import count

    out = console()
    params, flops = facts["params"], facts["flops_per_token"]
    total, active = params["total"], params["active"]
    used = f", {active:,} active ({count(active)})" if active != total else ""
    out.print(f"[bold]{escape(model.name)}[/]  {total:,} parameters ({count(total)}){used}")
    if model.source:
        out.print(f"[dim]{escape(model.source)}[/]")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("part", "parameters", "what"):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    for row in _rows(model, params):
        table.add_row(*map(escape, row))
    out.print(table)
    if len(model.kinds) > 1:
        out.print(f"order of layers: {_order(model)}")
    out.print(
        f"FLOPs a token at sequence {flops['seq_len']:,}, forward and backward: {flops['full_attention']:.3e} "
        f"(full attention), {flops['causal']:.3e} (causal), {flops['full_recompute']:.3e} (full recompute)"
    )


def _rows(model: Any, params: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Part, parameters, and what it is: the layers by kind."""
    rows = [("embedding", f"{params['embedding']:,}", f"vocabulary {model.vocab:,} x hidden {model.hidden:,}")]
    if params["positions"]:
        rows.append(("positions", f"{params['positions']:,}", f"learned, {model.max_positions:,}"))
    for front in model.fronts:
        what = f"width {front.hidden:,}, {front.tokens:,} tokens a sequence, {front.merge} joined; embedding and projector"
        rows.append((front.name, f"{params['front_ends'][front.name]:,}", what))
    for i, (group, number) in enumerate(model.kinds):
        of = _layer_facts(model, group)
        letter = f" {_letter(i)}" if len(model.kinds) > 1 else ""
        each = f"{of['params']:,} each" + (f", {of['active_params']:,} active" if of["active_params"] != of["params"] else "")
        whose = f"{of['front_end']}: " if of["front_end"] else ""
        rows.append((f"layers{letter} x {number}", f"{of['params'] * number:,}", f"{each}: {whose}{of['what']}"))
    rows.append(("final norm", f"{params['final_norm']:,}", model.norm))
    rows.append(("head", f"{params['head']:,}", "tied to the embedding" if model.tied_embeddings else ""))
    if model.mtp:
        modules = f"{model.mtp} multi-token module{'s' if model.mtp > 1 else ''}"
        what = f"{modules}, not in the total: a layer, a projection and three norms each"
        rows.append(("multi-token", f"{params['multi_token']:,}", what))
    return rows
