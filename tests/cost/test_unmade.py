"""What a pipeline's rank holds at most, against a replay of its actions: gradients that do not exist yet, and what is in flight
when the head of unequal chunks runs backward."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from planner.cost import unmade
from planner.cost.actions import Action, actions
from planner.cost.peaks import HeadedRank, beyond_head
from planner.cost.schedules import in_flight, in_flight_layers
from planner.cost.task import Ints
from planner.specs.layout import SCHEDULES


def of(value: int) -> Ints:
    return np.array([value], dtype=np.int64)


def before_backwards(order: list[Action], held: list[int]) -> Iterator[tuple[Action, int, int]]:
    """(backward, layer-micro-batches whose activations are there, layers whose gradients are) as each one begins; `held`:
    layers by chunk."""
    saved, made = 0, set()
    for action in order:
        if action.kind == "F":
            saved += held[action.chunk]
        else:
            yield action, saved, sum(held[chunk] for chunk in made)
            saved -= held[action.chunk]
            made.add(action.chunk)


@pytest.mark.parametrize(
    ("schedule", "pp", "m", "v"),
    [
        ("1f1b", 2, 2, 1), ("1f1b", 4, 4, 1), ("gpipe", 2, 2, 1), ("gpipe", 4, 9, 1), ("gpipe", 3, 2, 1),
        ("interleaved", 2, 2, 2), ("interleaved", 2, 2, 8), ("interleaved", 4, 4, 2), ("interleaved", 4, 4, 5),
        ("interleaved", 3, 3, 3), ("interleaved", 4, 4, 3), ("interleaved", 8, 8, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("a", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("g", [1, 3, 4, 5, 6, 17, 50])
def test_a_rank_holds_what_its_actions_do(schedule: str, pp: int, m: int, v: int, a: int, g: int) -> None:
    """Chunks of two layers each."""
    n, lists = 2 * v, actions(schedule, pp, m, v)
    late = unmade.Late(of(g), of(0), of(m), of(v))
    for rank in range(pp):
        flight = in_flight(of(SCHEDULES.index(schedule)), of(pp), of(v), of(m), of(rank))
        saved = of(a * 2 * int(flight[0]))
        held = n * g + int(saved[0]) - int(unmade.spared(late, of(0), flight, of(n), saved)[0])
        wanted = max(a * pairs + g * layers for _, pairs, layers in before_backwards(lists[rank], [2] * v))
        assert held == wanted
        # The limit is that of the same bytes, and one more of activations is too much: here they come two layers at a time.
        room = of(held - n * g)
        most = int(unmade.most_saved(late, of(0), flight, of(n), room)[0])
        assert most >= int(saved[0])
        assert int(unmade.most_saved(late, of(0), flight, of(n), room - 1)[0]) < int(saved[0])


@pytest.mark.parametrize(("pp", "v"), [(2, 2), (2, 3), (3, 3), (4, 3), (4, 4), (8, 4)])
@pytest.mark.parametrize("g", [1, 2, 3, 5, 12, 100])
def test_the_last_rank_holds_no_more_than_that_with_unequal_chunks(pp: int, v: int, g: int) -> None:
    """Of which the last ones are a layer short; a byte of activations a layer."""
    order, code, last = actions("interleaved", pp, pp, v)[-1], of(SCHEDULES.index("interleaved")), of(pp - 1)
    late = unmade.Late(of(g), of(0), of(pp), of(v))
    flight = in_flight(code, of(pp), of(v), of(pp), last)
    for n in range(v + 1, 2 * v):
        saved = in_flight_layers(code, of(pp), of(v), of(pp), last, of(n))
        held = n * g + int(saved[0]) - int(unmade.spared(late, of(0), flight, of(n), saved)[0])
        replayed = before_backwards(order, [n // v + (chunk < n % v) for chunk in range(v)])
        wanted = max(pairs + g * layers for _, pairs, layers in replayed)
        assert wanted <= held <= n * g + int(saved[0])


def test_the_embeddings_gradient_comes_with_the_first_chunk() -> None:
    """The first rank lacks it before its first backward, and with chunks until the first one's."""
    one = unmade.Late(of(0), of(100), of(4), of(1))
    assert int(unmade.spared(one, of(1), of(4), of(2), of(4000))[0]) == 100
    assert int(unmade.spared(one, of(1), of(4), of(2), of(40))[0]) == 10  # then a micro-batch has gone
    assert int(unmade.spared(one, of(0), of(4), of(2), of(4000))[0]) == 0
    chunked = one._replace(chunks=of(2))
    assert int(unmade.spared(chunked, of(1), of(8), of(2), of(160))[0]) == 100


def test_nothing_is_spared_where_gradients_are_there() -> None:
    late = unmade.Late(of(50), of(100), of(0), of(1))
    assert int(unmade.spared(late, of(1), of(4), of(2), of(4000))[0]) == 0
    assert int(unmade.most_saved(late, of(1), of(4), of(2), of(4000))[0]) == 4000
    fewer = late._replace(round=of(4))
    assert int(unmade.spared(fewer, of(0), of(3), of(2), of(4000))[0]) == 0  # a later rank of 1F1B


@pytest.mark.parametrize(("pp", "m", "v", "n"), [(2, 4, 8, 12), (2, 2, 8, 12), (4, 8, 3, 10), (4, 16, 5, 7), (2, 8, 2, 3)])
def test_the_head_runs_beside_fewer_layers_than_are_in_flight_at_most(pp: int, m: int, v: int, n: int) -> None:
    held = [n // v + (chunk < n % v) for chunk in range(v)]
    moments = list(before_backwards(actions("interleaved", pp, m, v)[-1], held))
    code = of(SCHEDULES.index("interleaved"))
    flight = in_flight(code, of(pp), of(v), of(m), of(pp - 1))
    most = in_flight_layers(code, of(pp), of(v), of(m), of(pp - 1), of(n))
    headed = HeadedRank(of(min(pp, m)), of(v))
    beyond = int(beyond_head(headed, of(1), flight, of(n), most)[0])
    assert int(most[0]) - beyond == max(pairs for action, pairs, _ in moments if action.chunk == v - 1)
    assert int(most[0]) >= max(pairs for _, pairs, _ in moments)
    assert not beyond_head(headed, of(0), flight, of(n), most)[0]
    assert not beyond_head(headed._replace(headed=of(-1)), of(1), flight, of(n), most)[0]
