"""What an estimate is made of: every term of the step, every byte, every collective, and the figures behind them.

Comes in: a plan with its estimate. Goes out: plain tables (`Detail`) that `report.detail` prints; the numbers are those of
the cost functions, and the lines of a table add up to the estimate, whole nanoseconds and bytes being a line of their own.
"""

from planner.planning.detail.make import detail_of
from planner.planning.detail.tables import KINDS, Bytes, Collective, Detail, Rank, Source, Term

__all__ = ["KINDS", "Bytes", "Collective", "Detail", "Rank", "Source", "Term", "detail_of"]
