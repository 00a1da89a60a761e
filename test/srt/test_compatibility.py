"""The compatibility table: its rows are complete, and a refusal says what, why and what instead.

test_server_args.py and test_refused_models.py start with every refused row that flags or a model
bring. Here are the others: rows of the machine, and rows that stand behind a refusal of SGLang's
own. Each is asked for by itself, on top of the resolved arguments and configuration of a server
that starts.
"""

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.__main__ import main
from sglang_helix.srt.compatibility.row import Row
from sglang_helix.srt.compatibility.rows.beside_own import BESIDE_OWN
from sglang_helix.srt.compatibility.situation import Situation, attn_tp_size_of
from sglang_helix.srt.compatibility.table import TABLE
from sglang_helix.srt.compatibility.verdict import Verdict, refusals
from srt.fresh import Fresh
from srt.test_server_args import ELSEWHERE, FLAGS, UPSTREAM

pytestmark = pytest.mark.quick

#: What asks for each feature: attributes of the arguments or of the model, or a variable.
#: "beside": further arguments, which are not what is refused.
ASKED: dict[str, dict[str, Any]] = {
    "one-kernel exchange without NVIDIA GPUs": {"args": {"dcp_comm_backend": "symm"}},
    "one-kernel exchange of heads that are not whole 16-byte vectors": {
        "args": {"dcp_comm_backend": "symm"},
        "beside": {"attention_backend": "triton"},
        "platform": {"is_cuda": True},
        "model": {"v_head_dim": 6},
    },
    "upstream's KV cache sharding": {"args": {"enable_kv_cache_sharding": True}},
    "diffusion language models": {"args": {"dllm_algorithm": "LowConfidence"}},
    "unified memory pool of GQA and MHA models": {"args": {"enable_unified_memory": True}},
    "other kinds of drafts": {"args": {"speculative_algorithm": "UNO"}},
    "hierarchical cache with draft models": {
        "args": {"enable_hierarchical_cache": True},
        "beside": {"speculative_algorithm": "EAGLE"},
    },
    "LMCache": {"args": {"enable_lmcache": True}},
    "other accelerators": {"platform": {"is_musa": True}},
    "head-major cache layout": {"env": {"SGLANG_USE_HND_KVCACHE": "1"}},
    "captured preparation of decode graphs": {"env": {"SGLANG_ENABLE_METADATA_GLUE_GRAPH": "1"}},
    "preparation of verify passes on a stream of its own": {
        "env": {"SGLANG_ENABLE_OVERLAP_PLAN_STREAM": "1"},
        "beside": {"speculative_algorithm": "EAGLE"},
    },
    "skipped softmax in decode": {
        "env": {"SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR": "0.5"},
        "beside": {"attention_backend": "trtllm_mla"},
    },
    "decoded K and V in the hierarchical cache": {
        "args": {"disaggregation_decode_enable_offload_kvcache": True},
        "beside": {"disaggregation_mode": "decode"},
    },
    "staged transfers": {
        "env": {"SGLANG_DISAGG_STAGING_BUFFER": "1"},
        "beside": {"disaggregation_mode": "decode"},
    },
    "sequence-parallel norms": {"args": {"enable_layernorm_sp": True}},
    "beam search": {"args": {"beam_width": 2}},
}


class Overlay:
    """An object with some attributes of its own before another's."""

    def __init__(self, below: Any, **own: Any) -> None:
        self.__dict__.update(own)
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


def refusals_of(model: str, asked: dict[str, Any], *layout: str) -> list[str]:
    """Where plugins are loaded: resolve a server that starts, ask for one thing more."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import prepare_server_args

    flags = ["--model-path", model, "--tp", "2", *layout, "--page-size", "16"]
    args = prepare_server_args(flags)
    args.resolve_once()
    config = model_config_of(args)
    assert refusals(Situation(resolved_view(args), config), Verdict("works")) == []
    view = Overlay(resolved_view(args), **asked.get("args", {}), **asked.get("beside", {}))
    env = mock.patch.dict(os.environ, asked.get("env", {}))
    with env, override_platform(**asked.get("platform", {})):
        config = Overlay(config, **asked.get("model", {}))
        return refusals(Situation(view, config, attn_tp_size_of(args)), Verdict("works"))


def refusals_of_all(
    model: str, cases: dict[str, tuple[dict[str, Any], tuple[str, ...]]]
) -> dict[str, list[str]]:
    """In a fresh process: `refusals_of` each case."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return {name: refusals_of(model, asked, *layout) for name, (asked, layout) in cases.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint("llama", tmp_path_factory.mktemp("m") / "llama"))


@pytest.fixture(scope="module")
def found(fresh: Fresh, model: str) -> Any:
    cases = {feature: (asked, ("--dcp-size", "2")) for feature, asked in ASKED.items()}
    return fresh.value(refusals_of_all, model, cases)


def test_rows_that_no_start_reaches_are_asked_for() -> None:
    behind = {feature for feature, (_, by) in FLAGS.items() if by == UPSTREAM}
    assert set(ASKED) == ELSEWHERE | behind


@pytest.mark.parametrize("feature", ASKED)
def test_refused_with_flag_value_reason_and_way_out(
    found: dict[str, list[str]], feature: str
) -> None:
    row, asked = next(row for row in TABLE if row.feature == feature), ASKED[feature]
    (message,) = found[feature]
    assert "--dcp-size 2" in message
    assert row.why in message
    assert row.instead in message
    assert row.flag in message
    for value in asked.get("args", {}).values():
        if isinstance(value, str | int) and value is not True:
            assert str(value) in message


def test_refused_in_words_of_the_flag_that_was_given(fresh: Fresh, model: str) -> None:
    cases = {"": (ASKED["LMCache"], ("--attn-tp-size", "1"))}
    (message,) = fresh.value(refusals_of_all, model, cases)[""]
    assert message == (
        "--enable-lmcache is not supported with --attn-tp-size 1: it stores whole pages. Leave the "
        "flag out, or leave --attn-tp-size out."
    )


def test_what_works_is_never_refused() -> None:
    for row in TABLE:
        if row.status == "works":
            assert row.refusal(Situation(SimpleNamespace(), SimpleNamespace())) is None


def test_rows_are_complete() -> None:
    rows = (*TABLE, *BESIDE_OWN)
    assert len({row.feature for row in rows}) == len(rows)
    for row in rows:
        assert row.why
        assert (row.status == "refused") == bool(row.instead)
        assert (row.status == "works") == (row.given is Row.given)


def test_nothing_that_sglang_serves_is_refused_without_proof() -> None:
    for row in (*TABLE, *BESIDE_OWN):
        assert row.status != "own" or row.by_sglang == "serves", row.feature
        # What SGLang serves stays its own until the series is proven to serve it.
        assert row.by_sglang != "serves" or row.status in ("own", "works"), row.feature
        assert row.status == "works" or row.by_sglang != "MLA", row.feature
        assert bool(row.proof) == (row.by_sglang in ("serves", "wrong")), row.feature


def test_every_column_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compatibility"]) == 0
    printed = capsys.readouterr().out
    for row in (*TABLE, *BESIDE_OWN):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {row.feature} |")]
        cells = line.split(" | ")
        assert cells[2:5] == [row.status, row.why, row.instead]
        assert cells[5].startswith(row.by_sglang)
        assert row.proof in cells[5]
