"""The bundled PyTorch runtime: it really runs a plan. Start it with `python -m planner.runtime.train PLAN.json`.

Lives here: one decoder family, its parallelisation (tp, pp, ZeRO), the train step and a meter of allocated memory; around the
step a loop with checkpoints, faults, metrics and evaluation; token files, weights of Hugging Face.
Comes in: a plan file and `specs.training.Options`. Goes out: DIR/metrics.jsonl (a step a line), DIR/summary.json, checkpoints.
"""
