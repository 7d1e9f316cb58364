"""A rule: what a layout must satisfy, as data: search, check, estimate, runtime and documentation use the same."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from planner.cost.task import Bools, LayoutArray, Subject, Task
from planner.engines.predicates import kv_heads
from planner.errors import Problem
from planner.specs.features import features
from planner.specs.layout import Layout

Predicate = Callable[[Subject | Task, LayoutArray], Bools]


@dataclass(frozen=True)
class Rule:
    """One thing that a layout must satisfy. Texts are templates over the layout's, model's and job's values."""

    code: str
    name: str
    """Short: the key of the certificate's histogram."""
    violated: Predicate
    what: str
    why: str
    fix: str
    whole_job: bool = False
    """It looks at the model and the job only: no layout can satisfy it."""
    on: Literal["degrees", "pipeline", "row"] = "row"
    """What of a layout it looks at: tp, cp, pp, dp, ep, etp alone; the schedule and its chunks besides; or anything. The
    search asks it as early as that."""

    def problem(self, values: dict[str, Any]) -> Problem:
        """The finding for one layout's values."""
        what, why, fix = (text.format(**values) for text in (self.what, self.why, self.fix))
        return Problem(self.code, what, why, fix, field=self.field)

    @property
    def field(self) -> str:
        """The first key that its text names: where a finding points to."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.what) if name]
        return next(
            (
                n
                for n in names
                if n not in ("model", "gpus", "heads", "kv_heads", "microbatches", "experts", "features", "base", "type_sizes")
            ),
            "",
        )


def values_of(task: Subject | Task, layout: Layout) -> dict[str, Any]:
    """What a rule's texts may name, for one layout."""
    model, job = task.model, task.job
    return {
        **layout.model_dump(exclude={"stages"}),
        "product": layout.world_size, "shard": layout.dp * layout.cp, "sharded": layout.sharded, "gpus": task.gpus,
        "microbatches": layout.microbatches(job),
        "heads": _listed(a.heads for a in model.attentions), "kv_heads": _listed(kv_heads(model)),
        "dense_width": _listed(m.dense_width for m in model.mlps), "experts": _listed(m.experts for m in model.routed_mlps),
        "features": ", ".join(features(model)),
        "expert_width": _listed(m.width for m in model.routed_mlps), "vocab": model.vocab,
        "n_layers": model.n_layers, "max_positions": model.max_positions, "model": model.name,
        "seq_len": job.seq_len, "global_batch": job.global_batch, "precision": job.precision,
        "base": job.adapter.base if job.adapter else "",
        "type_order": layout.type_order, "context": layout.context, "type_sizes": " and ".join(str(n) for n in task.type_sizes),
    }  # fmt: skip


def _listed(sizes: Iterable[int]) -> str:
    """The distinct sizes of a model's kinds of layers."""
    return " and ".join(str(n) for n in sorted(set(sizes)))
