"""A prefill and a decode server as schedulers, without the servers: see `srt.models.serving`.

Each rank turns SGLang's own loop of its role. Pages, bootstrap, transfers and their state are
SGLang's; the bytes are carried by `sglang_cpu_reference.transfer_engine`.
"""

import math
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from sglang_cpu_reference.server import free_port
from srt.fresh import Fresh, Outcome
from srt.layers.dcp.symm_processes import by_symm
from srt.models.serving import Answer, answer_to, command_line, generate_request, scheduler_of

Batches = Sequence[Sequence[Sequence[int]]]


#: How soon a decode server takes a prefill server for dead, and its last write for done. Only where
#: one is killed: a live one that a busy machine keeps from answering would be taken for dead too.
IMPATIENT = {
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "5",
}


class Side(NamedTuple):
    """One of the two servers: its ranks, and flags beside those of its role.

    symm: it exchanges by that, with which no server on a CPU starts; in Triton's interpreter.
    """

    tp: int
    flags: tuple[str, ...] = ()
    symm: bool = False


class Failing(NamedTuple):
    """How a rank went through failures of the other server.

    answers: of each request. seconds: from a request, or several at once, until it ended and its
    slots were free. free: slots before the first and after each.
    """

    answers: list[Answer]
    seconds: list[float]
    free: list[int]


def outcomes(
    processes: Fresh,
    model: Path,
    prefill: Side,
    decode: Side,
    batches: Batches,
    new_tokens: int,
    within: float = math.inf,
) -> tuple[list[Outcome], list[Outcome]]:
    """Answer batches of prompts, one batch after the other; how each side's ranks ended.

    A rank's value is its answers to each batch. Those of the prefill side have no token; of the
    decode side `cached_tokens` are those that it had itself. within: seconds that a batch may take
    on a rank, or it fails.
    """
    with TemporaryDirectory() as ended:
        call = (_serve, batches, new_tokens, Path(ended), decode, within)
        return _outcomes(processes, model, prefill, decode, *call)


def failures(
    processes: Fresh, model: Path, prefill: Side, decode: Side, prompt: Sequence[int], stalls: Path
) -> tuple[list[Outcome], list[Outcome]]:
    """Five requests; the value of each decode rank is its `Failing`.

    One goes well; one is aborted as it is written; of two at once, one's prefill server is killed
    as it writes; one comes when that is known to be gone. stalls: a path at which nothing is; the
    prefill server makes it when it stalls.
    """
    call = (_fail, prompt, stalls)
    return _outcomes(processes, model, prefill, decode, *call, env=IMPATIENT)


def loses_decode(
    processes: Fresh, model: Path, prefill: Side, decode: Side, prompt: Sequence[int]
) -> tuple[list[Outcome], list[Outcome]]:
    """Three requests; the value of each prefill rank is its `Failing`.

    One goes well; one's decode server is killed as it is written to; one comes when that is gone.
    """
    return _outcomes(processes, model, prefill, decode, _lose_decode, prompt)


def _outcomes(
    processes: Fresh,
    model: Path,
    prefill: Side,
    decode: Side,
    call: Any,
    *args: Any,
    env: Mapping[str, str] | None = None,
) -> tuple[list[Outcome], list[Outcome]]:
    calls = [(call, *rank, *args) for rank in ranks(model, prefill, decode)]
    ended = processes.outcomes(calls, env)
    return ended[: prefill.tp], ended[prefill.tp :]


def ranks(model: Path, prefill: Side, decode: Side) -> list[tuple[int, list[str], int]]:
    """Of the prefill server's ranks, then the decode server's: the rank there, its arguments, and
    the port where the servers meet."""
    found, port = [], free_port()
    for role, side in (("prefill", prefill), ("decode", decode)):
        flags = ("--disaggregation-mode", role, "--disaggregation-bootstrap-port", str(port))
        argv = command_line(model, side.tp, *flags, *side.flags)
        found += [(rank, argv, port) for rank in range(side.tp)]
    return found


