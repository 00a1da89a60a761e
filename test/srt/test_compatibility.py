"""Every refused row of the compatibility table refuses, and says what, why and what instead.

Each row is asked for by itself, on top of the resolved arguments and configuration of a server that
starts. Some are also typed on the command line, to see that resolution reaches the table.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.configs.model_config import AttentionArch
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.srt.compatibility import TABLE, Row, Situation, refusals
from srt.fresh import Fresh
from srt.test_attn_tp_flags import command_line

REFUSED = {row.feature: row for row in TABLE if row.status == "refused"}

#: What asks for each refused feature: attributes of the arguments or of the model, or a variable.
#: "beside": further arguments, which are not what is refused.
ASKED: dict[str, dict[str, Any]] = {
    "one-kernel exchange without NVIDIA GPUs": {"args": {"dcp_comm_backend": "symm"}},
    "one-kernel exchange of heads that are not whole 16-byte vectors": {
        "args": {"dcp_comm_backend": "symm"},
        "beside": {"attention_backend": "triton"},
        "platform": {"is_cuda": True},
        "model": {"v_head_dim": 6},
    },
    "one-kernel exchange of the reference backend": {
        "args": {"dcp_comm_backend": "symm"},
        "platform": {"is_cuda": True},
    },
    "prefill chunk shorter than a widened page": {"args": {"chunked_prefill_size": 16}},
    "attention data parallelism": {"args": {"attn_dp_size": 2}},
    "prefill context parallelism": {"args": {"attn_cp_size": 2}},
    "upstream's KV cache sharding": {"args": {"enable_kv_cache_sharding": True}},
    "speculative decoding, but with n-gram drafts": {"args": {"speculative_algorithm": "EAGLE"}},
    "n-gram drafts of MLA models": {
        "args": {"speculative_algorithm": "NGRAM"},
        "model": {"attention_arch": AttentionArch.MLA, "kv_lora_rank": 512},
    },
    "n-gram drafts verified in CUDA graphs": {
        "args": {
            "speculative_algorithm": "NGRAM",
            "cuda_graph_config": SimpleNamespace(
                prefill=SimpleNamespace(backend="disabled"),
                decode=SimpleNamespace(backend="full"),
            ),
        }
    },
    "diffusion language models": {"args": {"dllm_algorithm": "LowConfidence"}},
    "prefill-decode disaggregation": {"args": {"disaggregation_mode": "decode"}},
    "storage behind the hierarchical cache, but for MLA in files": {
        "args": {"hicache_storage_backend": "file"}
    },
    "LMCache": {"args": {"enable_lmcache": True}},
    "HiSparse": {"args": {"enable_hisparse": True}},
    "FlexKV": {"args": {"enable_flexkv": True}},
    "external cache linker": {"args": {"enable_unified_cache_external_linker": True}},
    "prefix caches of other plugins": {"args": {"radix_cache_backend": "somebodys"}},
    "streaming sessions": {"args": {"enable_streaming_session": True}},
    "sessions in the prefix tree": {"args": {"enable_session_radix_cache": True}},
    "cache canary": {"args": {"kv_canary": "log"}},
    "FP4 and MXFP8 caches": {"args": {"kv_cache_dtype": "nvfp4"}},
    "other accelerators than CUDA": {"platform": {"is_hip": True}},
    "bitsandbytes weights of GQA and MHA models": {"args": {"load_format": "bitsandbytes"}},
    "weights saved in shards, of GQA and MHA models": {"args": {"load_format": "sharded_state"}},
    "weight cache": {"args": {"weight_cache_mode": "daemon"}},
    "NCCL symmetric memory": {"args": {"enable_symm_mem": True}},
    "multi-item scoring": {"args": {"enable_mis": True}},
    "switching disaggregation roles": {"args": {"enable_pd_role_switch": True}},
    "unified memory pool": {"args": {"enable_unified_memory": True}},
    "LoRA": {"args": {"enable_lora": True}},
    "two-batch overlap": {"args": {"enable_two_batch_overlap": True}},
    "prefill-decode multiplexing": {"args": {"enable_pdmux": True}},
    "torch.compile of the model": {"args": {"enable_torch_compile": True}},
    "prefill CUDA graphs": {
        "args": {"cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="full"))}
    },
    "deterministic inference": {"args": {"enable_deterministic_inference": True}},
    "elastic expert parallelism": {"args": {"elastic_ep_backend": "mooncake"}},
    "Ray": {"args": {"use_ray": True}},
    "head-major cache layout": {"env": {"SGLANG_USE_HND_KVCACHE": "1"}},
    "sliding-window attention": {"model": {"is_hybrid_swa": True}},
    "chunked local attention": {"model": {"attention_chunk_size": 8192}},
    "encoder-decoder models": {"model": {"is_encoder_decoder": True}},
    "hybrid linear attention": {"hf_config": "Qwen3NextConfig"},
    "attention sinks": {"model": {"has_attention_sinks": True}},
    "sparse attention (DSA, DeepSeek-V4, MiniMax-M3)": {
        "hf_attributes": {"architectures": ["DeepseekV32ForCausalLM"], "index_topk": 64}
    },
    "dual chunk attention": {"hf_attributes": {"dual_chunk_attention_config": {}}},
}


class Overlay:
    """An object with some attributes of its own before another's."""

    def __init__(self, below: Any, **own: Any) -> None:
        self.__dict__.update(own)
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


