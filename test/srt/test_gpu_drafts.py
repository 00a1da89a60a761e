"""Draft models on CUDA: verify passes from captured graphs and eager ones, on servers.

As in `test_gpu_servers.py`, whose servers and comparison these are.
"""

from pathlib import Path

import pytest
import torch
from sglang.srt.runtime_context import get_platform
from sglang_cpu_reference import drafts
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.oracle import Oracle
from sglang_cpu_reference.server import Generation, Server
from sglang_helix.srt.layers.attention.adapters import adapter, serving
from srt import poison
from srt.expected import prompt
from srt.speculative.test_ngram import needs_compiler
from srt.test_end_to_end import everything_is_free
from srt.test_gpu_servers import ATTENTION, CHUNK, NEW_TOKENS, compared, gpu_server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [prompt(length) for length in (1, 2, 19, 40, 63, 64, 65, CHUNK + 3)]

DRAFTED = {
    "eagle": (lambda path: drafts.make_eagle(path, head_dim=64), "EAGLE"),
    # Wide enough for the draft's norm on CUDA, and all experts of all groups, as above.
    "mtp": (
        lambda path: drafts.make_mtp(
            path,
            hidden_size=512,
            qk_nope_head_dim=128,
            v_head_dim=128,
            num_experts_per_tok=8,
            topk_group=4,
        ),
        "NEXTN",
    ),
}
# Steps, branches and tokens.
SHAPES = {"chain": ("3", "1", "4"), "tree": ("2", "2", "5")}


def drafted_by(algorithm: str, draft: Path | None, shape: str) -> tuple[str, ...]:
    """A server's flags for drafts of a shape."""
    steps, topk, width = SHAPES[shape]
    return (
        *("--speculative-algorithm", algorithm, "--speculative-num-steps", steps),
        *("--speculative-eagle-topk", topk, "--speculative-num-draft-tokens", width),
        *(("--speculative-draft-model-path", str(draft)) if draft else ()),
    )


def sizes(attention: str, graphs: str) -> tuple[str, ...]:
    """Flags of every server here."""
    return (
        *("--max-total-tokens", "16384", "--chunked-prefill-size", str(CHUNK)),
        *("--page-size", str((adapter(attention).pages or (1,))[0])),
        *("--cuda-graph-backend-decode", graphs, "--decode-log-interval", "1"),
    )


def verified(server: Server, oracle: Oracle, graphs: str) -> list[Generation]:
    """Answers to `PROMPTS`, one alone and five at once, which graphs pad; all the oracle's."""
    answers = [server.generate(tokens, NEW_TOKENS) for tokens in PROMPTS[:3]]
    answers += server.generate_batch(PROMPTS[3:], NEW_TOKENS)
    clear = 0
    for tokens, answer in zip(PROMPTS, answers, strict=True):
        clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
    assert clear > 20
    passes = [line for line in server.log().splitlines() if "Decode batch" in line]
    assert {"cuda graph: True" in line for line in passes} == {graphs == "full"}
    return answers


@pytest.mark.timeout(1080)
@pytest.mark.parametrize(
    ("family", "layout", "attention", "shape", "graphs"),
    [
        ("eagle", "a2a", "triton", "chain", "disabled"),
        ("eagle", "symm", "fa3", "chain", "disabled"),
        ("eagle", "attn-tp 1", "triton", "tree", "disabled"),
        ("mtp", "a2a", "triton", "chain", "disabled"),
        ("mtp", "symm of 4", "triton", "tree", "disabled"),
        ("eagle", "a2a", "triton", "chain", "full"),
        ("eagle", "symm", "triton", "tree", "full"),
        ("mtp", "a2a", "triton", "chain", "full"),
        ("mtp", "symm of 4", "triton", "chain", "full"),
        ("mtp", "a2a", "fa3", "chain", "disabled"),
        ("eagle", "symm", "fa3", "chain", "full"),
        ("mtp", "symm of 4", "fa3", "chain", "full"),
        ("eagle", "symm", "flashinfer", "chain", "full"),
        ("mtp", "symm of 4", "flashinfer", "chain", "full"),
        ("mtp", "a2a", "flashmla", "chain", "full"),
    ],
)
def test_a_draft_model(
    tmp_path: Path,
    family: str,
    layout: str,
    attention: str,
    shape: str,
    graphs: str,
) -> None:
    """Answers are the oracle's where it is clear; as many drafts are right as on one rank.

    Counted where both answer the same: behind a token that bf16 turned over other drafts follow.
    And but for a few: bf16 rounds sums of another order to other drafts where two are close, and
    drafts behind the last token count too. Batches of one request and of five, which graphs pad.
    """
    if not adapter(attention).runs_on(get_platform(), "MLA" if family == "mtp" else "GQA"):
        pytest.skip(f"no kernels of {attention} for this GPU")
    make, algorithm = DRAFTED[family]
    target, draft = make(tmp_path)
    flags = (*drafted_by(algorithm, draft, shape), *sizes(attention, graphs))
    oracle, answered = Oracle(target), {}
    for name in ("tp 1", layout):
        with gpu_server(target, name, *flags, attention=attention) as server:
            answered[name] = verified(server, oracle, graphs)
            everything_is_free(server)
    same = [
        [answer.meta_info["spec_num_correct_drafts"] for answer in pair]
        for pair in zip(*answered.values(), strict=True)
        if len({tuple(answer.completion.token_ids) for answer in pair}) == 1
    ]
    assert len(same) > len(PROMPTS) // 2
    one, sharded = map(sum, zip(*same, strict=True))
    assert one > len(PROMPTS)
    assert abs(one - sharded) <= max(2, one // 10), same


# What captures verify passes.
CAPTURING = [
    (family, record.name)
    for family, attention in ATTENTION.items()
    for record in serving(attention)
    if attention in record.drafts_in_graphs
]


@pytest.mark.timeout(540)
@needs_compiler
@pytest.mark.parametrize(("family", "attention"), CAPTURING)
def test_what_padding_reads_reaches_no_draft(tmp_path: Path, family: str, attention: str) -> None:
    """Page 0 is NaN before every pass, and padded requests of a captured one read it.

    Drafts of MLA are n-grams, and no layer has experts: kernels that choose by scores of NaN are
    another matter.
    """
    if not adapter(attention).runs_on(get_platform(), ATTENTION[family]):
        pytest.skip(f"no kernels of {attention} for this GPU")
    if family == "llama":
        target, draft = drafts.make_eagle(tmp_path, head_dim=64)
        flags = drafted_by("EAGLE", draft, "chain")
    else:
        widths = {"qk_nope_head_dim": 128, "v_head_dim": 128}
        widths |= {"num_hidden_layers": 1, "first_k_dense_replace": 1}
        target = make_checkpoint("deepseek_v2", tmp_path, **widths)
        flags = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6")
        flags += ("--speculative-ngram-max-bfs-breadth", "1")
        flags += ("--speculative-ngram-capacity", "10000")
    flags += sizes(attention, "full")
    oracle = Oracle(target)
    with gpu_server(target, "a2a", *flags, attention=attention, launcher=poison.__name__) as server:
        verified(server, oracle, "full")
        # N-grams draft what was answered: 46 right ones on the CPU, 9 where a flush empties their
        # corpus before.
        again = verified(server, oracle, "full")
        assert poison.SAID in server.log()
        everything_is_free(server)
    right = sum(answer.meta_info["spec_num_correct_drafts"] for answer in again)
    assert right > (1 if family == "llama" else 2) * len(PROMPTS)
