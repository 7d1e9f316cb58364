"""Is a plan or a configuration feasible? Rules with stable codes, findings with places.

Comes in: a file. Goes out: a `CheckResult` with findings (code, file:line:col, numbers, fix) and what was checked.
"""
