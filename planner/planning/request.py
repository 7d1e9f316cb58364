"""What is asked: a model, a machine, a job, an engine; read, checked, and made into a task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from planner import planfile
from planner.cost.task import MAX_DEVICES, DeviceType, Task
from planner.engines.base import Engine
from planner.engines.registry import engine_named
from planner.errors import InputError, Problem, input_error
from planner.planfile import Cluster, ClusterType, Inputs, Objective, Plan
from planner.planning.economy import Budget
from planner.search.space import SHORT
from planner.specs import files
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job
from planner.specs.layout import Configuration
from planner.specs.model import Model
from planner.specs.policy import Policy
from planner.specs.projections import projections


@dataclass(frozen=True)
class Request:
    """What is asked: everything but the layout. `model` and `hardware` are names, paths, or spec objects."""

    model: str | Model
    hardware: str | HardwareProfile
    job: Job
    nodes: int | None = None
    gpus: int | None = None
    engine: str = "bundled"
    policy: Policy = field(default_factory=Policy)
    pins: Mapping[str, Sequence[object]] = field(default_factory=dict)
    forbid: Sequence[str] = ()
    objective: Objective = "throughput"
    budget: Budget | None = None
    """How many tokens are to be trained, at what price, by when."""
    relative_to: Path | None = None
    """The folder that paths are relative to, besides the current one."""
    shares: Sequence[tuple[str | HardwareProfile, int]] = ()
    """With two device types: (profile, nodes) of each, in place of `hardware`, `nodes` and `gpus`."""


@dataclass(frozen=True)
class Setting:
    """A request with its files read and checked."""

    task: Task
    engine: Engine
    cluster: Cluster
    inputs: Inputs
    policy: Policy
    budget: Budget | None = None


def checked_objective(name: str) -> Objective:
    """A known objective. Raises InputError."""
    known = get_args(Objective)
    if name not in known:
        raise input_error("PLN107", f"--objective {name}: not an objective", f"objectives are {', '.join(known)}", "")
    return cast(Objective, name)


def prepare(request: Request) -> Setting:
    """Read and check everything that a request names. Raises InputError."""
    model, model_name, model_digest = _load(request.model, request.relative_to, files.load_model)
    engine = engine_named(request.engine)
    machine = _machine(request)
    hardware, gpus = machine.profiles[0], sum(machine.gpus)
    _check_size(model, request.job, machine.profiles, gpus)
    _check_adapter(model, request.job)
    policy = request.policy
    task = Task(model, request.job, hardware, gpus, engine.accounting, policy.max_memory_fraction, policy.max_oom_probability)
    task = replace(task, types=machine.types)
    cluster = _cluster(task, machine)
    job_digest = _digest(planfile.canonical(request.job.model_dump(mode="json")))
    names = ("hardware", "second_hardware")
    digests = {"model": model_digest, **dict(zip(names, machine.digests, strict=False)), "job": job_digest}
    contents = planfile.content_digests(model, hardware, request.job, *machine.profiles[1:])
    pins = {SHORT.get(name, name): _ordered(values) for name, values in request.pins.items()}
    inputs = Inputs(
        model=model_name, **dict(zip(names, machine.names, strict=False)), digests=digests, contents=contents,
        pins=dict(sorted(pins.items())),
        forbidden=sorted({SHORT.get(name, name) for name in request.forbid}),
    )  # fmt: skip
    return Setting(task, engine, cluster, inputs, policy, request.budget)


@dataclass(frozen=True)
class _Machine:
    """The profiles of a cluster, one or two, with the nodes and devices of each."""

    profiles: tuple[HardwareProfile, ...]
    names: tuple[str, ...]
    digests: tuple[str, ...]
    nodes: tuple[int, ...]
    gpus: tuple[int, ...]

    @property
    def types(self) -> tuple[DeviceType, ...]:
        """The device types for a task: none where there is only one."""
        return tuple(map(DeviceType, self.profiles, self.gpus)) if len(self.profiles) > 1 else ()


def _machine(request: Request) -> _Machine:
    """The profiles and sizes that a request names. Raises InputError."""
    if request.shares:
        return _two_types(request)
    hardware, name, digest = _load(request.hardware, request.relative_to, files.load_hardware)
    nodes, gpus = _devices(request.nodes, request.gpus, hardware)
    return _Machine((hardware,), (name,), (digest,), (nodes,), (gpus,))


def _two_types(request: Request) -> _Machine:
    """The same of two device types, which must fit together. Raises InputError."""
    if len(request.shares) != 2:
        what = f"{len(request.shares)} device types"
        raise input_error("PLN150", what, "a cluster has one or two", "name two profiles, each with its nodes")
    if request.nodes is not None or request.gpus is not None:
        fix = "leave out --nodes and --gpus: write --hardware h100-sxm:4 --hardware a100-80gb-sxm:4"
        raise input_error("PLN151", "--nodes or --gpus beside two device types", "each type has nodes of its own", fix)
    loaded = [_load(profile, request.relative_to, files.load_hardware) for profile, _ in request.shares]
    profiles, names, digests = zip(*loaded, strict=True)
    sizes = [_devices(nodes, None, h) for (_, nodes), h in zip(request.shares, profiles, strict=True)]
    found = _Machine(profiles, names, digests, *zip(*sizes, strict=True))
    _check_types(found)
    return found


def _check_types(found: _Machine) -> None:
    """What two device types must share to be one cluster. Raises InputError."""
    (a, b), total = found.profiles, sum(found.gpus)
    if a.name == b.name:
        fix = f"write --hardware {a.name} --nodes {sum(found.nodes)}"
        raise input_error("PLN152", f"both device types are {a.name}", "that is one type", fix)
    if a.node_size != b.node_size:
        what = f"nodes of {a.node_size} and of {b.node_size} devices"
        why = f"every node starts as many processes, {a.name} and {b.name} have other nodes"
        raise input_error("PLN153", what, why, "use types with equal nodes, or a profile of nodes used in part")
    if a.device.kind != b.device.kind:
        why = "one process group needs one collective library"
        raise input_error("PLN155", f"{a.name} is {a.device.kind}, {b.name} is {b.device.kind}", why, "use devices of one kind")
    for h in (a, b):
        if h.max_devices is not None and total > h.max_devices:
            why = f"the last network tier of {h.name} ends at {h.max_devices}: nothing joins it to the other type"
            raise input_error("PLN156", f"{total} devices of two types", why, "use a profile whose last tier has no size")
    if total > MAX_DEVICES:
        raise input_error("PLN131", f"{total:,} devices: at most {MAX_DEVICES:,} are planned", "", "use fewer nodes")


def _cluster(task: Task, machine: _Machine) -> Cluster:
    """The machine as a plan records it. Raises InputError when a profile lacks the job's precision."""
    first = machine.profiles[0]
    types = [
        ClusterType(
            hardware=t.hardware.name, nodes=nodes, gpus=t.gpus, device=t.hardware.device.name, peak_flops=task.on(i).peak
        )
        for i, (t, nodes) in enumerate(zip(task.types, machine.nodes, strict=False))
    ]
    return Cluster(
        hardware=" + ".join(h.name for h in machine.profiles),
        nodes=sum(machine.nodes),
        gpus=task.gpus,
        node_size=first.node_size,
        device=" + ".join(h.device.name for h in machine.profiles),
        device_kind=first.device.kind,
        peak_flops=task.peak,
        types=types,
    )


