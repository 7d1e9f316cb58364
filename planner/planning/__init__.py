"""Where specs, engines, cost and search meet: what a person named becomes a plan or an estimate.

Comes in: names or files of a model and a profile, a job, an engine, pins. Goes out: a `Plan` (see `planfile`). The command
line and the Python functions both call `make`.
"""
