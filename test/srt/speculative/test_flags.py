"""Drafts that are refused by name, where a table of flags does not say enough."""

import itertools
from typing import Any

import pytest
from srt.resolved import Resolve
from srt.test_server_args import ASKABLE, CAPTURED_DRAFTS, EAGLE

NGRAM = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4}

# Verify passes: what captures them, what does where graphs are named, and what captures none.
REPLAYED = [("llama", "triton"), ("llama", "fa3")]
REPLAYED += [("deepseek_v2", backend) for backend in ("fa3", "flashinfer", "flashmla")]
CAPTURE = [*REPLAYED, ("llama", "fa4"), ("deepseek_v2", "fa4")]


@pytest.mark.parametrize(("family", "backend"), [*CAPTURE, ("llama", "trtllm_mha")])
def test_drafts_captured_by_what_no_gpu_was_seen_with_are_asked_for_by_name(
    resolved: Resolve, family: str, backend: str
) -> None:
    flags = {"tp_size": 4, "dcp_size": 2, **EAGLE, "attention_backend": backend, "page_size": 64}
    gpu = "Blackwell" if backend in ("fa4", "trtllm_mha") else "Hopper"
    row = ASKABLE[CAPTURED_DRAFTS]
    refused = f"{row.flag} full is not supported with --dcp-size 2: {row.why}. {row.instead}."
    named = resolved(gpu, family, **flags, cuda_graph_backend_decode="full").error
    unnamed = resolved(gpu, family, **flags).error
    assert (unnamed == "") if (family, backend) in REPLAYED else (refused in unnamed)
    assert (named == "") if (family, backend) in CAPTURE else (refused in named)


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("drafts", [EAGLE, NGRAM], ids=["EAGLE", "NGRAM"])
def test_no_drafts_in_prefill_decode_disaggregation(
    resolved: Resolve, drafts: dict[str, Any], mode: str, family: str
) -> None:
    row = ASKABLE["drafts in prefill-decode disaggregation"]
    flags = {"tp_size": 4, "dcp_size": 2, "page_size": 1, **drafts, "disaggregation_mode": mode}
    error = resolved("Hopper", family, **flags).error
    assert f"{row.flag} {mode} is not supported with --dcp-size 2: {row.why}" in error


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_no_drafts_in_pipeline_stages(resolved: Resolve, family: str) -> None:
    """N-grams too: no draft model has to be handed on, but what was accepted does."""
    row = ASKABLE["drafts in pipeline stages"]
    flags = {"tp_size": 4, "dcp_size": 2, "page_size": 1, "attention_backend": "triton"}
    for drafts in (EAGLE, NGRAM):
        error = resolved("Hopper", family, **flags, **drafts, pp_size=2).error
        refusal = f"{row.flag} 2 is not supported with --dcp-size 2: {row.why}. {row.instead}."
        assert refusal in error
        assert resolved("Hopper", family, **flags, **drafts).error == ""


def test_a_backend_that_verifies_no_drafts_is_refused(resolved: Resolve) -> None:
    flags = {"tp_size": 4, "dcp_size": 2, **EAGLE, "attention_backend": "trtllm_mla"}
    error = resolved(
        "Blackwell", "deepseek_v2", **flags, page_size=64, cuda_graph_backend_decode="disabled"
    ).error
    assert "does not verify the drafts of --speculative-algorithm EAGLE for MLA" in error
    assert "flashinfer" in error  # what does


@pytest.mark.parametrize("algorithm", ["DFLASH", "DSPARK", "FROZEN_KV_MTP"])
def test_other_kinds_of_drafts_get_one_error(
    resolved: Resolve, models: dict[str, str], algorithm: str
) -> None:
    """SGLang takes these. Of MLA they are its own, by a backend that is Blackwell's alone."""
    for machine, (family, start, end) in itertools.product(
        ("Hopper", "Blackwell"),
        (
            (
                "llama",
                f"--speculative-algorithm {algorithm} is not supported with --dcp-size 2: ",
                "Use EAGLE, EAGLE3, NEXTN, STANDALONE or NGRAM, or leave the flag or --dcp-size "
                "out.",
            ),
            (
                "deepseek_v2",
                "--attention-backend ",
                "its verify pass returns no LSE. Use --attention-backend cutedsl_mla, on "
                "Blackwell, or EAGLE, EAGLE3, NEXTN, STANDALONE or NGRAM by another backend, which "
                "the series serves.",
            ),
        ),
    ):
        flags = {"speculative_algorithm": algorithm, "page_size": 1}
        flags |= {"speculative_draft_model_path": models[family]}
        flags |= {"speculative_num_draft_tokens": 4} if algorithm == "DFLASH" else {}
        error = resolved(machine, family, tp_size=4, dcp_size=2, **flags).error
        assert error.startswith(f"ValueError: {start}")
        assert error.endswith(end)
        assert error.count("\n") == 0
