"""A prefill and a decode server as schedulers, without the servers: see `srt.models.serving`.

Each rank turns SGLang's own loop of its role. Pages, bootstrap, transfers and their state are
SGLang's; the bytes are carried by `sglang_cpu_reference.transfer_engine`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_cpu_reference.server import free_port
from srt.fresh import Fresh, Outcome
from srt.models.serving import Answer, answer_to, command_line, generate_request, scheduler_of

Batches = Sequence[Sequence[Sequence[int]]]


class Side(NamedTuple):
    """One of the two servers: its ranks, and flags beside those of its role."""

    tp: int
    flags: tuple[str, ...] = ()


def outcomes(
    processes: Fresh, model: Path, prefill: Side, decode: Side, batches: Batches, new_tokens: int
) -> tuple[list[Outcome], list[Outcome]]:
    """Answer batches of prompts, one batch after the other; how each side's ranks ended.

    A rank's value is its answers to each batch. Those of the prefill side have no token.
    """
    port, calls = free_port(), []
    for role, side in (("prefill", prefill), ("decode", decode)):
        flags = ("--disaggregation-mode", role, "--disaggregation-bootstrap-port", str(port))
        argv = command_line(model, side.tp, *flags, *side.flags)
        calls += [(_serve, rank, argv, port, batches, new_tokens) for rank in range(side.tp)]
    ended = processes.outcomes(calls)
    return ended[: prefill.tp], ended[prefill.tp :]


def _serve(
    rank: int, argv: list[str], port: int, batches: Batches, new_tokens: int
) -> list[list[Answer]]:
    scheduler = scheduler_of(rank, argv)
    answers = []
    requests: list[Any] = []
    rooms = iter(range(1, 1 << 20))
    add = scheduler._add_request_to_queue

    def note(request: Any, **given: Any) -> None:
        if request not in requests:  # a retracted one comes again
            requests.append(request)
        add(request, **given)

    def batch_by_batch() -> Iterator[None]:
        for prompts in batches:
            requests.clear()
            fields = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port}
            for prompt in prompts:
                fields["bootstrap_room"] = room = next(rooms)
                scheduler.process_input_requests(
                    [generate_request(str(room), prompt, new_tokens, **fields)]
                )
            while not all(request.finished() for request in requests):
                yield
            answers.append([answer_to(request) for request in requests])
        scheduler.gracefully_exit = True

    turns = batch_by_batch()
    scheduler._add_request_to_queue = note
    scheduler.ingest_requests = lambda: next(turns, None)
    if scheduler.disaggregation_mode.value == "prefill":
        scheduler.event_loop_normal_disagg_prefill()
    else:
        scheduler.event_loop_normal_disagg_decode()
    scheduler.on_idle()  # ends the rank if a slot of its pool is lost
    return answers
