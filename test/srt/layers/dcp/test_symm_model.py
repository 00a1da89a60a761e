"""The protocol of the one-kernel exchange in every order, and what breaks without each rule."""

from __future__ import annotations

import random

import pytest
from srt.layers.dcp.symm_model import Model, ViolationError, run_at_random, run_in_every_order

pytestmark = pytest.mark.quick


def model(calls: int = 4, rows: int = 1, **options) -> Model:
    return Model((rows,) * calls, options.pop("ranks", 2), **options)


@pytest.mark.parametrize(
    "size",
    [
        {"calls": 4, "words": 2, "programs": 1},
        pytest.param({"calls": 2, "words": 1, "programs": 2, "rows": 2}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_in_every_order(size: dict[str, int]) -> None:
    assert run_in_every_order(model(**size)) > 2000


def test_three_ranks_in_every_order() -> None:
    assert run_in_every_order(model(ranks=3, calls=3, words=1, programs=1)) > 10_000


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))]
)
def test_any_mix_of_calls_in_random_orders(ranks: int) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        calls = draw.randint(2, 8)
        run_at_random(
            Model(
                rows=tuple(2 * draw.randint(0, 2) for _ in range(calls)),
                ranks=ranks,
                programs=draw.randint(1, 3),
                places=2,
                heads=draw.randint(1, 2 * ranks),
                ahead=draw.choice([False, True]),
            ),
            seed,
        )


def fails(broken: Model, message: str, attempts: int = 100) -> bool:
    """Whether some order breaks the model in the way expected, and none in another."""
    stories = []
    for seed in range(attempts):
        try:
            run_at_random(broken, seed)
        except ViolationError as violation:
            stories.append(str(violation))
    return bool(stories) and all(message in story for story in stories)


def test_one_slot_overwrites_what_was_not_read() -> None:
    assert fails(model(slots=1), "overwrites")
    with pytest.raises(ViolationError, match="overwrites"):
        run_in_every_order(model(slots=1, calls=2, programs=1, words=1))


def test_ahead_by_one_row() -> None:
    """Of three rows the last is sent when the first has come; what fits may differ, as before."""
    assert run_in_every_order(model(rows=3, calls=1, programs=1, words=1, ahead=True)) > 3000
    sizes = {"ranks": 3, "rows": 5, "calls": 2, "words": 1, "ahead": True}
    for seed in range(5):
        for resident in ((2, 2, 2), (1, 1, 1), (1, 2, 1)):
            run_at_random(model(programs=2, resident=resident, **sizes), seed)
    sizes = {"rows": 6, "programs": 3, "calls": 2, "words": 1, "ahead": True}
    sizes["dispatch"] = (0, 1, 2), (2, 1, 0)
    assert fails(model(resident=(1, 1), **sizes), "nothing can go on", attempts=10)
    assert not fails(model(resident=(3, 3), **sizes), "", attempts=10)


def test_a_rank_that_receives_nothing_runs_ahead() -> None:
    """Three heads, four ranks: without pieces for the place that is no head, rank 3 never waits."""
    assert fails(model(ranks=4, heads=3, phantoms=False, calls=6), "overwrites")
    assert not fails(model(ranks=4, heads=3, calls=6), "", attempts=20)


@pytest.mark.parametrize("resident", [(1, 1, 1), (1, 2, 3), (2, 1, 1)])
def test_fewer_programs_fit_than_there_are(resident: tuple[int, ...]) -> None:
    """What waits for a row waits for the lowest of the rows that are left, which all ranks hold."""
    for seed in range(10):
        run_at_random(model(ranks=3, rows=4, programs=3, calls=2, resident=resident), seed)
    assert run_in_every_order(model(rows=2, calls=2, words=1, programs=2, resident=(1, 1))) > 200


def test_ranks_that_start_programs_in_other_orders_wait_for_ever() -> None:
    """Then all programs of a launch must fit, which `resident_warps` sees to."""
    orders = (0, 1, 2), (2, 1, 0)
    sizes = {"rows": 3, "programs": 3, "calls": 2, "dispatch": orders}
    assert fails(model(resident=(1, 1), **sizes), "nothing can go on")
    assert not fails(model(resident=(3, 3), **sizes), "", attempts=20)
