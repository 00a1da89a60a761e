"""SGLang's schedulers on stand-ins for the kernels of an attention backend, against transformers.

`fa3` and `fa4` are in `test_flashattention_backend.py`.
"""

from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check
from srt.fresh import Fresh
from srt.models.serving import serve
from srt.models.test_models import BATCHES, NEW_TOKENS

DCP = ("--dcp-size", "2", "--dcp-comm-backend", "a2a")
DECOUPLED = ("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs")
# FlashMLA's pages are 64 tokens of a rank; a chunk holds at least one page of all ranks.
CASES = [
    ("flashinfer", "llama", 2, DCP, 1, 70),
    ("flashinfer", "llama", 4, DECOUPLED, 16, 80),
    ("flashmla", "deepseek_v2", 2, DCP, 64, 128),
    ("flashmla", "deepseek_v2", 4, DECOUPLED, 64, 256),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    # Widths that the kernels exist for.
    widths = {"deepseek_v2": {"qk_nope_head_dim": 128, "v_head_dim": 128}}
    return {
        family: make_checkpoint(
            family, root / family, num_hidden_layers=2, **widths.get(family, {})
        )
        for family in ("llama", "deepseek_v2")
    }


@pytest.mark.parametrize(("backend", "family", "tp", "layout", "page", "chunk"), CASES)
def test_equals_transformers(
    kernels: Fresh,
    checkpoints: dict[str, Path],
    backend: str,
    family: str,
    tp: int,
    layout: tuple[str, ...],
    page: int,
    chunk: int,
) -> None:
    sizes = ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    rows = ("--max-total-tokens", str(max(512, 16 * page)))
    flags = ("--attention-backend", backend, *layout, *sizes, *rows)
    reports = serve(kernels, checkpoints[family], tp, flags, BATCHES, NEW_TOKENS)
    for report in reports:
        for prompts, answers in zip(BATCHES, report.answers, strict=True):
            for tokens, answer in zip(prompts, answers, strict=True):
                check(checkpoints[family], tokens, answer, NEW_TOKENS)
        if page < 64:  # else no prompt fills a page of all ranks
            assert report.answers[-1][0].cached_tokens > 0
