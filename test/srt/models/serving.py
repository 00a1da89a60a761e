"""SGLang's schedulers on several ranks, without a server: flags in, completions out.

A layout costs a second or two this way, a server ten times as much. Each rank resolves the flags
as ``sglang.launch_server`` does, builds SGLang's own `Scheduler` and turns its loop by hand.
Admission, chunks, prefix cache, batches, model and sampling are SGLang's; HTTP, tokenizer and
detokenizer are left out, and `test_end_to_end.py` has those.
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from sglang_cpu_reference.oracle import Completion
from sglang_cpu_reference.server import free_port
from srt.fresh import Fresh
from srt.rank import published


class Answer(NamedTuple):
    """A request's completion, how many tokens of its prompt the prefix cache had, and its end.

    finish: SGLang's own account, as its HTTP answers have it ("type", "message", "status_code").
    retractions: how often it gave its slots back before it was done. drafts: how many were right,
    and how many passes of the model verified some.
    """

    completion: Completion
    cached_tokens: int
    finish: dict[str, Any]
    retractions: int
    drafts: tuple[int, int]


class Report(NamedTuple):
    """One rank's answers to each batch, and its pool.

    kv_tokens: tokens that the pool holds, over all ranks of a KVP group. kv_bytes: on this rank.
    """

    answers: list[list[Answer]]
    kv_tokens: int
    kv_bytes: int


def serve(
    processes: Fresh,
    model: Path,
    tp: int,
    flags: Sequence[str],
    batches: Sequence[Sequence[Sequence[int]]],
    new_tokens: int,
    nodes: int = 1,
    retracting: bool = False,
    **env: str,
) -> list[Report]:
    """Answer batches of prompts, one batch after the other, on `tp` ranks; their reports.

    retracting: of each batch of several, one request is retracted, and resumes. env: environment
    variables of the ranks.
    """
    argv = command_line(model, tp, *flags)
    if nodes > 1:
        argv += ["--nnodes", str(nodes), "--dist-init-addr", f"127.0.0.1:{free_port()}"]
    given = (argv, tp // nodes, batches, new_tokens, retracting)
    return processes.ranks(_serve, tp, *given, **env)


def command_line(model: Path, tp: int, *flags: str) -> list[str]:
    """Arguments of ``sglang.launch_server``, with a free port for the ranks to meet at."""
    return [
        *("--model-path", str(model), "--tp-size", str(tp)),
        *("--nccl-port", str(free_port()), "--random-seed", "0", *flags),
    ]


def _serve(
    rank: int,
    argv: list[str],
    a_node: int,
    batches: Any,
    new_tokens: int,
    retracting: bool = False,
) -> Report:
    scheduler = scheduler_of(rank, [*argv, "--node-rank", str(rank // a_node)])
    return answer_all(scheduler, batches, new_tokens, retracting)


def answer_all(scheduler: Any, batches: Any, new_tokens: int, retracting: bool = False) -> Report:
    """In a rank's process: answer batches of prompts, one batch after the other; see `serve`."""
    pool = scheduler.get_init_info()["sglang_helix"]
    answers = [answer(scheduler, prompts, new_tokens, retracting) for prompts in batches]
    return Report(answers, pool["kv_tokens"], pool["kv_bytes"])


def serve_by_each(
    processes: Fresh,
    model: Path,
    tp: int,
    flags: Sequence[str],
    exchanges: Sequence[str],
    batches: Sequence[Sequence[Sequence[int]]],
    new_tokens: int,
    retracting: bool = False,
) -> list[list[Report]]:
    """As `serve`, by one exchange after the other in the same ranks: by rank, a report of each."""
    argv = command_line(model, tp, *flags, "--dcp-comm-backend", exchanges[0])
    return processes.ranks(_serve_by_each, tp, argv, exchanges, batches, new_tokens, retracting)


def _serve_by_each(
    rank: int, argv: list[str], exchanges: Sequence[str], *load: Any
) -> list[Report]:
    scheduler = scheduler_of(rank, argv)
    return [answer_all(scheduler, *load) for _ in each_exchange(scheduler, exchanges)]


def each_exchange(scheduler: Any, names: Sequence[str]) -> Iterator[str]:
    """In a rank's process: serve by one exchange after the other; the start's is the first.

    Starting ranks costs as much as a load. What an exchange changes is built anew in them.
    """
    from sglang.srt.runtime_context import get_parallel

    for number, name in enumerate(names):
        with exchanging_by(scheduler, name) if number else nullcontext():
            assert get_parallel().dcp_group.exchanger.name == name
            yield name