def one_type(request: Request, what: str) -> None:
    """Refuse what is not defined, or not there yet, for two device types. Raises InputError."""
    if request.shares:
        raise input_error("PLN154", f"{what} with two device types", "it is for clusters of one type", "name one profile")


def _ordered(values: Sequence[object]) -> list[Any]:
    """Values of a pin in ascending order, whole numbers as such: texts from a command line and numbers are the same pin."""
    plain = {int(v) if isinstance(v, str) and v.isascii() and v.isdigit() else v for v in values}
    return sorted(plain, key=lambda v: (isinstance(v, str), v if isinstance(v, (int, str)) else str(v)))


LONGEST_STEP_DAYS = 10
"""Steps that take longer at the peak rate are refused: the search counts nanoseconds in 64 bits."""


def _check_size(model: Model, job: Job, profiles: Sequence[HardwareProfile], gpus: int) -> None:
    """Refuse jobs whose single step is absurdly long. Raises InputError."""
    peak = min(max(f.base for f in hardware.device.peak.values()) for hardware in profiles)
    days = model.flops_per_token(job.seq_len) * job.tokens_per_step / (peak * gpus) / 86400
    if not days < LONGEST_STEP_DAYS:
        what = f"one step of this job takes {days:,.0f} days at the peak rate of {gpus} devices"
        fix = "check seq_len (tokens) and global_batch (sequences)"
        raise input_error("PLN133", what, f"steps of {LONGEST_STEP_DAYS} days or more are not planned", fix)


def _check_adapter(model: Model, job: Job) -> None:
    """Refuse an adapter for parts that the model does not have. Raises InputError."""
    present = {p.target for group in model.layers for p in projections(model, group)}
    missing = [t for t in (job.adapter.targets if job.adapter else ()) if t not in present]
    # Left-out targets are attention and mlp: a model whose MLP is all routed experts has attention alone.
    if "experts" in missing or (missing and len(missing) == len(job.adapter.targets if job.adapter else ())):
        what = f"the adapter targets {', '.join(missing)}, and {model.name} has none"
        raise input_error("PLN134", what, f"its matrices are {', '.join(sorted(present))}", "choose among these targets")


