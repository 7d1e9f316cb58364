"""What training costs: tokens into steps, days, device-hours, money and energy; and how many tokens would be compute-optimal.

Comes in: a token budget with a price, a PUE and a deadline (`Budget`), and an estimate. Goes out: `Economy` and
`ComputeOptimal` of the plan file. Everything but the number of steps is proportional to the step time, so the step time's
interval carries through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.cost.task import DeviceType
from planner.errors import InputError, Problem, input_error
from planner.planfile import ComputeOptimal, Economy, Estimate, Rate, Span
from planner.specs.figures import Figure, Provenance
from planner.specs.hardware import HardwareProfile
from planner.specs.job import Job
from planner.specs.model import Model
from planner.units import parse_count

TOKENS_PER_PARAM = 20
"""Compute-optimal tokens a parameter: Hoffmann 2022 (arXiv 2203.15556), table 3, 20.0 to 22.4 from 0.4 B to 1 T parameters."""
HOFFMANN = "Hoffmann 2022, arXiv 2203.15556"
MAX_TOKENS = 10**18
DAY, HOUR = 86400.0, 3600.0

NO_PRICE = "no cost: give --price USD per device-hour, or the profile a price"
NO_POWER = "no energy: the profile has no device.power"
BOARD_POWER = "energy is an upper estimate: all devices at board power all the time; hosts and network are not in it"


@dataclass(frozen=True)
class Budget:
    """What is to be trained, and what it may take."""

    tokens: int
    price: float | None = None
    """USD of one device-hour; the profile's when left out."""
    pue: float = 1.0
    """Power usage effectiveness: energy of the whole site over that of the devices."""
    deadline_days: float | None = None


def budget(
    tokens: str | float | None, price: float | None = None, pue: float | None = None, deadline_days: float | None = None
) -> Budget | None:
    """A checked budget, None without `tokens` (a number, or text such as "15T"). Raises InputError with all problems."""
    problems = []
    limits = (
        ("price", price, 0.0, "above zero"),
        ("pue", pue, 1.0, "1 or more"),
        ("deadline_days", deadline_days, 0.0, "above zero"),
    )
    for name, value, least, word in limits:
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (least <= value < math.inf) or value == 0:
            problems.append(Problem("PLN107", f"{flag} {value}: not a number, {word}"))
        elif tokens is None:
            fix = "add --tokens, such as --tokens 15T"
            problems.append(
                Problem("PLN125", f"{flag} {value:g} without --tokens", "it is about a number of tokens to train", fix)
            )
    if problems:
        raise InputError(problems)
    return None if tokens is None else Budget(_tokens(tokens), price, 1.0 if pue is None else pue, deadline_days)


def _tokens(given: str | float) -> int:
    """A number of tokens. Raises InputError."""
    try:
        number = parse_count(str(given))
    except ValueError as error:
        raise input_error("PLN124", f"--tokens {given}: {error}", "", "write 15T, 300B, 1.4e12 or 1400000000000") from None
    if not 1 <= number <= MAX_TOKENS:
        raise input_error("PLN124", f"--tokens {given}: not between 1 and {MAX_TOKENS:.0e}", "", "write 15T, 300B or 1.4e12")
    return number


Machine = HardwareProfile | Sequence[DeviceType]
"""One profile, or the device types of a cluster of several."""


def economy(wanted: Budget, job: Job, gpus: int, hardware: Machine, estimate: Estimate) -> Economy:
    """Steps, days, device-hours, cost and energy of training `wanted.tokens` at an estimate's step time.

    Over several device types prices and powers are those of the mean device.
    """
    steps = -(-wanted.tokens // job.tokens_per_step)
    step = Span(value=estimate.step_time_s, low=estimate.interval.low_s, high=estimate.interval.high_s)
    price, power = _price(wanted, hardware), _power(hardware)
    hours = step.times(steps * gpus / HOUR)
    notes = [note for note, said in ((NO_PRICE, price is None), (NO_POWER, power is None), (BOARD_POWER, power)) if said]
    return Economy(
        tokens=wanted.tokens,
        steps=steps,
        days=step.times(steps / DAY),
        device_hours=hours,
        cost_usd=hours.times(price.value) if price else None,
        energy_mwh=hours.times(power.value * wanted.pue / 1e6) if power else None,
        price_usd_per_device_hour=price,
        power_watts=power,
        pue=wanted.pue,
        deadline_days=wanted.deadline_days,
        notes=notes,
    )


def _price(wanted: Budget, hardware: Machine) -> Rate | None:
    """USD of one device-hour: the one that was given, else the profile's."""
    if wanted.price is not None:
        return Rate(value=wanted.price, provenance="given", source="--price")
    return _mean(hardware, lambda h: h.price)


def _power(hardware: Machine) -> Rate | None:
    """Board power of one device, watts."""
    return _mean(hardware, lambda h: h.device.power)


_TRUST: tuple[Provenance, ...] = ("measured", "fitted", "datasheet", "assumed")


def _mean(hardware: Machine, figure_of: Callable[[HardwareProfile], Figure | None]) -> Rate | None:
    """A figure of the mean device; None where a profile lacks it."""
    types = [DeviceType(hardware, 1)] if isinstance(hardware, HardwareProfile) else hardware
    figures = [figure for t in types if (figure := figure_of(t.hardware)) is not None]
    if len(figures) < len(types):
        return None
    total = sum(t.gpus for t in types)
    value = sum(t.gpus * f.base for t, f in zip(types, figures, strict=True)) / total
    source = "; ".join(dict.fromkeys(f.source for f in figures))
    return Rate(value=value, provenance=max((f.provenance for f in figures), key=_TRUST.index), source=source)


def budget_of(made: Economy) -> Budget:
    """The budget that an `Economy` was made from."""
    price = made.price_usd_per_device_hour
    given = price.value if price is not None and price.provenance == "given" else None
    return Budget(made.tokens, given, made.pue, made.deadline_days)


def in_time(made: Economy | None) -> bool:
    """Whether the predicted days are within the deadline; True without one."""
    return made is None or made.deadline_days is None or made.days.value <= made.deadline_days


def compute_optimal(model: Model, job: Job, estimate: Estimate) -> ComputeOptimal:
    """The compute-optimal number of tokens for a model of this size (a rule of thumb), and how long it would take.

    Mixtures of experts count by their active parameters; the rule comes from dense models.
    """
    routed = model.active_params != model.total_params
    tokens = TOKENS_PER_PARAM * model.active_params
    step = Span(value=estimate.step_time_s, low=estimate.interval.low_s, high=estimate.interval.high_s)
    return ComputeOptimal(
        tokens=tokens,
        tokens_per_param=TOKENS_PER_PARAM,
        counted="active parameters" if routed else "parameters",
        days=step.times(-(-tokens // job.tokens_per_step) / DAY),
        source=HOFFMANN + (", a rule for dense models" if routed else ""),
    )
