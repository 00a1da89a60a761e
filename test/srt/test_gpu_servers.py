"""Whole servers on CUDA: graphs, the overlap schedule, Triton's kernels and NCCL, one rank or more.

The oracle computes in fp32 and the servers in bf16, so a token counts only where the oracle's
choice is clear. A cache row lost or read twice moves log-probabilities by far more.
"""

import itertools
from pathlib import Path

import pytest
import torch
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.oracle import Completion, Oracle
from sglang_cpu_reference.server import Server
from srt import share_gpu
from srt.test_end_to_end import everything_is_free, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW_TOKENS = 8
CHUNK = 192
# bf16 against fp32, in log-probability: transformers' own bf16 differs by up to 0.2 here.
TOLERANCE = 0.4
LAYOUTS = {
    "tp 1": (1,),
    "ag_rs": (2, "--dcp-size", "2", "--dcp-comm-backend", "ag_rs"),
    "a2a": (2, "--dcp-size", "2", "--dcp-comm-backend", "a2a"),
    "symm": (2, "--dcp-size", "2", "--dcp-comm-backend", "symm"),
    "attn-tp 1": (2, "--attn-tp-size", "1"),
    "attn-tp 2 of 4": (4, "--attn-tp-size", "2"),
}
CASES = [
    *itertools.product(("llama", "deepseek_v2"), LAYOUTS, ("triton",)),
    *itertools.product(("deepseek_v2",), ("ag_rs", "a2a", "symm"), ("flashinfer",)),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": make_checkpoint("llama", root / "llama", head_dim=64),
        # The widths of the real model, which MLA kernels are written for.
        "deepseek_v2": make_checkpoint(
            "deepseek_v2", root / "deepseek_v2", qk_nope_head_dim=128, v_head_dim=128
        ),
    }


@pytest.mark.timeout(540)
@pytest.mark.parametrize(("family", "layout", "attention"), CASES)
def test_layout(checkpoints: dict[str, Path], family: str, layout: str, attention: str) -> None:
    ranks, *flags = LAYOUTS[layout]
    checkpoint = checkpoints[family]
    server = Server(
        checkpoint,
        *("--tp", str(ranks), *map(str, flags)),
        *("--attention-backend", attention, "--dtype", "bfloat16"),
        *("--mem-fraction-static", "0.1", "--max-total-tokens", "16384"),
        *("--chunked-prefill-size", str(CHUNK), "--cuda-graph-max-bs-decode", "16"),
        *share_gpu.FLAGS,
        platform=None,
        env=share_gpu.ENVIRONMENT,
        start_timeout=480,
    )
    if int(ranks) > torch.cuda.device_count():
        server.command[1:3] = ["-m", "srt.share_gpu"]
        server.env["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{server.env.get('PYTHONPATH', '')}"
    oracle = Oracle(checkpoint)
    clear = 0
    with server:
        prompts = [prompt(length) for length in (1, 2, 63, 64, 65, 2 * CHUNK + 3)]
        for tokens in prompts:
            answer = server.generate(tokens, NEW_TOKENS)
            clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        shared = prompts[-1] + prompt(5, seed=1)
        answer = server.generate(shared, NEW_TOKENS)
        assert answer.cached_tokens > 0
        clear += compared(answer.completion, oracle.generate(shared, NEW_TOKENS))
        # Batches of several sizes: graphs of several sizes, padded ones among them.
        for size in (3, 8, 13):
            batch = [prompt(20 + 17 * place, seed=size) for place in range(size)]
            answers = server.generate_batch(batch, NEW_TOKENS)
            for tokens, answer in zip(batch, answers, strict=True):
                clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        assert clear > 60
        log = server.log()
        assert "cuda graph: True" in log
        everything_is_free(server)


def compared(got: Completion, want: Completion) -> int:
    """Positions in which the oracle's choice is clear, up to the first where it is not."""
    for position, top in enumerate(want.top):
        if top[0][1] - top[1][1] < TOLERANCE:
            return position
        assert got.token_ids[position] == want.token_ids[position], f"token {position}"
        assert abs(got.logprobs[position] - want.logprobs[position]) < TOLERANCE
    return len(want.top)
