"""The event simulator against a slow one that looks for what can run next: lists of every schedule, broken ones too."""

from __future__ import annotations

import random

import pytest

from planner.cost.actions import Action, actions, one_by_one
from planner.cost.schedules import simulate
from planner.specs.layout import SCHEDULES, V_SHAPED, stage_of

Times = list[list[float]]


def slow(order: list[list[Action]], times: dict[str, Times], layers: list[list[int]], p2p: float, schedule: str):
    """(makespan, most layers of each rank), None for a deadlock: slots run one at a time, as soon as their inputs are there."""
    pp, v = len(order), len(layers[0])
    made: dict[tuple[str, int, int], tuple[float, int]] = {}
    left, clock, held, peak = [list(slots) for slots in order], [0.0] * pp, [0] * pp, [0] * pp

    def needs(a: Action, at: int) -> list[tuple[str, int, int]]:
        if a.kind == "F":
            return [("F", at - 1, a.microbatch)] if at else []
        own = ("B" if a.kind == "W" else "F", at, a.microbatch)
        return [own] if a.kind == "W" or at == pp * v - 1 else [own, ("B", at + 1, a.microbatch)]

    def ready(rank: int) -> list[tuple[str, int, int]] | None:
        wanted = [key for a in left[rank][0].parts for key in needs(a, stage_of(schedule, pp, rank, a.chunk))]
        return wanted if all(key in made for key in wanted) else None

    while can := [(rank, found) for rank in range(pp) if left[rank] and (found := ready(rank)) is not None]:
        for rank, wanted in can:
            slot = left[rank].pop(0)
            clock[rank] = max([clock[rank], *(end + p2p * (by != rank) for end, by in (made[key] for key in wanted))])
            clock[rank] += sum(times[a.kind][rank][a.chunk] for a in slot.parts)
            for a in slot.parts:
                if a.kind != "W":
                    key = "F" if a.kind == "F" else "B", stage_of(schedule, pp, rank, a.chunk), a.microbatch
                    made[key] = clock[rank], rank
                held[rank] += layers[rank][a.chunk] * {"F": 1, "I": 0, "B": -1, "W": -1}[a.kind]
                peak[rank] = max(peak[rank], held[rank])
    return None if any(left) else (max(clock), tuple(peak))


def broken(rng: random.Random, order: list[list[Action]]) -> None:
    """Swap two slots of a rank, and now and then lose one."""
    slots = rng.choice(order)
    a, b = rng.randrange(len(slots)), rng.randrange(len(slots))
    slots[a], slots[b] = slots[b], slots[a]
    if rng.random() < 0.2:
        slots.pop()


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "none"])
def test_the_simulator_is_the_slow_one(schedule):
    rng, deadlocks = random.Random(schedule), 0
    for _ in range(120):
        chunks = schedule not in ("gpipe", "1f1b")
        pp, v = rng.randint(2, 4), (2 if schedule in V_SHAPED else rng.randint(2, 3)) if chunks else 1
        order = actions(schedule, pp, pp * rng.randint(2, 3) if chunks else rng.randint(1, 7), v)
        order = one_by_one(order) if rng.random() < 0.5 else order
        if rng.random() < 0.3:
            broken(rng, order)
        forward, backward, share = ([[rng.random() for _ in range(v)] for _ in range(pp)] for _ in range(3))
        late = [[b * s for b, s in zip(*rows, strict=True)] for rows in zip(backward, share, strict=True)]
        early = [[b - w for b, w in zip(*rows, strict=True)] for rows in zip(backward, late, strict=True)]
        layers, p2p = [[rng.randint(1, 3) for _ in range(v)] for _ in range(pp)], rng.choice((0.0, 0.3))
        expected = slow(order, {"F": forward, "B": backward, "I": early, "W": late}, layers, p2p, schedule)
        if expected is None:
            deadlocks += 1
            with pytest.raises(RuntimeError, match="deadlock"):
                simulate(order, forward, backward, layers, p2p, late, schedule)
            continue
        found = simulate(order, forward, backward, layers, p2p, late, schedule)
        assert (found.makespan, found.peak_layers) == expected
    assert 0 < deadlocks < 60