class _Rank:
    """A rank's scheduler, in the loop of its role."""

    def __init__(self, rank: int, argv: list[str], port: int) -> None:
        self.scheduler = scheduler_of(rank, argv)
        self.decodes = self.scheduler.disaggregation_mode.value == "decode"
        self.rooms = 0
        self._bootstrap = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port}
        self._requests: list[Any] = []
        self._had: dict[str, int] = {}
        add = self.scheduler._add_request_to_queue

        def note(request: Any, **given: Any) -> None:
            if request not in self._requests:  # a retracted one comes again
                self._requests.append(request)
            add(request, **given)

        self.scheduler._add_request_to_queue = note
        if self.decodes:
            queue = self.scheduler.disagg_decode_prealloc_queue
            match = queue._match_prefix_and_lock

            def note_prefix(request: Any) -> Any:
                found = match(request)
                self._had[request.rid] = found.decode_prefix_len
                return found

            queue._match_prefix_and_lock = note_prefix

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Admit prompts at once, each in a room of its own: 1, 2, ..."""
        self._requests.clear()
        for prompt in prompts:
            self.rooms += 1
            fields = {**self._bootstrap, "bootstrap_room": self.rooms}
            request = generate_request(str(self.rooms), prompt, new_tokens, **fields)
            self.scheduler.process_input_requests([request])

    def answers(self) -> Generator[None, None, list[Answer]]:
        """Wait for the answers to what was asked last."""
        while not all(request.finished() for request in self._requests):
            yield
        answers = [(request.rid, answer_to(request)) for request in self._requests]
        if not self.decodes:
            return [answer for _, answer in answers]
        return [answer._replace(cached_tokens=self._had.get(rid, 0)) for rid, answer in answers]

    def free(self) -> int:
        """Slots that no request holds."""
        allocator, tree = self.scheduler.token_to_kv_pool_allocator, self.scheduler.tree_cache
        return int(allocator.available_size() + tree.evictable_size())

    def settled(self, failing: Failing, began: float) -> Generator[None]:
        """Note the answers to what was asked last, once its slots are free."""
        failing.answers.extend((yield from self.answers()))
        while self.free() < failing.free[0]:
            yield
        failing.free.append(self.free())
        failing.seconds.append(time.monotonic() - began)

    def turn(self, script: Iterator[None]) -> None:
        """Turn the loop until the script ends, which goes on wherever requests would come in."""

        def ingest() -> None:
            self.scheduler.gracefully_exit = next(script, self) is self

        self.scheduler.ingest_requests = ingest
        if self.decodes:
            self.scheduler.event_loop_normal_disagg_decode()
        else:
            self.scheduler.event_loop_normal_disagg_prefill()
        self.scheduler.on_idle()  # ends the rank if a slot of its pool is lost


def _serve(
    rank: int,
    argv: list[str],
    port: int,
    batches: Batches,
    new_tokens: int,
    ended: Path,
    decode: Side,
    within: float,
) -> list[list[Answer]]:
    from sglang.srt.runtime_context import get_parallel

    side = _Rank(rank, argv, port)
    answers: list[list[Answer]] = []

    def script() -> Iterator[None]:
        for prompts in batches:
            began = time.monotonic()
            side.ask(prompts, new_tokens)
            answers.append((yield from side.answers()))
            assert time.monotonic() - began < within
        if side.decodes:
            (ended / str(rank)).touch()
            return
        # Its last words to the decode ranks would be lost with it.
        group = get_parallel().tp_group
        while not all(group.all_gather_object(len(list(ended.iterdir())) == decode.tp)):
            yield

    with by_symm(side.scheduler) if side.decodes and decode.symm else nullcontext():
        side.turn(script())
    return answers


def _fail(
    rank: int, argv: list[str], port: int, prompt: Sequence[int], stalls: Path
) -> Failing | None:
    side = _Rank(rank, argv, port)
    if not side.decodes:
        side.turn(_failing_prefill(side, prompt, stalls))
        return None
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.runtime_context import get_parallel

    group, failing = get_parallel().tp_group, Failing([], [], [side.free()])
    # Of a server that is gone, upstream asks 15 times, once a second.
    side.scheduler.disagg_decode_prealloc_queue._max_ensure_retries = 2

    def script() -> Iterator[None]:
        for requests in (1, 1, 2, 1):
            began = time.monotonic()
            side.ask([prompt] * requests, 2)
            if side.rooms == 2:
                while not all(group.all_gather_object(stalls.exists())):
                    yield
                side.scheduler.process_input_requests([AbortReq(rid="2")])
            yield from side.settled(failing, began)

    side.turn(script())
    return failing


def _lose_decode(rank: int, argv: list[str], port: int, prompt: Sequence[int]) -> Failing | None:
    side = _Rank(rank, argv, port)
    if side.decodes:
        side.turn(_dying_decode(side, prompt))
        return None
    failing = Failing([], [], [side.free()])

    def script() -> Iterator[None]:
        for room in (1, 2, 3):
            if room == 3:  # upstream's bound of what it waits for a decode server is 300 s
                side.scheduler.disagg_prefill_bootstrap_queue.kv_manager.bootstrap_timeout = 2
            began = time.monotonic()
            side.ask([prompt], 2)
            yield from side.settled(failing, began)

    side.turn(script())
    return failing


def _dying_decode(side: _Rank, prompt: Sequence[int]) -> Iterator[None]:
    """Serve room 1; die in the transfer of room 2."""
    from sglang_cpu_reference.transfer_engine import TransferEngine

    side.ask([prompt], 2)
    yield from side.answers()
    TransferEngine._write = lambda *_: os._exit(9)  # type: ignore[method-assign]
    side.ask([prompt], 2)
    yield from side.answers()


def _failing_prefill(side: _Rank, prompt: Sequence[int], stalls: Path) -> Iterator[None]:
    """Serve room 1; stall in the transfer of room 2 until its request has ended; die in 3."""
    from sglang_cpu_reference.transfer_engine import TransferEngine

    write = TransferEngine.batch_transfer_sync_write
    goes_on = threading.Event()

    def fail(engine: Any, session: str, *what: Any) -> int:
        if side.rooms == 2:
            stalls.touch()
            goes_on.wait()
        elif side.rooms == 3:
            os._exit(9)
        return write(engine, session, *what)

    TransferEngine.batch_transfer_sync_write = fail  # type: ignore[method-assign]
    for _ in range(3):
        side.ask([prompt], 2)
        yield from side.answers()
        if side.rooms == 2:
            goes_on.set()