def refusals_of(model: str, asked: dict[str, Any]) -> list[str]:
    """In a fresh process: resolve a server that starts, ask for one thing more."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import prepare_server_args

    flags = ["--model-path", model, "--tp", "2", "--dcp-size", "2", "--page-size", "16"]
    args = prepare_server_args(flags)
    args.resolve_once()
    config = model_config_of(args)
    assert refusals(Situation(resolved_view(args), config)) == []
    os.environ.update(asked.get("env", {}))
    own = dict(asked.get("model", {}))
    if "hf_config" in asked:
        import sglang.srt.configs as configs

        hybrid = getattr(configs, asked["hf_config"])()
        hybrid.architectures = ["Qwen3NextForCausalLM"]
        own |= {"hf_config": hybrid, "hf_text_config": hybrid}
    if "hf_attributes" in asked:
        own["hf_config"] = Overlay(config.hf_config, **asked["hf_attributes"])
    view = Overlay(resolved_view(args), **asked.get("args", {}), **asked.get("beside", {}))
    with override_platform(**asked.get("platform", {})):
        return refusals(Situation(view, Overlay(config, **own)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint("llama", tmp_path_factory.mktemp("m") / "llama"))


def test_every_refused_row_has_its_case() -> None:
    assert set(ASKED) >= set(REFUSED), set(REFUSED) - set(ASKED)


@pytest.mark.parametrize("feature", REFUSED)
def test_refused_with_flag_value_reason_and_way_out(fresh: Fresh, model: str, feature: str) -> None:
    row, asked = REFUSED[feature], ASKED[feature]
    found = fresh.outcome(refusals_of, model, asked)
    assert found.status == 0, found.output[-2000:]
    assert len(found.value) == 1
    message = found.value[0]
    assert "--dcp-size 2" in message
    assert row.why in message
    assert row.instead in message
    assert row.flag in message
    for value in asked.get("args", {}).values():
        if isinstance(value, str | int) and value is not True:
            assert str(value) in message


def test_what_works_is_never_refused() -> None:
    for row in TABLE:
        if row.status == "works":
            assert row.refusal(Situation(SimpleNamespace(), SimpleNamespace())) is None


def test_rows_are_complete() -> None:
    assert len({row.feature for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.why
        assert (row.status == "refused") == bool(row.instead)
        assert row.given is not Row.given if row.status == "refused" else True


TYPED = {
    "--dcp-comm-backend": ("--dcp-comm-backend", "symm"),
    "--enable-lora": ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all"),
    "--enable-two-batch-overlap": ("--enable-two-batch-overlap",),
    "--cuda-graph-backend-decode": (
        *("--speculative-algorithm", "NGRAM", "--cuda-graph-backend-decode", "full"),
        *("--attention-backend", "triton"),
    ),
    "--chunked-prefill-size": ("--chunked-prefill-size", "16", "--page-size", "16"),
    "--hicache-storage-backend": (
        "--enable-hierarchical-cache",
        "--hicache-storage-backend",
        "file",
    ),
    "--disaggregation-mode": ("--disaggregation-mode", "prefill"),
}


@pytest.mark.parametrize("flag", TYPED)
def test_refused_on_the_command_line(fresh: Fresh, model: str, flag: str) -> None:
    base = ("--model-path", model, "--tp", "2")
    refused = fresh.outcome(command_line, *base, "--dcp-size", "2", *TYPED[flag])
    assert refused.status != 0
    assert re.search(rf"Error: .*({flag}|HiCache)", refused.output), refused.output[-1500:]


UNADAPTED = ["fa3", "fa4", "flashinfer", "flashmla", "trtllm_mha", "flex_attention", "aiter"]


SIDES = {
    "attention": (),
    "prefill-attention": ("--decode-attention-backend", "torch_native"),
    "decode-attention": ("--prefill-attention-backend", "torch_native"),
}


@pytest.mark.parametrize(
    ("backend", "side"),
    [(backend, "attention") for backend in UNADAPTED] + [("fa3", side) for side in list(SIDES)[1:]],
)
def test_backends_without_an_adapter_are_refused_by_name(
    fresh: Fresh, model: str, backend: str, side: str
) -> None:
    base = ("--model-path", model, "--tp", "2", "--dcp-size", "2")
    outcome = fresh.outcome(command_line, *base, f"--{side}-backend", backend, *SIDES[side])
    assert outcome.status != 0
    # Some are refused before the series is asked: what they need is not on this machine.
    if "does not serve" in outcome.output:
        assert f"--{side}-backend {backend} does not serve GQA" in outcome.output
        assert "use one of triton, torch_native" in outcome.output


def test_at_least_the_hopper_defaults_are_refused_by_the_series(fresh: Fresh, model: str) -> None:
    base = ("--model-path", model, "--tp", "2", "--dcp-size", "2")
    for backend in ("fa3", "flashinfer"):
        output = fresh.outcome(command_line, *base, "--attention-backend", backend).output
        assert f"--attention-backend {backend} does not serve GQA" in output, output[-1500:]


def backend_chosen(model: str, default: str, *flags: str) -> str:
    """The backend that is served with where SGLang would choose `default` by itself."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.server_args import prepare_server_args

    @register_resolution_hook("handle_model_specific_adjustments")
    def choose(server_args: Any, previous: Any) -> None:
        previous(server_args)
        declare_resolution(server_args, "test", attention_backend=default)

    args = prepare_server_args(["--model-path", model, "--tp", "2", *flags])
    args.resolve_once()
    return str(resolved_view(args).attention_backend)


