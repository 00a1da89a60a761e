"""Attention data parallelism: each replica of attention serves requests of its own.

The ranks of a replica shard its cache; experts and dense layers are on all ranks, which go through
every pass together: a replica without requests brings none, or one that is padding.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Server
from srt.expected import check, prompt
from srt.fresh import Fresh
from srt.models.serving import Answer, answer_to, command_line, generate_request, scheduler_of, turn
from srt.models.test_as_built import PLANNED

REPLICAS, KVP, PAGE, CHUNK = 2, 2, 4, 32
NEW_TOKENS = 4
LONG = prompt(2 * CHUNK + 5, seed=1)
#: Batches of prompts, which go to the replicas in turn. One alone; the edges of a page and of a
#: widened one, all at once; some that continue others in the cache of the same replica.
BATCHES = (
    (LONG,),
    tuple(prompt(length, seed=2) for length in (1, 3, 4, 5, 7, 8, 9)),
    (LONG + prompt(6, seed=3), prompt(3, seed=2) + prompt(20, seed=4), prompt(CHUNK + 1, seed=5)),
)
SIZES = (
    *("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK * REPLICAS)),
    *("--max-total-tokens", "512"),
)


def serve_replicas(rank: int, argv: list[str]) -> list[list[Answer]]:
    """In a rank's process: the answers to what its replica was asked of each batch."""
    scheduler = scheduler_of(rank, argv)
    from sglang.srt.runtime_context import get_parallel

    parallel, answers = get_parallel(), []
    assert (parallel.attn_dp_size, parallel.attn_dcp_size) == (REPLICAS, KVP)
    for prompts in BATCHES:
        own = prompts[parallel.attn_dp_rank :: REPLICAS]
        scheduler.process_input_requests(
            [generate_request(str(n), tokens, NEW_TOKENS) for n, tokens in enumerate(own)]
        )
        requests = list(scheduler.waiting_queue)
        while not all(parallel.tp_group.all_gather_object(scheduler.is_fully_idle())):
            turn(scheduler)
        scheduler.on_idle()  # ends the rank if a slot of its pool is lost
        answers.append([answer_to(request) for request in requests])
    return answers


DIVIDED = ("--attn-dp-size", "2", "--dcp-size", "2")
FORMER = ("--enable-dp-attention", "--dp-size", "2", "--attn-tp-size", "1")
FA3 = ("--dcp-comm-backend", "a2a", "--attention-backend", "fa3")


@pytest.mark.parametrize(
    ("family", "ranks", "flags"),
    [
        ("longcat_flash", 4, (*DIVIDED, "--dcp-comm-backend", "a2a")),
        ("qwen3_moe", 4, (*DIVIDED, *FA3)),
        ("qwen3_moe", 8, (*DIVIDED, "--dcp-comm-backend", "ag_rs")),
    ],
    ids=["longcat_flash", "qwen3_moe by fa3", "qwen3_moe on 2 head shards"],
)
def test_answers_equal_transformers(
    kernels: Fresh, tmp_path: Path, family: str, ranks: int, flags: tuple[str, ...]
) -> None:
    model = make_checkpoint(PLANNED.get(family, family), tmp_path / family, num_hidden_layers=2)
    answers = kernels.ranks(serve_replicas, ranks, command_line(model, ranks, *flags, *SIZES))
    cached: list[Any] = []
    for rank, of_rank in enumerate(answers):
        replica = rank // (ranks // REPLICAS)
        for prompts, of_batch in zip(BATCHES, of_rank, strict=True):
            own = prompts[replica::REPLICAS]
            for tokens, got in zip(own, of_batch, strict=True):
                check(model, tokens, got, NEW_TOKENS)
        cached.append([answer.cached_tokens for answer in of_rank[-1]])
    assert cached[0][0] >= 2 * CHUNK


@pytest.mark.server
def test_server(tmp_path: Path) -> None:
    """In the former spelling: answers, and the layout where an operator looks for it."""
    model = make_checkpoint("deepseek_v2", tmp_path / "model", num_hidden_layers=2)
    flags = (*FORMER, "--dcp-comm-backend", "a2a", "--enable-metrics")
    with Server(model, "--tp", "4", *flags, *SIZES) as server:
        for prompts in BATCHES:
            answers = server.generate_batch(prompts, NEW_TOKENS)
            for tokens, answer in zip(prompts, answers, strict=True):
                check(model, tokens, answer, NEW_TOKENS)
        info = server.server_info()
        assert (info["attn_dp_size"], info["attn_tp_size"], info["kvp_size"]) == (2, 1, 2)
        assert [rank["kv_tokens"] for rank in info["sglang_helix"]] == [512 * KVP] * 4
        ranks = set()
        for line in re.findall(r"sglang_helix:layout{(.*)} 1", server.get("/metrics")):
            said = dict(re.findall(r'(\w+)="([^"]*)"', line))
            assert (said["attn_tp_size"], said["dcp_size"], said["attn_shard"]) == ("1", "2", "0")
            ranks.add((said["tp_rank"], said["dp_rank"], said["dcp_rank"]))
        assert ranks == {("0", "0", "0"), ("1", "0", "1"), ("2", "1", "0"), ("3", "1", "1")}
        server.flush_cache()  # of both replicas, once nothing is held


def test_classes_that_know_no_replicas_are_refused(ready: Fresh, tmp_path: Path) -> None:
    """Llama's divides its heads by --tp-size, as it does in SGLang alone."""
    model = make_checkpoint("llama", tmp_path / "llama", num_hidden_layers=1)
    flags = ("--attn-dp-size", "2", "--dcp-size", "2", "--dcp-comm-backend", "a2a")
    argv = command_line(model, 4, *flags, *SIZES)
    for rank in ready.outcomes([(serve_replicas, rank, argv) for rank in range(4)]):
        assert rank.status == 1
        assert "does not support LlamaForCausalLM" in rank.output
        assert "Serve it without --attn-dp-size" in rank.output
