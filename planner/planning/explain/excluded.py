"""What the proof left out: a plan's certificate as a histogram in words."""

from __future__ import annotations

import re

from planner.cost.task import Task
from planner.engines.base import Engine
from planner.engines.rule import Rule, values_of
from planner.planfile import Space
from planner.planning.explain.answers import Excluded
from planner.specs.layout import Layout

_FREE = (
    "tp", "cp", "pp", "dp", "ep", "etp", "zero", "micro_batch", "schedule", "virtual_stages", "sequence_parallel", "offload",
    "order", "context",
)  # fmt: skip
"""What differs between layouts: a rule's text leaves these values out."""


def excluded(task: Task, engine: Engine, layout: Layout, space: Space) -> list[Excluded]:
    """How many layouts each reason settled, the most frequent rules first."""
    rules = {rule.name: rule for rule in engine.all_rules}
    found = [
        _line("rule", n, space, rule_words(task, layout, rules[name]) if name in rules else name, name, rules.get(name))
        for name, n in sorted(space.rules.items(), key=lambda item: (-item[1], item[0]))
    ]
    found.append(_line("memory", space.by_memory, space, "no split of the layers and no recompute fits: decided exactly"))
    found.append(_line("bound", space.by_bound, space, "slower by a lower bound than a plan that was found"))
    found.append(_line("solved", space.exact, space, "solved exactly: the plan, its runners-up, and what they beat"))
    found.append(_line("open", space.open, space, "not settled: the search ended early"))
    return [e for e in found if e.layouts]


def _line(reason: str, n: int, space: Space, words: str, name: str | None = None, rule: Rule | None = None) -> Excluded:
    data = {
        "reason": reason, "rule": name, "code": rule.code if rule else None, "layouts": n, "share": n / space.enumerated,
        "words": words,
    }  # fmt: skip
    return Excluded.model_validate(data)


def rule_words(task: Task, layout: Layout, rule: Rule) -> str:
    """A rule's own reason; its finding without one layout's values where the reason is made of them."""
    values = values_of(task, layout) | dict.fromkeys(_FREE, "")
    text = rule.what if "{" in rule.why else rule.why
    return re.sub(r"\s+", " ", text.format(**values)).strip()
