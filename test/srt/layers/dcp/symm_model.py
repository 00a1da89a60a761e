"""Model of the protocol of `sglang_helix.srt.layers.dcp.symm`, to be run in every order.

The gather's too: that a rank's pieces of a row are the same for all, and that one part of them is
stored before the other, is nothing that a word knows of.

Ranks make calls, a call is a kernel of programs, a program carries rows. What a real device may
reorder is a step of its own: programs of a kernel go on in any order, a store becomes visible at
any time after it was issued (two of one program to the same word in order), words of a row are
separate stores. What orders is the end of a kernel: the next one of the same rank begins after all
programs of this one.

A memory word remembers which store it holds. It is a `ViolationError` if a store lands on one that
was not put back, if a receiver reads anything but the store it waits for, or if nothing can go on.

The parameters that the protocol depends on can be set wrong: one slot, no pieces for places without
a head. A model that finds nothing wrong there would be no evidence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

NEVER_SENT = None


class ViolationError(AssertionError):
    """The protocol failed in the order that was tried."""


@dataclass(frozen=True)
class Model:
    """What is run.

    Attributes:
        rows: rows of each call (batch size times owned heads).
        ranks: N.
        programs: programs of a kernel; row r belongs to program r % programs.
        resident: per rank, how many programs fit at once; None: all. The others start as those
            before them end.
        dispatch: per rank, the order in which programs start; None: by number, as devices do.
        words: separate stores of one piece.
        slots: 2 in the kernel.
        ahead: whether a program sends one row ahead of what it waits for, not all of its rows.
        heads: of `places` places per rank and token, those that stand for a head; the others'
            pieces are sent only with `phantoms`. Rows count places.
    """

    rows: tuple[int, ...]
    ranks: int
    programs: int = 2
    resident: tuple[int, ...] | None = None
    dispatch: tuple[tuple[int, ...], ...] | None = None
    words: int = 2
    slots: int = 2
    ahead: bool = False
    places: int = 1
    heads: int = 1_000_000
    phantoms: bool = True

    def received(self, owner: int, row: int) -> bool:
        """Whether the owner is sent pieces for a row."""
        return self.phantoms or owner * self.places + row % self.places < self.heads


class Word(NamedTuple):
    """Address of one word in rank `memory`'s workspace."""

    memory: int
    slot: int
    peer: int
    row: int
    word: int


class Store(NamedTuple):
    """A store that is not visible yet; the value is the row's epoch."""

    at: Word
    epoch: int
    sender: int


class Step(NamedTuple):
    """What happens next: a store becomes visible, or a program does its next operation."""

    kind: str
    store: Store | None = None
    rank: int = 0
    program: int = 0


@dataclass(frozen=True)
class State:
    """Everything; immutable, so that states can be compared.

    calls: per rank, the call it is in. operations: per rank and program, operations done.
    """

    calls: tuple[int, ...]
    operations: tuple[tuple[int, ...], ...]
    memory: frozenset[tuple[Word, int]] = frozenset()  # what is not there was never written
    flying: frozenset[Store] = frozenset()


def first(model: Model) -> State:
    """All ranks at the start of their first call."""
    return State((_call(model, 0),) * model.ranks, ((0,) * model.programs,) * model.ranks)


def finished(model: Model, state: State) -> bool:
    """Whether all ranks have made all calls."""
    return all(call == len(model.rows) for call in state.calls)


def steps(model: Model, state: State) -> list[Step]:
    """All that can happen next."""
    landing = [
        Step("land", store)
        for store in state.flying
        if not any(o.at == store.at and o.epoch < store.epoch for o in state.flying)
    ]
    return landing + [
        Step("operate", rank=rank, program=program)
        for rank in range(model.ranks)
        if state.calls[rank] < len(model.rows)
        for program in _started(model, state, rank)
        if (operation := _operation(model, state, rank, program))
        and _enabled(model, state, rank, *operation)
    ]


def take(model: Model, state: State, step: Step) -> State:
    """The state after a step; raises ViolationError."""
    if step.kind == "land":
        assert step.store
        return _land(state, step.store)
    rank, program = step.rank, step.program
    operation = _operation(model, state, rank, program)
    assert operation
    state = _operate(model, state, rank, *operation)
    done = list(state.operations[rank])
    done[program] += 1
    state = _with_operations(state, rank, tuple(done))
    if any(_operation(model, state, rank, p) for p in range(model.programs)):
        return state
    calls = list(state.calls)
    calls[rank] = _call(model, calls[rank] + 1)  # the kernel has ended
    return replace(_with_operations(state, rank, (0,) * model.programs), calls=tuple(calls))


