"""The plan under examination, and the task that it was made for."""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost.task import DeviceType, LayoutArray, Task
from planner.engines.base import Engine
from planner.engines.registry import engine_named
from planner.errors import Location, input_error
from planner.planfile import Certificate, Declared, Plan
from planner.specs.layout import RECOMPUTE_MODES, Layout


@dataclass(frozen=True)
class Case:
    """A plan with what its checks need."""

    plan: Plan
    stated_digest: str | None
    task: Task
    engine: Engine
    certificate: Certificate
    declared: Declared

    @property
    def optimum(self) -> Layout:
        """The layout that the certificate is about: the plan's, or the first alternative where another was preferred."""
        preferred = self.plan.choice is not None and self.plan.choice.rule != "fastest"
        return self.plan.alternatives[0].layout if preferred and self.plan.alternatives else self.plan.layout

    @property
    def layouts(self) -> list[Layout]:
        """The plan's layout, then those of the alternatives."""
        return [self.plan.layout, *(a.layout for a in self.plan.alternatives)]

    @property
    def modes(self) -> tuple[int, ...]:
        """Codes of the recompute modes that a layer may have."""
        return tuple(RECOMPUTE_MODES.index(name) for name in self.declared.recompute)


def case_of(plan: Plan, stated_digest: str | None, path: str) -> Case:
    """The case of a plan file. Raises InputError where there is nothing to verify, or not enough to do it."""
    place = Location(path, 1, 1)
    if plan.certificate is None:
        why = "its layout was named by a person, nothing was proven"
        raise input_error("PLN118", "the plan has no certificate", why, "verify a file that planner plan -o wrote", place)
    if plan.certificate.declared is None or plan.certificate.complete is None or plan.certificate.objective_ns is None:
        why = f"format {plan.version} does not record what the proof is about"
        raise input_error("PLN118", "the certificate lacks the declared space", why, "make the plan again", place)
    engine, policy = engine_named(plan.engine), plan.policy
    lowest = plan.certificate.lowest_memory
    task = Task(
        plan.model, plan.job, plan.hardware, plan.cluster.gpus, engine.accounting,
        lowest.fraction if lowest else policy.max_memory_fraction, policy.max_oom_probability,
        types=tuple(DeviceType(h, t.gpus) for h, t in zip(plan.profiles, plan.cluster.types, strict=False)),
    )  # fmt: skip
    return Case(plan, stated_digest, task, engine, plan.certificate, plan.certificate.declared)


Key = tuple[int, int, int, int]


def key_of(layout: Layout) -> Key:
    """(tp, cp, pp, ep), by which alternatives are distinct."""
    return (layout.tp, layout.cp, layout.pp, layout.ep)


def name_of(x: LayoutArray, row: int) -> str:
    """An outer row in one line."""
    names = ("tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "virtual_stages")
    reversed_types = ", second type first" if int(x.type_order[row]) else ""
    ring = ", ring" if int(x.context[row]) else ""
    return ", ".join(f"{n} {int(getattr(x, n)[row])}" for n in names) + ring + reversed_types