def test_a_default_without_an_adapter_gives_way_and_it_is_said(fresh: Fresh, model: str) -> None:
    chosen = fresh.outcome(backend_chosen, model, "flex_attention", "--dcp-size", "2")
    assert chosen.value == "torch_native", chosen.output[-1500:]
    assert "--attention-backend torch_native: the default here, flex_attention" in chosen.output


def test_a_default_stays_where_the_cache_is_whole(fresh: Fresh, model: str) -> None:
    assert fresh.value(backend_chosen, model, "flex_attention") == "flex_attention"


def test_without_a_sharded_cache_nothing_is_refused(fresh: Fresh, model: str) -> None:
    found = fresh.value(command_line, "--model-path", model, "--tp", "2", "--enable-mixed-chunk")
    assert found["dcp_size"] == 1


def resolved_fields(model: str) -> dict[str, str]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    args = prepare_server_args(["--model-path", model, "--tp", "2", "--random-seed", "1"])
    args.resolve_once()
    view = resolved_view(args)
    return {name: repr(getattr(view, name)) for name in ServerArgs.__struct_fields__}


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_resolved_configuration_is_the_same_without_the_plugin(
    fresh: Fresh, tmp_path: Path, family: str
) -> None:
    model = str(make_checkpoint(family, tmp_path / family))
    with_plugin = fresh.outcome(resolved_fields, model)
    without = fresh.outcome(resolved_fields, model, SGLANG_PLUGINS="cpu_reference")
    assert with_plugin.status == without.status == 0, without.output[-1500:]
    assert with_plugin.value == without.value
    assert len(without.value) > 300