@contextmanager
def exchanging_by(scheduler: Any, name: str) -> Iterator[None]:
    """In a rank's process: another exchange than the one it started with, and an empty cache."""
    from sglang.srt.runtime_context import get_parallel
    from sglang_helix.srt.model_executor.model_runner import prepare_exchange

    runner = scheduler.tp_worker.model_runner
    with get_parallel().override(dcp_comm_backend=name):
        scheduler.flush_cache()
        prepare_exchange(None, runner)
        runner.init_attention_backends()
        yield


def scheduler_of(rank: int, argv: list[str]) -> Any:
    """In a rank's process: resolve the arguments and build its scheduler."""
    server_args = published(rank, argv)
    from sglang.srt.managers.disagg_service import start_disagg_service
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.server_args import PortArgs

    if rank == 0:
        start_disagg_service()  # of a prefill server; nothing otherwise
    # Given a replica and its port, no rank tries whether the launcher's ports are free.
    ports = PortArgs.init_new(server_args, dp_rank=0, worker_ports=[free_port()])
    scheduler = Scheduler(server_args, ports)
    scheduler.idle_sleeper = None
    return scheduler


def answer(
    scheduler: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    retracting: bool = False,
) -> list[Answer]:
    """Admit the prompts at once and turn the scheduler's loop until it is idle; on every rank.

    retracting: as soon as several decode, one is retracted, as if the pool were full.
    """
    scheduler.process_input_requests(
        [generate_request(str(number), prompt, new_tokens) for number, prompt in enumerate(prompts)]
    )
    requests = list(scheduler.waiting_queue)
    assert len(requests) == len(prompts)
    left = retracting and len(requests) > 1
    while not scheduler.is_fully_idle():
        if left and len(scheduler.running_batch.reqs) > 1:
            turn_with_a_full_pool(scheduler)
            left = not any(request.retraction_count for request in requests)
        else:
            turn(scheduler)
    assert not left
    scheduler.on_idle()  # ends the rank if a slot of its pool is lost
    return [answer_to(request) for request in requests]


def turn_with_a_full_pool(scheduler: Any) -> None:
    """A pass in which, if requests decode, one is retracted: SGLang's own switch for tests."""
    from sglang.srt.managers import scheduler as module

    with mock.patch.multiple(module, TEST_RETRACT=True, TEST_RETRACT_INTERVAL=1):
        turn(scheduler)


def oversubscribed(
    rank: int, argv: list[str], prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Answer]:
    """In a rank's process: answers to prompts of which admission expects 4 tokens each."""
    scheduler = scheduler_of(rank, argv)
    expect_few_tokens()
    return answer(scheduler, prompts, new_tokens)


def expect_few_tokens() -> None:
    """In a rank's process: have more requests admitted than the pool can hold at their end."""
    from sglang.srt.managers import schedule_policy

    schedule_policy.CLIP_MAX_NEW_TOKENS = 4


def abort_midway(scheduler: Any, prompt: Sequence[int], turns: int) -> Answer:
    """Admit a long request and abort it after so many passes; on every rank."""
    from sglang.srt.managers.io_struct import AbortReq

    scheduler.process_input_requests([generate_request("to-be-aborted", prompt, 2000)])
    (request,) = scheduler.waiting_queue
    for _ in range(turns):
        turn(scheduler)
    scheduler.process_input_requests([AbortReq(rid="to-be-aborted")])
    while not scheduler.is_fully_idle():
        turn(scheduler)
    scheduler.on_idle()
    return answer_to(request)


@torch.no_grad()  # as SGLang's loop does: some models have parameters that ask for a gradient
def turn(scheduler: Any) -> None:
    """One pass of the scheduler's loop."""
    plan = scheduler.get_next_batch_to_run(
        running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
    )
    scheduler.running_batch = plan.running_batch
    if batch := plan.batch_to_run:
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
    scheduler.last_batch = batch


def answer_to(request: Any) -> Answer:
    """What a request of a scheduler has been answered."""
    logprob = request.logprob
    top = zip(logprob.output_top_logprobs_idx, logprob.output_top_logprobs_val, strict=True)
    tokens = list(request.output_ids_through_stop)  # a verify pass may go on behind it
    completion = Completion(
        tokens,
        logprob.output_token_logprobs_val[: len(tokens)],
        [list(zip(*entries, strict=True)) for entries in top][: len(tokens)],
    )
    return Answer(
        completion,
        request.cached_tokens,
        request.finished_reason.to_json(),
        request.retraction_count,
        (request.spec_num_correct_drafts, request.spec_verify_ct),
    )


def generate_request(name: str, prompt: Sequence[int], new_tokens: int, **fields: Any) -> Any:
    """A request as the tokenizer manager hands it on: greedy, to the full length."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    sampling.normalize(None)
    return TokenizedGenerateReqInput(
        rid=name,
        input_text=None,
        input_ids=array("q", prompt),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
        return_logprob=True,
        logprob_start_len=-1,
        top_logprobs_num=5,
        token_ids_logprob=None,
        stream=False,
        **fields,
    )
