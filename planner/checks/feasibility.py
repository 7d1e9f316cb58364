"""The feasibility gate: schema, divisibility, engine rules, memory of every stage.

A file is a plan (made by `planner plan`) or a configuration (a layout that a person wrote, with its model and job).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from planner import planfile
from planner.engines.base import layout_problems
from planner.errors import InputError, Location, Problem, input_error
from planner.planfile import Estimate
from planner.planning.estimate import estimate_layout
from planner.planning.make import limit_text
from planner.planning.request import Setting, prepare, request_of, task_of_plan
from planner.specs import files, huggingface
from planner.specs.layout import Configuration, Layout
from planner.specs.policy import Policy


@dataclass(frozen=True)
class CheckResult:
    """One file: what was found, the rules that were looked at, and the estimate when there is one."""

    file: str
    kind: str
    """plan, configuration, or unreadable."""
    findings: tuple[Problem, ...]
    rules: tuple[str, ...] = field(default=())
    """Codes that were checked."""
    estimate: Estimate | None = None

    @property
    def failed(self) -> bool:
        """Whether an error was found (warnings do not fail a check)."""
        return any(p.severity == "error" for p in self.findings)


def check_file(path: str | Path, max_oom_probability: float | None = None) -> CheckResult:
    """Check one file. Raises InputError when it cannot be read at all (not when it is infeasible).

    `max_oom_probability` limits the risk to run out of memory beside what the file's own policy says: the stricter holds.
    """
    document = files.parse_document(path)
    if planfile.is_plan(document.data):
        return _check_plan(document, max_oom_probability)
    return _check_configuration(document, max_oom_probability)


def _stricter(policy: Policy, max_oom_probability: float | None) -> Policy:
    """The policy with the lower of its own and another limit of the risk to run out of memory."""
    limits = [p for p in (policy.max_oom_probability, max_oom_probability) if p is not None]
    return policy.model_copy(update={"max_oom_probability": min(limits, default=None)})


def _check_plan(document: files.Document, max_oom_probability: float | None) -> CheckResult:
    """Rules and memory again, with the profile inside the plan; a note when the shipped profile has changed since."""
    plan = planfile.from_document(document)
    plan = plan.model_copy(update={"policy": _stricter(plan.policy, max_oom_probability)})
    place = Location(document.path, 1, 1)
    task, engine = task_of_plan(plan)
    findings = [p.at(place) for p in layout_problems(task, engine, plan.layout)]
    estimate = plan.estimate if findings else estimate_layout(task, plan.layout)
    for name in _changed_profiles(plan):
        what = f"profile {name} changed since the plan was made"
        findings.append(Problem("PLN601", what, "its digest differs", "plan again", place, severity="warning"))
    findings += _memory_findings(estimate, document, plan.policy)
    rules = tuple(r.code for r in engine.all_rules)
    return CheckResult(document.path, "plan", tuple(findings), (*rules, "PLN301"), estimate)


def _changed_profiles(plan: planfile.Plan) -> list[str]:
    """Shipped profiles of the plan's names that are others now."""
    named = {"hardware": plan.inputs.hardware, "second_hardware": plan.inputs.second_hardware}
    known = files.shipped("hardware_profiles")
    return [
        name
        for part, name in named.items()
        if name in known and files.load_hardware(name)[1].digest != plan.inputs.digests.get(part)
    ]


def _check_configuration(document: files.Document, max_oom_probability: float | None) -> CheckResult:
    _is_configuration(document)
    configuration = files.build(Configuration, document)
    policy = _stricter(configuration.policy, max_oom_probability)
    configuration = configuration.model_copy(update={"policy": policy})
    setting = _prepare(configuration, document)
    problems = layout_problems(setting.task, setting.engine, configuration.layout)
    findings = [p.at(_place(document, p.field)) for p in problems]
    rules = tuple(r.code for r in setting.engine.all_rules)
    estimate = None
    if not findings:
        estimate = estimate_layout(setting.task, configuration.layout)
        findings += _memory_findings(estimate, document, policy)
    return CheckResult(document.path, "configuration", tuple(findings), (*rules, "PLN301"), estimate)


