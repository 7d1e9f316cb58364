"""A second opinion on a plan: everything that its certificate says, checked again from the plan file alone.

Comes in: a plan file. Goes out: a `Report` of checks, each passed, failed or skipped, with figures and the time it took.

Nothing here comes from `planner.search`, which an import contract enforces: the space is enumerated, the rows are tested for
memory, bounded and solved by code of its own. Shared are the cost model (what a layout costs), the engines' rules and
accountings (what a layout may be), and the plan's schema: a mistake in those is the plan's and the check's alike.

`space` enumerates; `memory` says which rows fit; `windows`, `tables`, `chains` and `labels` settle each row; `simulation` runs
the schedule; `layouts` prices the plan; `checks` says what is checked.
"""