def run_at_random(model: Model, seed: int) -> None:
    """One order, drawn at random; raises ViolationError."""
    draw, state = random.Random(seed), first(model)
    while not finished(model, state):
        state = take(model, state, draw.choice(_some(model, state)))
    if state.memory:
        raise ViolationError(f"not put back: {sorted(at for at, _ in state.memory)}")


def run_in_every_order(model: Model) -> int:
    """Every reachable state; raises ViolationError, returns their number."""
    seen = {first(model)}
    fringe = list(seen)
    while fringe:
        state = fringe.pop()
        if finished(model, state):
            continue
        for step in _some(model, state):
            following = take(model, state, step)
            if following not in seen:
                seen.add(following)
                fringe.append(following)
    return len(seen)


def _some(model: Model, state: State) -> list[Step]:
    possible = steps(model, state)
    if not possible:
        raise ViolationError(f"nothing can go on: calls {state.calls}")
    return possible


def _call(model: Model, call: int) -> int:
    """This call or the next one that is not empty; empty ones launch nothing."""
    while call < len(model.rows) and not model.rows[call]:
        call += 1
    return call


def _operations(model: Model, call: int, program: int) -> Iterator[tuple[str, int]]:
    """A program's operations in one call, as (name, row)."""
    rows = range(program, model.rows[call], model.programs)
    first = 2 if model.ahead else len(rows)
    yield from (("send", row) for row in rows[:first])
    for place, row in enumerate(rows):
        if place:
            yield from (("send", row) for row in rows[first:][place - 1 : place])
        yield "read", row
        yield "put back", row
        yield "count", row


def _operation(model: Model, state: State, rank: int, program: int) -> tuple[str, int] | None:
    if state.calls[rank] == len(model.rows):
        return None
    operations = list(_operations(model, state.calls[rank], program))
    done = state.operations[rank][program]
    return operations[done] if done < len(operations) else None


def _started(model: Model, state: State, rank: int) -> list[int]:
    """Programs of a rank's kernel that have started: one does once a place is free, in order."""
    order = model.dispatch[rank] if model.dispatch else range(model.programs)
    places = model.resident[rank] if model.resident else model.programs
    started, running = [], 0
    for program in order:
        if running == places:
            break
        started.append(program)
        running += _operation(model, state, rank, program) is not None
    return started


def _epoch(model: Model, state: State, rank: int, row: int) -> int:
    """Calls that the row has been through on this rank; the kernel's per-row counter."""
    return 1 + sum(row < rows for rows in model.rows[: state.calls[rank]])


def _pieces(model: Model, state: State, rank: int, row: int, *, sends: bool) -> list[Word]:
    """Words that a rank sends, or receives, for a row of its current call."""
    slot = _epoch(model, state, rank, row) % model.slots
    if sends:
        peers = [owner for owner in range(model.ranks) if model.received(owner, row)]
    else:
        peers = list(range(model.ranks)) if model.received(rank, row) else []
    return [
        Word(peer, slot, rank, row, word) if sends else Word(rank, slot, peer, row, word)
        for peer in peers
        for word in range(model.words)
    ]


def _enabled(model: Model, state: State, rank: int, operation: str, row: int) -> bool:
    if operation != "read":
        return True
    memory, polled = dict(state.memory), _pieces(model, state, rank, row, sends=False)
    return all(memory.get(at) is not NEVER_SENT for at in polled)


def _operate(model: Model, state: State, rank: int, operation: str, row: int) -> State:
    epoch = _epoch(model, state, rank, row)
    if operation == "send":
        words = _pieces(model, state, rank, row, sends=True)
        return replace(state, flying=state.flying | {Store(at, epoch, rank) for at in words})
    words = _pieces(model, state, rank, row, sends=False)
    if operation == "read":
        memory = dict(state.memory)
        for at in words:
            if memory.get(at) != epoch:
                raise ViolationError(f"read call {memory.get(at)} in call {epoch}: {at}")
        return state
    if operation == "put back":
        kept = frozenset((at, value) for at, value in state.memory if at not in set(words))
        return replace(state, memory=kept)
    return state  # "count": the epoch follows from the calls


def _land(state: State, store: Store) -> State:
    memory = dict(state.memory)
    at = store.at
    if at in memory:
        raise ViolationError(f"call {store.epoch} overwrites call {memory[at]}: {at}")
    memory[at] = store.epoch
    return replace(
        state,
        memory=frozenset(memory.items()),
        flying=state.flying - {store},
    )


def _with_operations(state: State, rank: int, done: tuple[int, ...]) -> State:
    operations = list(state.operations)
    operations[rank] = done
    return replace(state, operations=tuple(operations))
