"""What each pipeline rank does in which order: the action lists of the schedules, by code of our own.

A schedule is a list of actions a rank. Tests hold those that torch has (`torch.distributed.pipelining.schedules`) equal to its
own lists, action by action.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from planner.specs.layout import SCHEDULES


class Action(NamedTuple):
    """One micro-batch through one chunk. `kind`: "F" forward, "B" backward; "I" and "W" its halves, for inputs and weights."""

    kind: str
    chunk: int
    microbatch: int
    beside: Action | None = None
    """A backward that runs in the same slot (DualPipeV pairs a forward with a backward of another micro-batch)."""

    @property
    def parts(self) -> tuple[Action, ...]:
        """The actions of a slot, one after the other."""
        return (self,) if self.beside is None else (Action(self.kind, self.chunk, self.microbatch), self.beside)


def actions(schedule: str, pp: int, microbatches: int, virtual_stages: int = 1) -> list[list[Action]]:
    """Each rank's actions in order. Raises ValueError for an unknown schedule."""
    m, v = microbatches, virtual_stages
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule}")
    if schedule == "interleaved":
        return [_interleaved(pp, m, v, rank) for rank in range(pp)]
    if schedule == "interleaved-zb":
        return [_interleaved_zero_bubble(pp, m, v, rank) for rank in range(pp)]
    if schedule == "zbv":
        return [_zbv(pp, m, rank) for rank in range(pp)]
    if schedule == "dualpipev":
        return [_dual_pipe_v(pp, m, rank) for rank in range(pp)]
    if schedule == "gpipe":
        once = [Action("F", 0, i) for i in range(m)] + [Action("B", 0, i) for i in range(m)]
        return [list(once) for _ in range(pp)]
    return [_warm_steady_cool([(0, i) for i in range(m)], [(0, i) for i in range(m)], min(m, pp - r)) for r in range(pp)]


def one_by_one(order: list[list[Action]]) -> list[list[Action]]:
    """The lists with every slot's actions one after the other: how torch's own runtime runs overlapped pairs."""
    return [[part for action in rank for part in action.parts] for rank in order]


def _interleaved(pp: int, m: int, v: int, rank: int) -> list[Action]:
    """Interleaved 1F1B (Narayanan 2021, section 2.2; Megatron's and torch's order); m is a multiple of pp."""
    order = _in_rounds(pp, m, v)
    backward = [(v - 1 - chunk, i) for chunk, i in order]
    return _warm_steady_cool(order, backward, min(m * v, (v - 1) * pp + 2 * (pp - 1 - rank) + 1))


