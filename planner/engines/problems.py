"""What is wrong with a layout, or with a job, for an engine: the rules it breaks and its list of stages."""

from __future__ import annotations

from planner.cost.task import LayoutArray, Subject, Task
from planner.engines.base import Engine
from planner.engines.rule import values_of
from planner.errors import Problem
from planner.specs.layout import SPLIT_BACKWARD, Layout
from planner.specs.model import Model


def layout_problems(task: Subject | Task, engine: Engine, layout: Layout) -> list[Problem]:
    """Every rule that one layout breaks, and what is wrong with its stages."""
    array = LayoutArray.of([layout], task.job)
    values = values_of(task, layout)
    found = [rule.problem(values) for rule in engine.all_rules if bool(rule.violated(task, array)[0])]
    return found + stage_problems(task.model, layout)


def job_problems(task: Subject | Task, engine: Engine) -> list[Problem]:
    """Rules that no layout of this model and job can satisfy."""
    layout = Layout.model_validate({"stages": [{"layers": task.model.n_layers}]})
    array = LayoutArray.of([layout], task.job)
    broken = [r for r in engine.all_rules if r.whole_job and bool(r.violated(task, array)[0])]
    return [rule.problem(values_of(task, layout)) for rule in broken]


def stage_problems(model: Model, layout: Layout) -> list[Problem]:
    """What is wrong with a layout's list of stages."""
    v, held = layout.virtual_stages, sum(s.layers for s in layout.stages)
    checks = (
        (
            len(layout.stages) != layout.pp, "PLN221",
            f"{len(layout.stages)} stages listed for pp {layout.pp}",
            "stages has one entry a pipeline rank", f"list {layout.pp} stages",
        ),
        (
            held != model.n_layers, "PLN222",
            f"the stages hold {held} layers, {model.name} has {model.n_layers}",
            "every layer belongs to exactly one stage", "correct the stages' layers",
        ),
        (
            any(s.layers < v for s in layout.stages) or any(s.layers % v for s in layout.stages[:-1]), "PLN223",
            "a stage holds no layer" if v == 1 else f"a stage's layers are not a multiple of its {v} chunks",
            "every chunk of a stage holds as many layers, at least one; only the last stage's last chunks may be one short",
            "give each stage but the last a multiple of its chunks, or use fewer chunks",
        ),
        (
            v > 1 and any(max(s.counts) not in (0, s.layers) for s in layout.stages), "PLN224",
            "a stage with chunks is recomputed in part",
            "with virtual stages a stage is recomputed as a whole", "use none, selective or full",
        ),
        (
            layout.schedule in SPLIT_BACKWARD and any(max(s.counts) for s in layout.stages), "PLN584",
            f"recompute with schedule {layout.schedule}",
            "torch repeats a layer for its input gradients, and again for each matrix and norm that gets its weight gradient "
            "(full), or raises an error (selective)", "set recompute: none, or schedule: interleaved",
        ),
    )  # fmt: skip
    return [Problem(code, what, why, fix, field="stages") for broken, code, what, why, fix in checks if broken]
