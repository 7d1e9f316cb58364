"""planner: which parallel configuration should this training job use on this cluster, and does it fit?

A tour:

    import planner

    plan = planner.plan("llama3-70b", "h100-sxm", nodes=8, seq_len=8192, global_batch=512)
    plan.layout             # tp, pp, dp, zero, micro_batch, layers and recompute per stage
    plan.estimate           # step time and memory, broken down, with intervals and the risk to run out of memory
    plan.certificate        # what was proven, over how many layouts
    plan.choice             # why this one, and how many runners-up are too near to tell apart
    plan.to_json()          # the plan file

    planner.explain(plan, why_not={"tp": 8})    # what binds it, what others lose, and why not this one

    planner.estimate("llama3-70b", "h100-sxm", nodes=8, seq_len=8192, global_batch=512,
                     layout={"tp": 8, "pp": 4, "dp": 2, "micro_batch": 1})

    sizes = planner.scale("llama3-70b", "h100-sxm", nodes="8:64:8", seq_len=8192, global_batch=512, tokens="15T",
                          objective="cost")
    sizes.frame             # one row a size: time, efficiency, days, device-hours, cost, energy
    sizes.plan              # the plan of the size that the objective picks; sizes.plans holds all by number of devices

    front = planner.pareto("gpt3-175b", "a100-80gb-sxm", against="memory", gpus=1024, seq_len=2048, global_batch=1536)
    front.frame             # the fastest plan under every memory limit; front.points holds the plans

Errors are `planner.errors.PlannerError`: each carries a code, a place, numbers, and a fix. The rooms, from left to
right: specs (what a person declares), cost (what a layout costs), engines (what executes it), search (which is best, and
the proof), planfile and planning (the plan), checks, launchers, report, cli; and runtime, which trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from planner._version import __version__

if TYPE_CHECKING:
    from planner.errors import Problem
    from planner.planfile import Plan
    from planner.planning.explain import Explanation
    from planner.planning.pareto import Front
    from planner.planning.scale import Scaling
    from planner.specs.hardware import HardwareProfile
    from planner.specs.layout import Layout
    from planner.specs.model import Model

    Shares = Sequence[tuple[str | HardwareProfile, int]]
    """(profile, nodes) of each of two device types."""

__all__ = [
    "__version__", "check", "estimate", "explain", "load_hardware", "load_model", "load_plan", "pareto", "plan", "scale",
]  # fmt: skip


def plan(
    model: str | Model,
    hardware: str | HardwareProfile | Shares,
    *,
    seq_len: int,
    global_batch: int,
    nodes: int | None = None,
    gpus: int | None = None,
    precision: str = "bf16",
    engine: str = "bundled",
    pin: dict[str, Any] | None = None,
    forbid: str | tuple[str, ...] = (),
    max_memory_fraction: float = 0.92,
    max_oom_probability: float | None = None,
    alternatives: int = 4,
    adapter: dict[str, Any] | None = None,
    objective: str = "throughput",
    tokens: str | float | None = None,
    price: float | None = None,
    pue: float | None = None,
    time_limit: float | None = None,
) -> Plan:
    """The proven best plan for a job on a cluster.

    `model` and `hardware` are names of shipped files, paths, or spec objects; `seq_len` in tokens, `global_batch` in
    sequences. Two device types are (profile, nodes) pairs, as in [("h100-sxm", 4), ("a100-80gb-sxm", 4)], without `nodes`.
    `pin` restricts axes, as in {"tp": 8} or {"zero": [1, 2]}. Raises InputError, or InfeasibleError with the binding constraint
    when nothing fits. `alternatives` counts the plans to prove, the best one included; a near tie among
    them that is simpler or leaves more memory is preferred to the fastest (`Plan.choice` says so). Memory is limited by
    `max_memory_fraction` of what the device offers, and by `max_oom_probability` where it is given. `adapter` trains low-rank
    adapters beside a frozen base, as in {"rank": 16, "base": "nf4"} (`planner.specs.adapter.Adapter`).

    `objective`: "throughput" for the fastest layout, "memory" for the one with the lowest peak ("time", "cost" and
    "min-gpus" tell several sizes apart: see `scale`). With `tokens` (a number, or text such as "15T") `Plan.economy` holds
    steps, days, device-hours, cost and energy: `price` in USD of a device-hour (the profile's when left out), `pue` the
    site's energy over that of its devices.

    After `time_limit` (seconds) or a KeyboardInterrupt the plan is the best so far: its certificate says `interrupted`, with
    bound and gap. Raises TimeoutError or KeyboardInterrupt when there is none.
    """
    from planner.planning import make

    limits = {"max_memory_fraction": max_memory_fraction, "max_oom_probability": max_oom_probability}
    request = _request(model, hardware, nodes, gpus, engine, seq_len, global_batch, precision, limits, pin, forbid, adapter)
    request = _aims(request, objective, tokens, price, pue)
    return make.make_plan(request, alternatives, time_limit=time_limit)


def estimate(
    model: str | Model,
    hardware: str | HardwareProfile | Shares,
    *,
    layout: Layout | dict[str, Any],
    seq_len: int,
    global_batch: int,
    nodes: int | None = None,
    gpus: int | None = None,
    precision: str = "bf16",
    engine: str = "bundled",
    max_memory_fraction: float = 0.92,
    max_oom_probability: float | None = None,
    adapter: dict[str, Any] | None = None,
    tokens: str | float | None = None,
    price: float | None = None,
    pue: float | None = None,
) -> Plan:
    """The prediction for one layout: a plan without a certificate.

    `layout` may leave out `dp`, `schedule` and `stages`: they follow from the rest (an even split). `tokens`, `price` and
    `pue`, and `adapter`, as in `plan`. Raises InputError.
    """
    from planner.planning import make
    from planner.planning.request import prepare
    from planner.specs.layout import Layout
    from planner.specs.layoutflags import complete_layout

    limits = {"max_memory_fraction": max_memory_fraction, "max_oom_probability": max_oom_probability}
    request = _request(model, hardware, nodes, gpus, engine, seq_len, global_batch, precision, limits, None, (), adapter)
    request = _aims(request, "throughput", tokens, price, pue)
    if not isinstance(layout, Layout):
        task = prepare(request).task
        layout = complete_layout(layout, task.model, task.gpus)
    return make.make_estimate(request, layout)


def scale(
    model: str | Model,
    hardware: str | HardwareProfile,
    *,
    seq_len: int,
    global_batch: int,
    nodes: str | Iterable[int] | None = None,
    gpus: str | Iterable[int] | None = None,
    precision: str = "bf16",
    engine: str = "bundled",
    pin: dict[str, Any] | None = None,
    forbid: str | tuple[str, ...] = (),
    max_memory_fraction: float = 0.92,
    max_oom_probability: float | None = None,
    alternatives: int = 4,
    objective: str = "throughput",
    tokens: str | float | None = None,
    price: float | None = None,
    pue: float | None = None,
    deadline_days: float | None = None,
    adapter: dict[str, Any] | None = None,
) -> Scaling:
    """Plans of one job for several cluster sizes, and the size that `objective` picks; the global batch stays.

    `nodes` or `gpus`: numbers, or text such as "8,16,32" or "8:64:8". `objective`: "throughput" and "time" for the size
    that trains soonest ("time" may skip sizes that a bound rules out), "cost" for the least device-hours, "min-gpus" for
    the fewest devices that fit. With `deadline_days` (of training `tokens`) later sizes are never picked. Everything else
    as in `plan`. Sizes that do not fit are rows with a reason; `Scaling.require()` raises InfeasibleError when none is
    picked. Raises InputError when every size is refused.
    """
    from planner.planning import scale as scaling

    counts, one, many = _sizes(nodes, gpus, 'for example nodes=[8, 16] or nodes="8:64:8"')
    limits = {"max_memory_fraction": max_memory_fraction, "max_oom_probability": max_oom_probability}
    request = _request(model, hardware, one, many, engine, seq_len, global_batch, precision, limits, pin, forbid, adapter)
    return scaling.scale(_aims(request, objective, tokens, price, pue, deadline_days), counts, alternatives)


def pareto(
    model: str | Model,
    hardware: str | HardwareProfile,
    *,
    against: str,
    seq_len: int,
    global_batch: int,
    points: int = 16,
    nodes: str | Iterable[int] | int | None = None,
    gpus: str | Iterable[int] | int | None = None,
    precision: str = "bf16",
    engine: str = "bundled",
    pin: dict[str, Any] | None = None,
    forbid: str | tuple[str, ...] = (),
    max_memory_fraction: float = 0.92,
    max_oom_probability: float | None = None,
    adapter: dict[str, Any] | None = None,
    tokens: str | float | None = None,
    price: float | None = None,
    pue: float | None = None,
    time_limit: float | None = None,
) -> Front:
    """The plans that no other one beats in both step time and memory, devices or cost; each a proven optimum.

    `against`: "memory" for the fastest plan under each of `points` memory limits, from the highest allowed down to the lowest
    that anything fits under; "gpus" and "cost" for the fastest plan of each of several sizes (`nodes` or `gpus` as in
    `scale`), cost being device-hours, or USD where a price is known. Everything else as in `plan`. Raises InputError,
    InfeasibleError when nothing fits, TimeoutError or KeyboardInterrupt when stopped before the first point.
    """
    from planner.planning import pareto as fronts

    counts, one, many = _sizes(nodes, gpus, "for example gpus=64")
    limits = {"max_memory_fraction": max_memory_fraction, "max_oom_probability": max_oom_probability}
    request = _request(model, hardware, one, many, engine, seq_len, global_batch, precision, limits, pin, forbid, adapter)
    request = _aims(request, "throughput", tokens, price, pue)
    return fronts.pareto(request, fronts.checked_against(against), points, counts, time_limit=time_limit)


def check(path: str, *, max_oom_probability: float | None = None) -> list[Problem]:
    """The findings of a plan or configuration file; empty when it is feasible. Raises InputError for an unreadable one.

    `max_oom_probability` limits the risk to run out of memory; where the file's policy is stricter, that holds.
    """
    from planner.checks.feasibility import check_file
    from planner.planning.request import build_spec
    from planner.specs.policy import Policy

    limit = build_spec(Policy, {"max_oom_probability": max_oom_probability}, "policy").max_oom_probability
    return list(check_file(path, limit).findings)


def explain(plan: Plan, *, why_not: dict[str, Any] | None = None) -> Explanation:
    """Why a plan is what it is: what binds every rank, what runners-up lose, what was excluded, where every rank is.

    `why_not` names another layout by some of its axes, as in {"tp": 8, "zero": [0, 1]}: `Explanation.why_not` then says
    which rules it breaks, what does not fit and what would, or where the best such layout is slower. Times are in seconds,
    sizes in GiB. Raises InputError for an unknown engine, axis or value.
    """
    from planner.planning.explain import explain_plan

    return explain_plan(plan, _listed(why_not))


def load_model(reference: str) -> Model:
    """A model from a shipped name, our YAML, or a Hugging Face config.json. Raises InputError."""
    from planner.specs import files

    return files.load_model(reference)[0]


def load_hardware(reference: str) -> HardwareProfile:
    """A hardware profile from a shipped name or a file. Raises InputError."""
    from planner.specs import files

    return files.load_hardware(reference)[0]


def load_plan(path: str) -> Plan:
    """A plan file. Raises InputError."""
    from planner import planfile

    return planfile.read(path)


def _sizes(
    nodes: str | Iterable[int] | int | None, gpus: str | Iterable[int] | int | None, fix: str
) -> tuple[tuple[int, ...], int | None, int | None]:
    """(all sizes, the first one in nodes or None, in devices or None). Raises InputError unless one of the two is given."""
    from planner.errors import input_error
    from planner.planning.counts import parse_counts

    given = nodes if gpus is None else gpus
    if given is None or (nodes is not None and gpus is not None):
        raise input_error("PLN131", "give nodes or gpus, one of them", "", fix)
    counts = parse_counts(given, "--nodes" if gpus is None else "--gpus")
    return (counts, counts[0], None) if gpus is None else (counts, None, counts[0])


def _aims(
    request: Any, objective: str, tokens: str | float | None, price: float | None, pue: float | None, due: float | None = None
) -> Any:
    """The request with what it is the best for, and its token budget."""
    from dataclasses import replace

    from planner.planning.economy import budget
    from planner.planning.request import checked_objective

    return replace(request, objective=checked_objective(objective), budget=budget(tokens, price, pue, due))


def _request(
    model: Any, hardware: Any, nodes: Any, gpus: Any, engine: str, seq_len: int, global_batch: int,
    precision: str, limits: dict[str, Any], pin: dict[str, Any] | None, forbid: str | tuple[str, ...],
    adapter: dict[str, Any] | None,
) -> Any:  # fmt: skip
    from pathlib import Path

    from planner.errors import input_error
    from planner.planning.request import Request, build_spec
    from planner.specs.hardware import HardwareProfile
    from planner.specs.job import Job
    from planner.specs.policy import Policy

    shares = () if isinstance(hardware, (str, HardwareProfile, Path)) else _shares(hardware)
    job_data = {"seq_len": seq_len, "global_batch": global_batch, "precision": precision, "adapter": adapter}
    job = build_spec(Job, job_data, "job")
    policy = build_spec(Policy, limits, "policy")
    for name, value in (("nodes", nodes), ("gpus", gpus)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise input_error("PLN107", f"{name}: {value!r} is not a whole number", "", "")
    forbid = (forbid,) if isinstance(forbid, str) else tuple(forbid)
    return Request(
        model, "" if shares else hardware, job, nodes, gpus, engine, policy, _listed(pin), forbid, shares=shares
    )  # fmt: skip


def _shares(hardware: Any) -> tuple[tuple[Any, int], ...]:
    """(profile, nodes) of each device type. Raises InputError."""
    from planner.errors import input_error

    try:
        shares = tuple((profile, nodes) for profile, nodes in hardware)
    except (TypeError, ValueError):
        fix = 'give a name, a path, a spec object, or two types: [("h100-sxm", 4), ("a100-80gb-sxm", 4)]'
        raise input_error(
            "PLN107", f"hardware {hardware!r}: not a profile, nor (profile, nodes) of each type", "", fix
        ) from None
    for profile, nodes in shares:
        if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
            raise input_error("PLN157", f"hardware {profile}: {nodes!r} nodes", "each type has a whole number of them", "")
    return shares


def _listed(axes: dict[str, Any] | None) -> dict[str, list[Any]]:
    """Allowed values by axis, where one value may stand for itself."""
    return {k: list(v) if isinstance(v, (list, tuple)) else [v] for k, v in (axes or {}).items()}
