"""N-gram drafts over a sharded cache: many tokens a step, the same tokens as without."""

import itertools
import shutil
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check_all, prompt
from srt.fresh import Fresh
from srt.models.serving import serve

NEW_TOKENS = 6
LENGTHS = (1, 19, 33)


needs_compiler = pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("c++")),
    reason="SGLang compiles its n-gram corpus, with ninja and a C++ compiler",
)


@needs_compiler
@pytest.mark.parametrize(
    ("processes", "backend", "page", "breadth"),
    [
        ("ready", "torch_native", 1, 4),
        ("kernels", "flashmla", 64, 1),
        ("kernels", "flashinfer", 4, 4),
    ],
    ids=["torch_native", "flashmla", "flashinfer"],
)
def test_drafts_of_mla(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    processes: str,
    backend: str,
    page: int,
    breadth: int,
) -> None:
    """As below, of MLA and without an interpreter; kernels are stand-ins.

    In pages of several tokens SGLang verifies trees by FlashInfer alone.
    """
    # FlashInfer's prefill, FlashMLA's too, has kernels for the widths of real models.
    widths = {"qk_nope_head_dim": 128, "v_head_dim": 128}
    checkpoint = make_checkpoint("deepseek_v2", tmp_path / "mla", num_hidden_layers=2, **widths)
    flags = (
        *("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs", "--page-size", str(page)),
        *("--attention-backend", backend, "--cuda-graph-backend-decode", "disabled"),
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6"),
        *("--speculative-ngram-max-bfs-breadth", str(breadth)),
        *("--speculative-ngram-capacity", "10000"),
    )
    batches = [*([prompt(length)] for length in LENGTHS), [prompt(length) for length in LENGTHS]]
    fresh: Fresh = request.getfixturevalue(processes)
    for report in serve(fresh, checkpoint, 2, flags, batches, NEW_TOKENS):
        check_all(checkpoint, batches, report.answers, NEW_TOKENS)
        assert all(answer.drafts[0] > NEW_TOKENS // 2 for answer in report.answers[-1])


@needs_compiler
@pytest.mark.parametrize(
    ("processes", "backend", "page"),
    [("interpreted", "triton", 1), ("kernels", "flashinfer", 4)],
    ids=["triton", "flashinfer"],
)
def test_drafts_from_earlier_answers(
    request: pytest.FixtureRequest, tmp_path: Path, processes: str, backend: str, page: int
) -> None:
    """The corpus learns each answer; asked again, it drafts it, in trees of several branches."""
    checkpoint = make_checkpoint("llama", tmp_path / "llama", num_hidden_layers=2)
    flags = (
        *("--dcp-size", "2", "--dcp-comm-backend", "a2a", "--max-running-requests", "4"),
        *("--attention-backend", backend, "--cuda-graph-backend-decode", "disabled"),
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6"),
        *("--speculative-ngram-max-bfs-breadth", "4", "--speculative-ngram-capacity", "10000"),
        *("--page-size", str(page), "--chunked-prefill-size", "16"),
    )
    prompts = [prompt(length) for length in LENGTHS]
    batches = [*([tokens] for tokens in prompts), prompts[:1], prompts[1:]]
    fresh: Fresh = request.getfixturevalue(processes)
    for report in serve(fresh, checkpoint, 2, flags, batches, NEW_TOKENS):
        check_all(checkpoint, batches, report.answers, NEW_TOKENS)
        for answer in itertools.chain(*report.answers[-2:]):
            assert answer.drafts[0] > NEW_TOKENS // 2
