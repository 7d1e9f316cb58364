"""Why this plan, and why not another: what holds every rank, what runners-up lose, conflicts, changes, and places.

Comes in: a plan. Goes out: an `Explanation` (`answers`), typed data that reports print. `make` puts it together from
`ranks` (what binds each pipeline rank), `losses` (runners-up against the plan), `excluded` (what the proof left out),
`whynot` (a layout that a person names), `changes` (what would make it fit), and `places` (meshes and the rank map).
"""

from planner.planning.explain.answers import Explanation, WhyNot
from planner.planning.explain.make import explain_plan

__all__ = ["Explanation", "WhyNot", "explain_plan"]
