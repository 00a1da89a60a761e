"""What the series resolves or refuses: exchanges, sizes, rows of the table that have a flag."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES
from sglang_cpu_reference.server import free_port
from sglang_helix.check import MACHINES, facts_of
from sglang_helix.srt.compatibility.table import TABLE
from srt.fresh import Fresh
from srt.rank import become_rank
from srt.resolved import WORKING, Resolve, written

# The communication backend.


def test_fi_a2a_is_mlas_alone(resolved: Resolve) -> None:
    layout = {"tp_size": 4, "dcp_size": 2}
    explicit = resolved("Blackwell", "llama", dcp_comm_backend="fi_a2a", **layout)
    assert "--dcp-comm-backend fi_a2a is not supported with --dcp-size 2: it serves MLA models" in (
        explicit.error
    )
    assert "Use --dcp-comm-backend a2a." in explicit.error
    default = resolved("Blackwell", "llama", **layout)
    assert default.args["dcp_comm_backend"] == "a2a"
    assert "--dcp-comm-backend: a2a in place of fi_a2a" in default.said
    projected = resolved("Blackwell", "deepseek_v2", dcp_replicate_v_proj=True, **layout)
    assert projected.args["dcp_comm_backend"] == "a2a", projected.error
    assert "a2a in place of fi_a2a, which exchanges latents" in projected.said
    for flags in ({}, {"dcp_comm_backend": "fi_a2a"}):
        latent = resolved("Blackwell", "deepseek_v2", **layout, **flags)
        assert latent.args["dcp_comm_backend"] == "fi_a2a", latent.error
        assert "fi_a2a" not in latent.said


@pytest.mark.parametrize("family", WORKING)
@pytest.mark.parametrize("backend", ["a2a", "ag_rs", "symm"])
def test_a_named_exchange_is_kept(resolved: Resolve, family: str, backend: str) -> None:
    for machine in MACHINES:
        found = resolved(machine, family, tp_size=4, dcp_size=2, dcp_comm_backend=backend)
        assert found.args["dcp_comm_backend"] == backend, found.error


@pytest.mark.parametrize("family", WORKING)
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_symm_on_either_side_of_a_transfer(resolved: Resolve, family: str, mode: str) -> None:
    flags = {"tp_size": 4, "dcp_size": 2, "page_size": 16, "attention_backend": "triton"}
    asked = {"disaggregation_mode": mode, "dcp_comm_backend": "symm"}
    found = resolved("Hopper", family, **flags, **asked)
    assert found.args["dcp_comm_backend"] == "symm", found.error


def test_symm_without_a_sharded_cache(resolved: Resolve) -> None:
    said = resolved("Hopper", "llama", tp_size=4, dcp_comm_backend="symm").error
    assert "--dcp-comm-backend symm exchanges between the ranks that split a cache" in said
    assert "give --dcp-size or --attn-tp-size too" in said


@pytest.mark.parametrize(("nodes", "tp_size", "kept"), [(2, 4, (2,)), (4, 8, (2,)), (2, 8, (2, 4))])
def test_symm_stays_inside_of_a_host(
    resolved: Resolve, nodes: int, tp_size: int, kept: tuple[int, ...]
) -> None:
    place = {"nnodes": nodes, "node_rank": 1, "dist_init_addr": "127.0.0.1:1"}
    flags = {**place, "tp_size": tp_size, "dcp_comm_backend": "symm", "attention_backend": "triton"}
    for size in (size for size in range(2, tp_size + 1) if tp_size % size == 0):
        error = resolved("Hopper", "deepseek_v2", dcp_size=size, **flags).error
        assert ("on several hosts" in error) == (size not in kept)


def test_unset_keeps_sglangs_choice(resolved: Resolve) -> None:
    for machine in ("Ampere", "Hopper"):
        assert resolved(machine, "llama", tp_size=4, dcp_size=2).args["dcp_comm_backend"] == "a2a"


def test_sglangs_own_refusals_stay(resolved: Resolve) -> None:
    assert "requires --dcp-size" in resolved("Hopper", "llama", dcp_comm_backend="a2a").error
    assert "must be >= 1" in resolved("Hopper", "llama", tp_size=2, dcp_size=0).error
    prefill = resolved("Hopper", "llama", tp_size=2, dcp_size=2, enable_prefill_cp=True)
    assert "--enable-prefill-cp" in prefill.error


# Sizes.


@pytest.mark.parametrize(
    ("tp_size", "dcp_size", "complaint"),
    [
        (6, 4, "--dcp-size 4 does not divide --tp-size 6: use one of [1, 2, 3, 6]"),
        (2, 4, "--dcp-size 4 does not divide --tp-size 2: use one of [1, 2]"),
        (3, 3, "--dcp-size 3 with --tp-size 3: {heads} query heads cannot be split over 3 ranks"),
    ],
)
@pytest.mark.parametrize("family", WORKING)
def test_sizes_that_cannot_be_laid_out(
    resolved: Resolve, family: str, tp_size: int, dcp_size: int, complaint: str
) -> None:
    heads = FAMILIES[family].config["num_attention_heads"]
    found = resolved("Hopper", family, tp_size=tp_size, dcp_size=dcp_size)
    assert complaint.format(heads=heads) in found.error


def test_heads_name_the_sizes_that_work(resolved: Resolve, tmp_path: Path) -> None:
    model = written(
        tmp_path,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_attention_heads=24,
        num_key_value_heads=4,
        hidden_size=768,
    )
    found = resolved("Hopper", model, tp_size=12, dcp_size=2)
    assert "4 key-value heads and 6 attention shards" in found.error
    assert "--dcp-size 2 with --tp-size 12" in found.error
    assert "use one of [1, 3, 6, 12]" in found.error
    for size in (1, 3, 6, 12):
        assert resolved("Hopper", model, tp_size=12, dcp_size=size).error == ""


@pytest.mark.parametrize(
    ("chunk", "fits"), [(1, False), (127, False), (128, True), (200, True), (-1, True)]
)
def test_a_chunk_holds_a_widened_page(resolved: Resolve, chunk: int, fits: bool) -> None:
    flags = {"page_size": 64, "chunked_prefill_size": chunk}
    found = resolved("Hopper", "llama", tp_size=4, dcp_size=2, **flags)
    assert (found.error == "") == fits, found.error
    if not fits:
        assert f"--chunked-prefill-size {chunk} is not supported with --dcp-size 2" in found.error
        assert "Use a larger chunk or a smaller --page-size" in found.error
    assert resolved("Hopper", "llama", tp_size=4, **flags).error == ""


@pytest.mark.parametrize(
    ("machine", "family", "size", "works"),
    [("Hopper", "llama", 8, [2, 4]), ("Blackwell", "deepseek_v2", 8, [2, 4])],
)
def test_attention_replicas_name_the_sizes_that_work(
    resolved: Resolve, machine: str, family: str, size: int, works: list[int]
) -> None:
    """4 ranks each: 8 are not within one."""
    asked = {"tp_size": 8, "attn_dp_size": 2, "attention_backend": "triton"}
    if family == "deepseek_v2":
        asked["attention_backend"] = "flashinfer"
    found = resolved(machine, family, dcp_size=size, **asked)
    assert "--attn-dp-size 2 is not supported with" in found.error
    named = " or ".join(map(str, works))
    assert found.error.endswith(f", or --dcp-size {named} beside --attn-dp-size.")
    for each in works:
        assert resolved(machine, family, launched=True, dcp_size=each, **asked).error == ""


@pytest.mark.parametrize("layout", [{"dcp_size": 2}, {"attn_tp_size": 2}])
def test_attention_replicas_divide_the_ranks(resolved: Resolve, layout: dict[str, int]) -> None:
    found = resolved("Hopper", "llama", tp_size=8, attn_dp_size=3, **layout)
    assert "--attn-dp-size 3 does not divide --tp-size 8: use one of [1, 2, 4, 8]" in found.error


@pytest.mark.parametrize(
    "beside",
    [
        {"dcp_comm_backend": "symm", "attention_backend": "triton"},
        {"pp_size": 2},
        {"nnodes": 2, "node_rank": 0, "dist_init_addr": "127.0.0.1:1"},
        {"enable_hierarchical_cache": True},
        {"enable_mixed_chunk": True},
        {"enable_dp_lm_head": True},
        {"moe_dense_tp_size": 1},
        {"enable_dp_attention_local_control_broadcast": True},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_what_is_untried_beside_attention_replicas(
    resolved: Resolve, beside: dict[str, Any]
) -> None:
    flags = {"tp_size": 4, "attn_dp_size": 2, "dcp_size": 2, "page_size": 1}
    assert resolved("Hopper", "llama", **flags).error == ""
    found = resolved("Hopper", "llama", **{**flags, **beside})
    assert "it has not been tried beside drafts, windows, " in found.error


# Rows of the compatibility table, as a user would ask for them.

UPSTREAM = "SGLang refuses it first"
EAGLE = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}
DECODE = {"disaggregation_mode": "decode"}
NIXL = "prefill-decode disaggregation of GQA and MHA models by NIXL, Mori and others"
# Feature: flags, and how the error begins where it is not the row's own.
FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "prefill chunk shorter than a widened page": ({"chunked_prefill_size": 1}, ""),
    "prefill chunks of changing size": ({"enable_dynamic_chunking": True}, ""),
    "mixed chunk of MLA models": ({"enable_mixed_chunk": True}, ""),
    "FlashInfer's all-to-all of GQA and MHA models": ({"dcp_comm_backend": "fi_a2a"}, ""),
    "value projection before FlashInfer's all-to-all": (
        {"dcp_replicate_v_proj": True, "dcp_comm_backend": "fi_a2a"},
        "",
    ),
    "value projection before the exchange, of GQA and MHA models": (
        {"dcp_replicate_v_proj": True},
        "",
    ),
    "other attention data parallelism": ({"attn_dp_size": 4}, ""),
    "attention data parallelism beside what is untried": ({"attn_dp_size": 2, **EAGLE}, ""),
    "prefill context parallelism": ({"attn_cp_size": 2}, ""),
    "upstream's KV cache sharding": (
        {"enable_kv_cache_sharding": True, "disaggregation_mode": "prefill"},
        UPSTREAM,
    ),
    "other kinds of drafts": ({"speculative_algorithm": "UNO"}, UPSTREAM),
    "drafts whose number adapts": ({"speculative_adaptive": True, **EAGLE}, ""),
    "several draft layers that are models of their own": (
        {"enable_multi_layer_eagle": True, **EAGLE},
        "",
    ),
    "drafts accepted by rejection sampling": (
        {"speculative_use_rejection_sampling": True, **EAGLE},
        "",
    ),
    "drafts in pipeline stages": ({"pp_size": 2, **EAGLE}, ""),
    "hierarchical cache with draft models": (
        {"enable_hierarchical_cache": True, **EAGLE},
        UPSTREAM,
    ),
    "trees of drafts read by other backends than triton": (
        {
            "speculative_eagle_topk": 2,
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": 2,
            "speculative_num_draft_tokens": 5,
            "speculative_draft_attention_backend": "fa3",
        },
        "",
    ),
    "drafts in prefill-decode disaggregation": (
        {"disaggregation_mode": "decode", **EAGLE},
        "",
    ),
    "decode CUDA graphs in pieces": ({"cuda_graph_backend_decode": "breakable"}, ""),
    "diffusion language models": ({"dllm_algorithm": "LowConfidence"}, UPSTREAM),
    NIXL: ({"disaggregation_transfer_backend": "nixl", **DECODE}, ""),
    "decoded K and V in the hierarchical cache": (
        {"disaggregation_decode_enable_offload_kvcache": True, **DECODE},
        UPSTREAM,
    ),
    "checksums of what is transferred": ({"disaggregation_enable_kv_checksum": True, **DECODE}, ""),
    "other storage behind the hierarchical cache": (
        {"hicache_storage_backend": "nixl", "enable_hierarchical_cache": True},
        "",
    ),
    "LMCache": ({"enable_lmcache": True}, UPSTREAM),
    "HiSparse": ({"enable_hisparse": True}, ""),
    "FlexKV": ({"enable_flexkv": True}, ""),
    "external cache linker": ({"enable_unified_cache_external_linker": True}, ""),
    "prefix caches of other plugins": ({"radix_cache_backend": "somebodys"}, ""),
    "streaming sessions": ({"enable_streaming_session": True}, ""),
    "sessions in the prefix tree": ({"enable_session_radix_cache": True}, ""),
    "cache canary": ({"kv_canary": "log"}, ""),
    # Backends that SGLang itself does not take with it never come to the table.
    "FP4 and MXFP8 caches": ({"kv_cache_dtype": "nvfp4", "attention_backend": "flashinfer"}, ""),
    "unified memory pool of GQA and MHA models": ({"enable_unified_memory": True}, UPSTREAM),
    "LoRA of GQA and MHA models": ({"enable_lora": True}, ""),
    "bitsandbytes weights of GQA and MHA models": ({"load_format": "bitsandbytes"}, ""),
    "weights saved in shards, of GQA and MHA models": ({"load_format": "sharded_state"}, ""),
    "weights of MLA models kept on the CPU": ({"cpu_offload_gb": 4}, ""),
    "groups of layers of MLA models kept on the CPU": ({"offload_group_size": 2}, ""),
    "weight cache": ({"weight_cache_mode": "daemon"}, ""),
    "NCCL symmetric memory": ({"enable_symm_mem": True}, ""),
    "multi-item scoring": ({"enable_mis": True, "attention_backend": "flashinfer"}, ""),
    "switching disaggregation roles": ({"enable_pd_role_switch": True}, ""),
    "two-batch overlap": ({"enable_two_batch_overlap": True}, ""),
    "sequence-parallel norms": ({"enable_layernorm_sp": True}, UPSTREAM),
    "NVIDIA megakernel": ({"enable_nvidia_megakernel": True}, ""),
    "prefill-decode multiplexing": ({"enable_pdmux": True}, ""),
    "torch.compile of the model": ({"enable_torch_compile": True}, ""),
    "prefill CUDA graphs": ({"cuda_graph_backend_prefill": "breakable"}, ""),
    "deterministic inference": ({"enable_deterministic_inference": True}, ""),
    "elastic expert parallelism": ({"elastic_ep_backend": "mooncake"}, ""),
    "Ray": ({"use_ray": True}, ""),
    "one-kernel exchange in pipeline stages": (
        {"dcp_comm_backend": "symm", "pp_size": 2, "attention_backend": "triton"},
        "",
    ),
    "one-kernel exchange between hosts": (
        {
            "dcp_comm_backend": "symm",
            "attention_backend": "triton",
            "nnodes": 4,
            "node_rank": 0,
            "dist_init_addr": "127.0.0.1:1",
        },
        "",
    ),
    "one-kernel exchange of the reference backend": (
        {"dcp_comm_backend": "symm", "attention_backend": "torch_native"},
        "",
    ),
}
# Of MLA, SGLang serves the first by itself (test_verdicts.py), and the series the others.
SGLANGS_OWN_FOR_MLA = {
    "attention data parallelism beside what is untried",
    "other kinds of drafts",
    NIXL,
    "decoded K and V in the hierarchical cache",
    "unified memory pool of GQA and MHA models",
    "LoRA of GQA and MHA models",
}
GQA_ALONE = {
    "FlashInfer's all-to-all of GQA and MHA models",
    "bitsandbytes weights of GQA and MHA models",
    "weights saved in shards, of GQA and MHA models",
    "value projection before the exchange, of GQA and MHA models",
}
WORKS_FOR_GQA = {
    "mixed chunk of MLA models",
    "weights of MLA models kept on the CPU",
    "groups of layers of MLA models kept on the CPU",
}
# Rows that are no arguments: what the machine, the environment, the model or a request brings.
ELSEWHERE = {
    "other accelerators",
    "head-major cache layout",
    "captured preparation of decode graphs",
    "preparation of verify passes on a stream of its own",
    "skipped softmax in decode",
    "beam search",
    "staged transfers",
    "one-kernel exchange without NVIDIA GPUs",
    "one-kernel exchange of heads that are not whole 16-byte vectors",
}
# `test_pictures_of_gemma_3_are_refused_where_plain_tp_masks_them`.
PICTURES = "pictures of Gemma-3 with Triton"
# Of models with windows alone.
BESIDE_WINDOWS: dict[str, dict[str, Any]] = {
    "sliding windows beside the hierarchical cache": {"enable_hierarchical_cache": True},
    "sliding windows beside drafts": {
        "speculative_algorithm": "NGRAM",
        "page_size": 1,
        "cuda_graph_backend_decode": "disabled",
    },
    "sliding windows in pipeline stages": {"pp_size": 2},
    "recurrent states or windows in prefill-decode disaggregation of GQA and MHA models": DECODE,
}
CAPTURED_DRAFTS = (
    "drafts verified in CUDA graphs of backends that no GPU was seen with, unless named"
)
ASKABLE = {row.feature: row for row in TABLE if row.status == "refused" and row.flag}


# Rows of hybrid models, whose flags are others' too: `test_flags_of_hybrid_models_are_refused`.
HYBRID_REPLICAS = "replicated queries of hybrid models"
HYBRID_FLAGS: list[tuple[str, dict[str, Any]]] = [
    (HYBRID_REPLICAS, {"dcp_replicate_q_proj": True}),
    (
        "prefixes of hybrid models without snapshots of states",
        {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True},
    ),
    (
        "prefill chunk of hybrid models shorter than a chunk of their kernels",
        {"chunked_prefill_size": 48, "page_size": 16},
    ),
]


def test_every_row_with_a_flag_is_asked_for() -> None:
    of_hybrids = {feature for feature, _ in HYBRID_FLAGS} - {HYBRID_REPLICAS}
    elsewhere = {*ELSEWHERE, *of_hybrids, *BESIDE_WINDOWS, CAPTURED_DRAFTS, PICTURES}
    assert set(FLAGS) | elsewhere == set(ASKABLE)


@pytest.mark.parametrize("feature", FLAGS)
def test_flag_is_refused(resolved: Resolve, feature: str) -> None:
    flags, by = FLAGS[feature]
    row = ASKABLE[feature]
    layout = {"tp_size": 4, "dcp_size": 2, "page_size": 16}
    for family in WORKING:
        if feature in SGLANGS_OWN_FOR_MLA and family == "deepseek_v2":
            continue
        error = resolved("Blackwell", family, **{**layout, **flags}).error
        if feature in (GQA_ALONE if family == "deepseek_v2" else WORKS_FOR_GQA):
            assert error == ""
            continue
        assert error, f"{feature} starts with {family}"
        if by == UPSTREAM:
            assert "is not supported with --dcp-size 2" not in error
            continue
        asked = next(line for line in error.splitlines() if row.flag in line)
        assert "is not supported with --dcp-size 2: " in asked
        assert row.why in asked
        assert asked.endswith(f"{row.instead}.")
        value = next(iter(flags.values()))
        assert value is True or f"{row.flag} {value} " in asked


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_mori_carries_latents_alone(resolved: Resolve, mode: str) -> None:
    """As NIXL does, above; it serves MLA as SGLang has it (test_verdicts.py)."""
    asked = {"disaggregation_transfer_backend": "mori", "disaggregation_mode": mode}
    error = resolved("Blackwell", "llama", tp_size=4, dcp_size=2, page_size=16, **asked).error
    assert "--disaggregation-transfer-backend mori is not supported with --dcp-size 2" in error


def test_values_projected_first_need_a_sharded_cache(resolved: Resolve) -> None:
    error = resolved("Hopper", "deepseek_v2", tp_size=4, dcp_replicate_v_proj=True).error
    assert "--dcp-replicate-v-proj is for ranks that split a cache" in error


def test_lora_by_its_paths_alone(resolved: Resolve, tmp_path: Path) -> None:
    flags = {"lora_paths": [f"some={tmp_path}"]}
    refused = resolved("Hopper", "llama", tp_size=4, dcp_size=2, **flags).error
    assert "--enable-lora is not supported with --dcp-size 2: " in refused
    ignored = resolved("Hopper", "llama", tp_size=4, dcp_size=2, enable_lora=False, **flags)
    assert ignored.error == ""


# Flags of a sharded cache alone.
OF_SHARDED = {"dcp_comm_backend", "dcp_replicate_v_proj"}


@pytest.mark.parametrize(
    "feature", [name for name, (flags, _) in FLAGS.items() if not OF_SHARDED & flags.keys()]
)
def test_flag_is_sglangs_own_affair_without_a_sharded_cache(
    resolved: Resolve, feature: str
) -> None:
    for family in WORKING:
        flags = {"tp_size": 4, "page_size": 16, **FLAGS[feature][0]}
        error = resolved("Blackwell", family, **flags).error
        assert "--dcp-size" not in error


# Without our flags.


def every_field(models: dict[str, str], facts: dict[str, dict[str, Any]]) -> dict[str, str]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.arg_groups.pipeline import record_fields
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    found = {}
    for machine, known in facts.items():
        for family, model in models.items():
            for tp_size in (1, 4):
                with mock.patch.dict(os.environ), override_platform(**known):
                    args = ServerArgs(
                        model_path=model, device="cuda", tp_size=tp_size, random_seed=1
                    )
                    args.resolve_once()
                    view = resolved_view(args)
                    found |= {
                        f"{machine} {family} {tp_size} {field.name}": repr(
                            getattr(view, field.name)
                        )
                        for field in record_fields(ServerArgs)
                    }
    return found


def test_resolution_is_sglangs_without_our_flags(models: dict[str, str]) -> None:
    facts = {machine: facts_of(machine) for machine in MACHINES}
    with Fresh() as fresh:
        loaded = fresh.value(every_field, models, facts)
        alone = fresh.value(every_field, models, facts, SGLANG_PLUGINS="none of them")
    assert loaded == alone
    assert len(alone) > 12 * 500


def hooks_of_a_rank(model: str, port: int) -> tuple[list[str], bool]:
    """Serve-stage targets hooked in a rank that has built its groups; if triton is SGLang's."""
    become_rank(0, ["--model-path", model, "--nccl-port", str(port)])
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang_helix.series import hooks

    hooked = [hook.target for hook in hooks("serve") if hook.target in HookRegistry._patched]
    return hooked, ATTENTION_BACKENDS["triton"].__module__.startswith("sglang.srt.")


def test_no_serve_hook_without_our_flags(fresh: Fresh, models: dict[str, str]) -> None:
    assert fresh.value(hooks_of_a_rank, models["llama"], free_port()) == ([], True)