def _is_configuration(document: files.Document) -> None:
    """Say it once when a file is another kind altogether. Raises InputError."""
    data = document.data
    if not isinstance(data, dict) or {"layout", "job", "hardware"} & data.keys():
        return
    kind = (
        "a model" if "layers" in data or huggingface.is_config(data) else "a profile" if "device" in data else "neither of them"
    )
    what = f"check reads plans and configurations, this is {kind}"
    fix = "give a file with model, hardware, nodes, job and layout, or a plan made with planner plan -o"
    raise input_error("PLN117", what, "it has no layout, job or hardware", fix, Location(document.path, 1, 1))


def _prepare(configuration: Configuration, document: files.Document) -> Setting:
    """The configuration's task; problems of what it names point to the key that names it."""
    try:
        return prepare(request_of(configuration, Path(document.path).parent))
    except InputError as error:
        raise InputError([_at_its_key(configuration, document, p) for p in error.problems]) from None


def _at_its_key(configuration: Configuration, document: files.Document, problem: Problem) -> Problem:
    """A problem of a named file or value, at the key that names it unless it lies inside a file that was read."""
    missing = problem.code == "PLN101"
    if problem.location.file and not missing:
        return problem
    keys = {"PLN501": "engine", "PLN131": "nodes", "PLN133": "job"}
    named = configuration.hardware
    profiles = [named] if isinstance(named, str) else [share.profile for share in named]
    about_hardware = (
        "profile" in problem.what
        or problem.code.startswith("PLN15")
        or (missing and problem.location.file.endswith(tuple(name.lstrip("./") for name in profiles)))
    )
    key = keys.get(problem.code, "hardware" if about_hardware else "model")
    return problem.at(files.with_positions(document).location((key,)))


def _place(document: files.Document, name: str) -> Location:
    """Where a layout or job key stands in a configuration."""
    group = "layout" if name in Layout.model_fields or not name else "job"
    located = files.with_positions(document)
    return located.location((group, name) if name else (group,))


def _memory_findings(estimate: Estimate, document: files.Document, policy: Policy) -> list[Problem]:
    """One finding a stage that does not fit: the numbers, the limit that binds, the largest parts, what to change."""
    located = None
    found = []
    for stage in estimate.memory.stages:
        if stage.headroom >= 0:
            continue
        located = located or files.with_positions(document)
        parts = {n: getattr(stage, n) for n in PARTS}
        largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
        limit = estimate.memory.limit_gib if stage.limit_gib is None else stage.limit_gib
        source = limit_text(estimate.memory, policy) if stage.hardware is None else f"that of {stage.hardware}"
        what = f"stage {stage.stage} needs {stage.total:.1f} GiB, limit {limit:.1f} GiB"
        why = f"{', '.join(f'{name} {size:.1f}' for name, size in largest)} GiB; {stage.cause}; the limit is {source}"
        fix = f"free {-stage.headroom:.1f} GiB: {_remedy(largest[0][0])}"
        place = located.location(("layout", "stages", stage.stage))
        found.append(Problem("PLN301", what, why, fix, place, field="stages"))
    return found


PARTS = ("params", "grads", "optimizer", "activations", "buffers", "transient", "outside")
"""Parts of a rank's memory that findings name."""


def _remedy(part: str) -> str:
    """The edit that usually shrinks a part."""
    return {
        "params": "raise tp or pp, or zero to 3",
        "grads": "raise zero to 2, or tp or pp",
        "optimizer": "raise zero to 1, or tp or pp",
        "activations": "recompute more (selective, full), lower micro_batch, or raise tp",
        "buffers": "use fewer micro-batches (larger micro_batch) or another schedule",
        "outside": "use a device with more memory: the driver and communicators hold this much",
        "transient": "raise tp (it splits the logits), or lower micro_batch",
    }[part]
