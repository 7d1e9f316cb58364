"""`planner model`: look at a model, import one."""

from __future__ import annotations

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
    """Show sizes, exact parameter counts and FLOPs of a model; with --format yaml, write it as our model file."""
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
    layers = [{"count": g.count, "params": model.layer_params_of(g)} for g in model.layers]
    return {
        "params": {
            "total": model.total_params,
            "embedding": model.embedding_params,
            "positions": model.position_params,
            "layers": layers,
            "final_norm": model.norm_params,
            "head": model.head_params,
        },
        "flops_per_token": {
            "seq_len": seq_len,
            "full_attention": model.flops_per_token(seq_len),
            "causal": model.flops_per_token(seq_len, "causal"),
        },
    }


def _print(model: Any, facts: dict[str, Any]) -> None:
    from rich.table import Table

    from planner.report.terminal import console
    from planner.units import count

    out = console()
    params, flops = facts["params"], facts["flops_per_token"]
    out.print(f"[bold]{model.name}[/]  {params['total']:,} parameters ({count(params['total'])})")
    if model.source:
        out.print(f"[dim]{model.source}[/]")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("part", "parameters", "what"):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    table.add_row("embedding", f"{params['embedding']:,}", f"vocabulary {model.vocab:,} x hidden {model.hidden:,}")
    if params["positions"]:
        table.add_row("positions", f"{params['positions']:,}", f"learned, {model.max_positions:,}")
    for group, counted in zip(model.layers, params["layers"], strict=True):
        a = group.attention
        heads = f"{a.heads} heads, {a.kv_heads or a.heads} kv, width {model.head_dim_of(group)}"
        what = f"{heads}; {group.mlp.kind} MLP {group.mlp.width:,}"
        table.add_row(f"layers x {group.count}", f"{counted['params'] * group.count:,}", f"{counted['params']:,} each: {what}")
    table.add_row("final norm", f"{params['final_norm']:,}", model.norm)
    table.add_row("head", f"{params['head']:,}", "tied to the embedding" if model.tied_embeddings else "")
    out.print(table)
    out.print(
        f"FLOPs a token at sequence {flops['seq_len']:,}, forward and backward: {flops['full_attention']:.3e} "
        f"(full attention), {flops['causal']:.3e} (causal)"
    )
