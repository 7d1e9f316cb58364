"""The plan file: everything that a launcher and the runtime need, and nothing else is read by them.

Comes in: what `planning` assembled, or a file. Goes out: a `Plan`, or its file. Equal inputs give equal bytes: how long the
search took is not part of the file. (The room is not called `plan`, because `planner.plan` is the function.)
"""

from planner.planfile.economy import ComputeOptimal, Economy, Rate, Span
from planner.planfile.estimates import (
    Breakdown,
    Certainty,
    Estimate,
    Memory,
    MemoryInterval,
    StageMemory,
    TimeInterval,
)
from planner.planfile.plan import (
    FORMAT_VERSION,
    TWO_TYPES_VERSION,
    Cluster,
    ClusterType,
    Inputs,
    Plan,
    canonical,
    content_digests,
)
from planner.planfile.proofs import (
    Alternative,
    Certificate,
    Choice,
    CountChoice,
    Declared,
    LowestMemory,
    Objective,
    Space,
)
from planner.planfile.running import refusals
from planner.planfile.store import from_document, is_plan, read, unchecked, write, write_text

__all__ = [
    "FORMAT_VERSION", "TWO_TYPES_VERSION", "Alternative", "Breakdown", "Certainty", "Certificate", "Choice", "Cluster",
    "ClusterType", "ComputeOptimal", "CountChoice", "Declared", "Economy", "Estimate", "Inputs", "LowestMemory", "Memory",
    "MemoryInterval", "Objective", "Plan", "Rate", "Space", "Span", "StageMemory", "TimeInterval", "canonical",
    "content_digests", "from_document", "is_plan", "read", "refusals", "unchecked", "write", "write_text",
]  # fmt: skip