def _in_rounds(pp: int, m: int, v: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order of forwards: pp micro-batches through chunk 0, then chunk 1, ...; then the next pp."""
    return [(k // pp % v, k // (pp * v) * pp + k % pp) for k in range(m * v)]


def _warm_steady_cool(forward: list[tuple[int, int]], backward: list[tuple[int, int]], flight: int) -> list[Action]:
    """`flight` forwards, then one backward and one forward in turn, then the remaining backwards."""
    result = [Action("F", *f) for f in forward[:flight]]
    for i, b in enumerate(backward):
        result.append(Action("B", *b))
        if flight + i < len(forward):
            result.append(Action("F", *forward[flight + i]))
    return result


def _interleaved_zero_bubble(pp: int, m: int, v: int, rank: int) -> list[Action]:
    """ZB-H1 with chunks (arXiv 2401.10241, section 2.2; torch's InterleavedZeroBubble); m is a multiple of pp.

    One forward less in advance for each rank than interleaved 1F1B; rank r puts off its weight gradients by r backwards.
    """
    forward = _in_rounds(pp, m, v)
    backward = [(v - 1 - chunk, i) for chunk, i in forward]
    warm = min(m * v, (v - 1) * pp + pp - 1 - rank)
    result, weights = [Action("F", *f) for f in forward[:warm]], iter(backward)
    for k, b in enumerate(backward):
        if warm + k < len(forward):
            result.append(Action("F", *forward[warm + k]))
        result.append(Action("I", *b))
        if k >= rank:
            result.append(Action("W", *next(weights)))
    return result + [Action("W", *b) for b in weights]


class _Turns:
    """Actions of a V-shaped schedule, whose micro-batches pass each chunk in order."""

    def __init__(self) -> None:
        self.done: list[Action] = []
        self.put_off: list[tuple[int, int]] = []
        self._next: dict[tuple[str, int], int] = {}

    def _turn(self, what: str, chunk: int) -> int:
        turn = self._next.get((what, chunk), 0)
        self._next[what, chunk] = turn + 1
        return turn

    def count(self, what: str, chunk: int) -> int:
        """Forwards "F", backwards "B" (whole or for inputs) or weight gradients "W" so far."""
        return self._next.get((what, chunk), 0)

    def forward(self, chunk: int) -> None:
        """The next forward of a chunk."""
        self.done.append(Action("F", chunk, self._turn("F", chunk)))

    def backward(self, chunk: int) -> None:
        """The next whole backward."""
        self.done.append(Action("B", chunk, self._turn("B", chunk)))

    def inputs(self, chunk: int) -> None:
        """The next backward for inputs; its weight gradients are put off."""
        turn = self._turn("B", chunk)
        self.done.append(Action("I", chunk, turn))
        self.put_off.append((chunk, turn))

    def weights(self) -> None:
        """The weight gradients put off first, if any."""
        if self.put_off:
            chunk, turn = self.put_off.pop(0)
            self.done.append(Action("W", chunk, turn))

    def weights_of(self, chunk: int) -> None:
        """The next weight gradients of a chunk, out of turn with the other one."""
        self.done.append(Action("W", chunk, self._turn("W", chunk)))

    def pair(self, forward: int, backward: int) -> None:
        """A forward of one chunk and a whole backward of the other in one slot."""
        beside = Action("B", backward, self._turn("B", backward))
        self.done.append(Action("F", forward, self._turn("F", forward), beside))


def _zbv(pp: int, m: int, rank: int) -> list[Action]:
    """ZB-V (arXiv 2401.10241, section 6; torch's ZBVZeroBubble); made for 2 pp - 1 micro-batches at least, cut to fewer."""
    turns, enough = _Turns(), max(2 * pp - 1, m)

    def whole(chunk: int) -> None:
        turns.inputs(chunk)
        turns.weights_of(chunk)

    for _ in range(2 * (pp - rank) - 1):
        turns.forward(0)
    for _ in range(rank):
        turns.forward(1)
        turns.forward(0)
    for _ in range(pp - rank):
        turns.forward(1)
        whole(1)
    while turns.count("F", 1) < turns.count("F", 0) or turns.count("F", 0) < enough:
        if turns.count("F", 0) < enough:
            turns.forward(0)
        whole(0)
        turns.forward(1)
        whole(1)
    for _ in range(rank):
        turns.inputs(0)
        turns.inputs(1)
    for _ in range(pp - rank):
        whole(0)
    for chunk in (1, 0):
        while turns.count("W", chunk) < turns.count("B", chunk):
            turns.weights_of(chunk)
    return [a for a in turns.done if a.microbatch < m]


def _dual_pipe_v(pp: int, m: int, rank: int) -> list[Action]:
    """DualPipeV (DeepSeek's DualPipe repository, arXiv 2412.19437; torch's class of that name); m is 2 pp at least."""
    turns, after = _Turns(), pp - rank - 1
    for _ in range(2 * after):
        turns.forward(0)
    for _ in range(rank + 1):
        turns.forward(0)
        turns.forward(1)
    for _ in range(after):
        turns.inputs(1)
        turns.weights()
        turns.forward(1)
    for i in range(m - 2 * pp + rank + 1):
        if i == 0 and after == 0:  # apart, which shortens the bubble
            turns.forward(0)
            turns.backward(1)
        else:
            turns.pair(0, 1)
        turns.pair(1, 0)
    for _ in range(after):
        turns.backward(1)
        turns.pair(1, 0)
    for step in _halves(rank):
        (turns.inputs if step.split else turns.backward)(step.chunk)
    for _ in range(after):
        turns.weights()
        turns.inputs(0)
    for _ in range(rank + 1):
        turns.weights()
    return turns.done


@dataclass(frozen=True)
class _Half:
    chunk: int
    split: bool


def _halves(rank: int) -> Iterator[_Half]:
    """The last backwards of DualPipeV, chunk 1 and 0 in turn: the second half of them for inputs only."""
    first = (rank + 1) // 2
    for i in range(rank + 1):
        yield _Half(1, i > first or (i == first and rank % 2 == 1))
        yield _Half(0, i >= first)
