"""N-gram drafts over a sharded cache: many tokens a step, the same tokens as without."""

import shutil
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check, prompt
from srt.fresh import Fresh
from srt.models import serving
from srt.test_end_to_end import everything_is_free, serve

NEW_TOKENS = 6
LENGTHS = (1, 19, 33)


needs_compiler = pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("c++")),
    reason="SGLang compiles its n-gram corpus, with ninja and a C++ compiler",
)


@needs_compiler
def test_drafts_of_mla(ready: Fresh, tmp_path: Path) -> None:
    """As below, in schedulers without a server."""
    checkpoint = make_checkpoint("deepseek_v2", tmp_path / "mla", num_hidden_layers=2)
    flags = (
        *("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs", "--page-size", "1"),
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6"),
        *("--speculative-ngram-max-bfs-breadth", "4", "--speculative-ngram-capacity", "10000"),
    )
    batches = [*([prompt(length)] for length in LENGTHS), [prompt(length) for length in LENGTHS]]
    for report in serving.serve(ready, checkpoint, 2, flags, batches, NEW_TOKENS):
        for prompts, answers in zip(batches, report.answers, strict=True):
            for tokens, answer in zip(prompts, answers, strict=True):
                check(checkpoint, tokens, answer, NEW_TOKENS)
        assert all(answer.drafts[0] > NEW_TOKENS // 2 for answer in report.answers[-1])


@pytest.mark.server
@needs_compiler
def test_drafts_from_earlier_answers(tmp_path: Path) -> None:
    """The corpus learns each answer; asked again, it drafts it, in trees of several branches."""
    checkpoint = make_checkpoint("llama", tmp_path / "llama", num_hidden_layers=2)
    flags = (
        *("--attention-backend", "triton", "--cuda-graph-backend-decode", "disabled"),
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6"),
        *("--speculative-ngram-max-bfs-breadth", "4", "--speculative-ngram-capacity", "10000"),
        *("--page-size", "1", "--chunked-prefill-size", "16", "--max-running-requests", "4"),
    )
    with serve(checkpoint, 2, 2, "a2a", *flags, TRITON_INTERPRET="1") as server:
        for length in LENGTHS:
            answer = server.generate(prompt(length), NEW_TOKENS)
            check(checkpoint, prompt(length), answer, NEW_TOKENS)
        again = [server.generate(prompt(LENGTHS[0]), NEW_TOKENS)]
        again += server.generate_batch([prompt(length) for length in LENGTHS[1:]], NEW_TOKENS)
        for length, answer in zip(LENGTHS, again, strict=True):
            check(checkpoint, prompt(length), answer, NEW_TOKENS)
            assert answer.meta_info["spec_num_correct_drafts"] > NEW_TOKENS // 2
        everything_is_free(server)