def _load(reference: Any, folder: Path | None, loader: Any) -> tuple[Any, str, str]:
    """(object, name for the plan, digest) from a reference or an object."""
    if isinstance(reference, Path):
        reference = str(reference)
    if not isinstance(reference, str):
        if not isinstance(reference, (Model, HardwareProfile)):
            raise input_error("PLN107", f"{reference!r} is not a name, a path or a spec object", "", "")
        return reference, reference.name, _digest(planfile.canonical(reference.model_dump(mode="json")))
    loaded, document = loader(reference, folder)
    # A plan file must not depend on where its inputs lay: names only, the digest tells whether they changed.
    return loaded, loaded.name, document.digest


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _devices(nodes: int | None, gpus: int | None, hardware: HardwareProfile) -> tuple[int, int]:
    """(nodes, devices) from either of them. Raises InputError."""
    if (nodes is None) == (gpus is None):
        raise input_error(
            "PLN131", "give --nodes or --gpus, one of them", "", f"for example --nodes 8 ({hardware.node_size} devices each)"
        )
    for flag, value in (("nodes", nodes), ("gpus", gpus)):
        if value is not None and value < 1:
            raise input_error("PLN131", f"--{flag} {value}: a cluster has at least one", "", f"give --{flag} 1 or more")
    if gpus is not None:
        nodes = -(-gpus // hardware.node_size)
    else:
        assert nodes is not None
        gpus = nodes * hardware.node_size
    assert nodes is not None
    if gpus > MAX_DEVICES:
        raise input_error("PLN131", f"{gpus:,} devices: at most {MAX_DEVICES:,} are planned", "", "check --nodes and --gpus")
    if gpus > hardware.node_size and gpus % hardware.node_size:
        why = f"{hardware.name} has {hardware.node_size} devices a node, and every node starts as many processes"
        raise input_error("PLN131", f"{gpus} devices are not whole nodes", why, f"use a multiple of {hardware.node_size}")
    limit = hardware.max_devices
    if limit is not None and gpus > limit:
        raise input_error(
            "PLN132",
            f"{gpus} devices exceed the {limit} that {hardware.name} joins",
            "its last network tier ends there",
            "add a tier, or use fewer",
        )
    return nodes, gpus


def request_of(configuration: Configuration, folder: Path) -> Request:
    """The request in a configuration file."""
    c = configuration
    shares = () if isinstance(c.hardware, str) else tuple((share.profile, share.nodes) for share in c.hardware)
    hardware = c.hardware if isinstance(c.hardware, str) else ""
    return Request(c.model, hardware, c.job, c.nodes, c.gpus, c.engine, c.policy, relative_to=folder, shares=shares)


def task_of_plan(plan: Plan) -> tuple[Task, Engine]:
    """Task and engine of a plan file. Raises InputError for an unknown engine."""
    engine = engine_named(plan.engine)
    policy, gpus = plan.policy, plan.cluster.gpus
    task = Task(
        plan.model, plan.job, plan.hardware, gpus, engine.accounting, policy.max_memory_fraction, policy.max_oom_probability,
        types=device_types(plan),
    )  # fmt: skip
    return task, engine


def device_types(plan: Plan) -> tuple[DeviceType, ...]:
    """The device types of a plan: none where there is only one."""
    return tuple(DeviceType(h, t.gpus) for h, t in zip(plan.profiles, plan.cluster.types, strict=False))


def request_of_plan(plan: Plan, folder: Path | None = None, budget: Budget | None = None) -> Request:
    """What a plan answers, less its layout: the same model, job and machine."""
    shares = [(h, t.nodes) for h, t in zip(plan.profiles, plan.cluster.types, strict=False)]
    return Request(
        plan.model, plan.hardware, plan.job, gpus=None if shares else plan.cluster.gpus, engine=plan.engine,
        policy=plan.policy, budget=budget, relative_to=folder, shares=shares,
    )  # fmt: skip


def build_spec(spec: Any, data: dict[str, Any], place: str) -> Any:
    """A spec from flags or arguments; errors name the flag. Raises InputError."""
    try:
        return spec.model_validate(data)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            name = ".".join(str(p) for p in e["loc"])
            if e["loc"][:1] == ("adapter",):
                name = "lora_" + ".".join(str(p) for p in e["loc"][1:2])
            flag = f"--{name.replace('_', '-')}" if name else place
            message = e["msg"].removeprefix("Value error, ")
            problems.append(Problem("PLN107", f"{flag} {e.get('input')!r}: {message[:1].lower()}{message[1:]}"))
        raise InputError(problems) from None
