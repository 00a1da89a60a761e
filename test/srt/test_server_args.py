"""Resolution of SGLang's arguments with the series loaded, on machines that are only told about.

One process resolves everything: resolution depends on the flags, on a checkpoint's configuration
and on what SGLang believes about the machine (its `override_platform`), and on nothing else.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES, make_checkpoint
from sglang_cpu_reference.server import free_port
from sglang_helix.check import MACHINES, facts_of, told_about
from sglang_helix.srt.compatibility.table import TABLE
from sglang_helix.srt.layers.attention.adapters import ADAPTERS, Attention, adapter, serving
from sglang_helix.srt.layers.attention.measured import faster
from srt.fresh import Fresh
from srt.rank import become_rank

ATTENTION: dict[str, Attention] = {"llama": "GQA", "deepseek_v2": "MLA"}
WORKING = {family: [record.name for record in serving(kind)] for family, kind in ATTENTION.items()}


class Resolved(NamedTuple):
    """How a resolution ended: some resolved arguments, or the error; and what was said."""

    args: dict[str, Any]
    backends: tuple[str, str] | None
    error: str
    said: str


Resolve = Callable[..., Resolved]


def resolve(machine: str, model: str, flags: dict[str, Any], launched: bool = False) -> Resolved:
    """launched: after what a launch and its ranks check, too."""
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang.srt.server_args import ServerArgs
    from sglang_helix.srt.server_args import check

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sglang_helix")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with told_about(machine):
            args = ServerArgs(model_path=model, device="cuda", **flags)
            args.resolve_once()
            if launched:
                args.check_server_args()
                check(args)  # as its ranks do
            view = resolved_view(args)
            names = ("dcp_size", "dcp_comm_backend", "page_size", "chunked_prefill_size")
            names += ("mamba_radix_cache_strategy",)
            found = {name: getattr(view, name) for name in names}
            return Resolved(found, attention_backends_of(view), "", "\n".join(lines))
    except Exception as error:
        return Resolved({}, None, f"{type(error).__name__}: {error}", "\n".join(lines))
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {family: str(make_checkpoint(family, root / family)) for family in WORKING}


@pytest.fixture(scope="module")
def resolved(models: dict[str, str]) -> Iterator[Resolve]:
    """``resolved(machine, family or directory, tp_size=..., ...)``."""
    with Fresh(preload=("srt.models.plugins_loaded",)) as process:
        yield lambda machine, model, launched=False, **flags: process.here(
            resolve, machine, models.get(model, model), flags, launched
        )


# The attention backend where none is named.

# Triton is asked last, and so until FlashInfer's adapter was seen on a GPU.
GQA_ANYWHERE = "triton" if "GQA" in adapter("flashinfer").unseen else "flashinfer"


@pytest.mark.parametrize(
    ("machine", "family", "default", "chosen"),
    [
        ("Ampere", "llama", "flashinfer", GQA_ANYWHERE),
        ("Ampere", "deepseek_v2", "triton", "triton"),
        ("Hopper", "llama", "fa3", "fa3"),
        ("Hopper", "deepseek_v2", "fa3", "fa3"),
        ("Blackwell", "llama", "trtllm_mha", GQA_ANYWHERE),
        ("Blackwell", "deepseek_v2", "flashinfer", "flashinfer"),
    ],
)
def test_default_gives_way_only_where_it_does_not_serve(
    resolved: Resolve, machine: str, family: str, default: str, chosen: str
) -> None:
    whole = resolved(machine, family, tp_size=4)
    assert (whole.backends, whole.said) == ((default, default), "")
    sharded = resolved(machine, family, tp_size=4, dcp_size=2)
    assert sharded.backends == (chosen, chosen), sharded.error
    if chosen == default:
        assert "--attention-backend" not in sharded.said
    else:
        said = f"--attention-backend {chosen}: the default here, {default}, does not serve"
        assert said in sharded.said
        assert "--dcp-size 2" in sharded.said


@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_a_named_half_is_kept_and_the_other_chosen(resolved: Resolve, half: str) -> None:
    flags = {f"{half}_attention_backend": "torch_native"}
    found = resolved("Hopper", "llama", tp_size=4, dcp_size=2, **flags)
    assert found.backends is not None, found.error
    assert set(found.backends) == {"torch_native", "fa3"}
    assert found.backends[half == "decode"] == "torch_native"
    assert "--attention-backend" not in found.said


def choices() -> list[str]:
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

    return list(ATTENTION_BACKEND_CHOICES)


# Refused by the series itself, on some machine; the rest needs hardware or models that SGLang
# asks for first.
BY_THE_SERIES = {
    "llama": {"fa4", "flex_attention", "trtllm_mha", "aiter", "wave"},
    "deepseek_v2": {"fa4", "flex_attention", "flashmla", "aiter", "wave"},
}


@pytest.mark.parametrize("side", ["attention", "prefill_attention", "decode_attention"])
@pytest.mark.parametrize("family", WORKING)
def test_backends_serve_or_are_refused_by_name(resolved: Resolve, family: str, side: str) -> None:
    other = {
        "prefill_attention": {"decode_attention_backend": "torch_native"},
        "decode_attention": {"prefill_attention_backend": "torch_native"},
    }.get(side, {})
    refused_by_name = set()
    for machine in MACHINES:
        for backend in choices():
            flags = {f"{side}_backend": backend, **other}
            found = resolved(machine, family, tp_size=4, dcp_size=2, **flags)
            if found.backends is not None:
                assert set(found.backends) <= set(WORKING[family]), f"{machine} {backend}"
                continue
            if "does not serve" in found.error:
                advised = re.search(r"--dcp-size 2: use one of ([\w, ]+)\.", found.error)
                assert advised is not None, found.error
                assert backend not in advised[1].split(", ")
                assert set(advised[1].split(", ")) <= set(WORKING[family])
            # SGLang gives some other names, or another half beside them.
            flag = "--" + side.replace("_", "-") + "-backend"
            if f"{flag} {backend} does not serve " in found.error:
                refused_by_name.add(backend)
    assert refused_by_name >= BY_THE_SERIES[family], BY_THE_SERIES[family] - refused_by_name


def test_a_cache_that_a_backend_cannot_read(resolved: Resolve) -> None:
    """Not taken where none is named; where it is, refused with what reads it."""
    sharded = {"tp_size": 4, "dcp_size": 2, "kv_cache_dtype": "fp8_e4m3"}
    latent = resolved("Hopper", "deepseek_v2", **sharded)
    assert latent.backends == ("flashinfer", "flashinfer"), latent.error
    assert "--attention-backend flashinfer: the default here, fa3, does not serve" in latent.said
    named = resolved("Hopper", "deepseek_v2", attention_backend="fa3", **sharded).error
    assert "--attention-backend fa3 does not read --kv-cache-dtype fp8_e4m3 for MLA" in named
    assert "with --dcp-size 2 (SGLang would convert the whole pool in every layer)" in named
    advised = re.search(r"use one of ([\w, ]+)\.", named)
    assert advised is not None
    assert "flashinfer" in advised[1]
    assert "fa3" not in advised[1]
    keys = resolved("Hopper", "llama", **sharded)
    assert keys.backends == ("fa3", "fa3"), keys.error


@pytest.mark.parametrize(
    ("machine", "family", "flags", "said"),
    [
        (
            *("Hopper", "deepseek_v2"),
            {"attention_backend": "flashmla", "kv_cache_dtype": "fp8_e5m2"},
            "does not read --kv-cache-dtype fp8_e5m2 for MLA with --dcp-size 2 (fp8_e4m3 it does)",
        ),
        (
            *("Blackwell", "llama"),
            {"attention_backend": "trtllm_mha", "page_size": 128},
            "takes --page-size 16 or 32 or 64, not 128, for GQA or MHA with --dcp-size 2",
        ),
        (
            *("Hopper", "llama"),
            {"attention_backend": "flex_attention"},
            "does not serve GQA or MHA with --dcp-size 2",
        ),
    ],
)
def test_what_a_backend_cannot_take_is_one_error(
    resolved: Resolve, machine: str, family: str, flags: dict[str, Any], said: str
) -> None:
    error = resolved(machine, family, tp_size=4, dcp_size=2, **flags).error
    assert error.startswith(f"ValueError: --attention-backend {flags['attention_backend']} {said}")
    assert ": use one of " in error
    assert error.count("\n") == 0


def test_a_backend_not_seen_on_a_gpu_is_taken_by_name_alone(resolved: Resolve) -> None:
    unseen = [(record, kind) for record in ADAPTERS for kind in record.unseen]
    assert ("fa4", "GQA") in [(record.name, kind) for record, kind in unseen]
    families = {"GQA": "llama", "MLA": "deepseek_v2"}
    for record, kind in unseen:
        majors = record.mla_majors if kind == "MLA" and record.mla_majors else record.majors
        machine = "Hopper" if majors is None or 9 in majors else "Blackwell"
        flags = {"tp_size": 4, "dcp_size": 2, "attention_backend": record.name}
        found = resolved(machine, families[kind], launched=True, **flags)
        assert found.backends == (record.name, record.name), found.error
        said = f"--attention-backend {record.name} has not been seen on a GPU with --dcp-size"
        assert found.said.count(said) == 1
    for machine, (kind, family) in itertools.product(MACHINES, families.items()):
        taken = resolved(machine, family, tp_size=4, dcp_size=2).backends
        assert taken is not None
        assert not set(taken) & {record.name for record, served in unseen if served == kind}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("backend", ["triton", "torch_native"])
def test_working_backends_are_kept(resolved: Resolve, machine: str, backend: str) -> None:
    for family in WORKING:
        found = resolved(machine, family, tp_size=4, dcp_size=2, attention_backend=backend)
        assert found.backends == (backend, backend), found.error
        assert "--attention-backend" not in found.said


def test_a_faster_backend_is_named_once(resolved: Resolve, tmp_path: Path) -> None:
    """By what is shipped; `test_measured.py` has both sides of the bound."""
    heads = {"num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config = {**FAMILIES["deepseek_v2"].config, **heads, "model_type": "deepseek_v2"}
    model = written(tmp_path, architectures=["DeepseekV2ForCausalLM"], **config)
    known = faster("fa3", WORKING["deepseek_v2"], "MLA 128", 9)
    for layout in ({"tp_size": 8, "dcp_size": 8}, {"tp_size": 8, "dcp_size": 4}):
        found = resolved("Hopper", model, launched=True, **layout)
        assert found.backends == ("fa3", "fa3"), found.error
        count = int(known is not None and layout["dcp_size"] == 8)
        assert found.said.count("times as fast as fa3 with the MLA 128 heads") == count


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


#: A configuration that every model here starts from.
SMALL = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "pad_token_id": 0,
}


def written(root: Path, **entries: Any) -> str:
    """A model directory that holds a configuration alone."""
    directory = root / re.sub(r"\W+", "_", entries["architectures"][0])
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**SMALL, **entries}))
    return str(directory)


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
    [("Hopper", "llama", 4, [2]), ("Blackwell", "deepseek_v2", 8, [2, 4])],
)
def test_attention_replicas_name_the_sizes_that_work(
    resolved: Resolve, machine: str, family: str, size: int, works: list[int]
) -> None:
    """4 ranks each: 8 are not within one, and one shard of two heads is not on them all."""
    asked = {"tp_size": 8, "attn_dp_size": 2, "attention_backend": "triton"}
    if family == "deepseek_v2":
        asked["attention_backend"] = "flashinfer"
    found = resolved(machine, family, dcp_size=size, **asked)
    assert "--attn-dp-size 2 is not supported with" in found.error
    named = " or ".join(map(str, works))
    assert found.error.endswith(f", or --dcp-size {named} beside --attn-dp-size.")
    for each in works:
        assert resolved(machine, family, launched=True, dcp_size=each, **asked).error == ""


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
    "other attention data parallelism": ({"attn_dp_size": 2}, ""),
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
    "draft models in pipeline stages": ({"pp_size": 2, **EAGLE}, ""),
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
    "other attention data parallelism",
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


# Verify passes: what captures them, what does where graphs are named, and what captures none.
REPLAYED = [("llama", "triton"), ("llama", "fa3"), ("deepseek_v2", "fa3")]
CAPTURE = [*REPLAYED, ("deepseek_v2", "flashinfer"), ("deepseek_v2", "flashmla")]


@pytest.mark.parametrize(("family", "backend"), [*CAPTURE, ("llama", "trtllm_mha")])
def test_drafts_captured_by_what_no_gpu_was_seen_with_are_asked_for_by_name(
    resolved: Resolve, family: str, backend: str
) -> None:
    flags = {"tp_size": 4, "dcp_size": 2, **EAGLE, "attention_backend": backend, "page_size": 64}
    gpu = "Blackwell" if backend == "trtllm_mha" else "Hopper"
    row = ASKABLE[CAPTURED_DRAFTS]
    refused = f"{row.flag} full is not supported with --dcp-size 2: {row.why}. {row.instead}."
    named = resolved(gpu, family, **flags, cuda_graph_backend_decode="full").error
    unnamed = resolved(gpu, family, **flags).error
    assert (unnamed == "") if (family, backend) in REPLAYED else (refused in unnamed)
    assert (named == "") if (family, backend) in CAPTURE else (refused in named)


def test_a_backend_that_verifies_no_drafts_is_refused(resolved: Resolve) -> None:
    flags = {"tp_size": 4, "dcp_size": 2, **EAGLE, "attention_backend": "trtllm_mla"}
    error = resolved(
        "Blackwell", "deepseek_v2", **flags, page_size=64, cuda_graph_backend_decode="disabled"
    ).error
    assert "does not verify the drafts of --speculative-algorithm EAGLE for MLA" in error
    assert "flashinfer" in error  # what does


def test_lora_by_its_paths_alone(resolved: Resolve, tmp_path: Path) -> None:
    flags = {"lora_paths": [f"some={tmp_path}"]}
    refused = resolved("Hopper", "llama", tp_size=4, dcp_size=2, **flags).error
    assert "--enable-lora is not supported with --dcp-size 2: " in refused
    ignored = resolved("Hopper", "llama", tp_size=4, dcp_size=2, enable_lora=False, **flags)
    assert ignored.error == ""


@pytest.mark.parametrize(
    "feature", [name for name, (flags, _) in FLAGS.items() if "dcp_comm_backend" not in flags]
)
def test_flag_is_sglangs_own_affair_without_a_sharded_cache(
    resolved: Resolve, feature: str
) -> None:
    for family in WORKING:
        flags = {"tp_size": 4, "page_size": 16, **FLAGS[feature][0]}
        error = resolved("Blackwell", family, **flags).error
        assert "--dcp-size" not in error


LATENT = {
    name: FAMILIES["deepseek_v2"].config[name]
    for name in (
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "num_attention_heads",
        "num_key_value_heads",
    )
}
WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW}
SUNK = {**LATENT, "model_type": "deepseek_v2", "learnable_sink": True}
WHISPER = {
    "model_type": "whisper",
    "d_model": 256,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "is_encoder_decoder": True,
}
MINIMAX_M3 = {
    "model_type": "minimax_m2",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "scoring_func": "sigmoid",
    "rope_theta": 1e4,
}
DUAL_CHUNK = {"model_type": "qwen2", "dual_chunk_attention_config": {"chunk_size": 1024}}
SPARSE = {
    **LATENT,
    "model_type": "deepseek_v3",
    "index_topk": 64,
    "index_n_heads": 4,
    "index_head_dim": 32,
}
QWEN3_NEXT = {
    name: value
    for name, value in {**FAMILIES["qwen3_next"].config, "model_type": "qwen3_next"}.items()
    if name not in FAMILIES["llama"].config
} | {"num_hidden_layers": 4, "num_key_value_heads": 2}
SPARSE_ROW = "other sparse attention (DeepSeek-V4, MiniMax-M3)"
# The row that refuses, an architecture, and its configuration.
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "sliding windows with replicated queries, or fewer attention shards than key-value heads",
        "GptOssForCausalLM",
        {**GPT_OSS, "num_key_value_heads": 4},
    ),
    ("attention sinks of MLA models", "DeepseekV2ForCausalLM", SUNK),
    (
        "sliding windows that the ranks of a group do not share evenly",
        "Cohere2ForCausalLM",
        {"model_type": "cohere2", **WINDOW, "sliding_window": 33},
    ),
    (
        "sliding windows in a pool of their own, of other classes",
        "MuseGlimmerForCausalLM",
        {"model_type": "llama", **WINDOW},
    ),
    (
        "layers that read another layer's cache (Gemma-3n, small Gemma-4)",
        "Gemma3nForCausalLM",
        {"model_type": "gemma3n_text", **WINDOW, "num_kv_shared_layers": 1},
    ),
    (
        "query and key norms over all heads (MiniMax-M2)",
        "MiniMaxM2ForCausalLM",
        {"model_type": "minimax_m2", "use_qk_norm": True, "num_local_experts": 4},
    ),
    (
        "chunked local attention",
        "Llama4ForCausalLM",
        {"model_type": "llama4_text", "attention_chunk_size": 1024},
    ),
    ("encoder-decoder models", "WhisperForConditionalGeneration", WHISPER),
    ("other hybrid linear attention", "FalconH1ForCausalLM", {"model_type": "falcon_h1"}),
    (
        "other hybrid linear attention",
        "Qwen3NextForCausalLM",
        {**QWEN3_NEXT, "num_key_value_heads": 4},
    ),
    (SPARSE_ROW, "MiniMaxM3SparseForCausalLM", MINIMAX_M3),
    ("dual chunk attention", "Qwen2ForCausalLM", DUAL_CHUNK),
    ("sparse attention of DeepSeek (DSA) elsewhere", "DeepseekV32ForCausalLM", SPARSE),
]


def test_every_row_of_models_is_asked_for() -> None:
    rows = {row.feature for row in TABLE if row.status == "refused" and not row.flag}
    assert {feature for feature, _, _ in MODELS} | {HYBRID_REPLICAS} == rows


@pytest.mark.parametrize(("feature", "architecture", "entries"), MODELS)
def test_model_is_refused(
    resolved: Resolve, tmp_path: Path, feature: str, architecture: str, entries: dict[str, Any]
) -> None:
    row = next(row for row in TABLE if row.feature == feature)
    model = written(tmp_path, architectures=[architecture], **entries)
    refused = resolved("Hopper", model, tp_size=4, dcp_size=2).error
    assert f"{feature} ({architecture}) is not supported with --dcp-size 2: {row.why}" in refused
    assert row.instead in refused
    assert "--dcp-size" not in resolved("Hopper", model, tp_size=4).error


def test_windows_of_their_own_pool_are_served_by_what_attends_them(
    resolved: Resolve, tmp_path: Path
) -> None:
    two = {**GPT_OSS, "num_key_value_heads": 2}
    model = written(tmp_path, architectures=["GptOssForCausalLM"], **two)
    layout = {"tp_size": 4, "dcp_size": 2}
    served = resolved("Hopper", model, **layout)
    assert (served.error, served.backends) == ("", ("fa3", "fa3"))
    # SGLang's default there has windows, and no adapter for them.
    assert resolved("Blackwell", model, **layout).backends == ("triton", "triton")
    for backend in ("fa4", "trtllm_mha"):
        error = resolved("Blackwell", model, **layout, attention_backend=backend).error
        assert f"--attention-backend {backend} does not attend sliding windows" in error
        assert "use one of triton" in error
    split = "sliding windows with replicated queries, or fewer attention shards than"
    for flags in ({"dcp_size": 4}, {**layout, "dcp_replicate_q_proj": True}):
        assert split in resolved("Hopper", model, **{"tp_size": 4, **flags}).error
    # In the pool of all layers they are cut by owner, by the same backends.
    whole = {**layout, "disable_hybrid_swa_memory": True}
    assert resolved("Hopper", model, **whole).error == ""
    error = resolved("Blackwell", model, **whole, attention_backend="fa4").error
    assert "--attention-backend fa4 does not attend sliding windows" in error


def test_pictures_of_gemma_3_are_refused_where_plain_tp_masks_them(
    resolved: Resolve, tmp_path: Path
) -> None:
    entries = {
        "model_type": "gemma3",
        "text_config": {**WINDOW, "num_hidden_layers": 2, "num_key_value_heads": 2},
    }
    model = written(tmp_path, architectures=["Gemma3ForConditionalGeneration"], **entries)
    layout = {"tp_size": 4, "dcp_size": 2}
    for flags, refused in (
        ({"attention_backend": "triton", "enable_multimodal": True}, True),
        ({"attention_backend": "fa3", "enable_multimodal": True}, False),
        ({"attention_backend": "triton"}, False),
    ):
        error = resolved("Hopper", model, **layout, **flags).error
        assert ("--enable-multimodal is not supported" in error) == refused
        assert refused or not error


def test_drafts_are_refused_beside_windows_of_either_kind(
    resolved: Resolve, tmp_path: Path
) -> None:
    model = written(tmp_path, architectures=["Cohere2ForCausalLM"], model_type="cohere2", **WINDOW)
    flags = {"tp_size": 4, "dcp_size": 2, **BESIDE_WINDOWS["sliding windows beside drafts"]}
    error = resolved("Hopper", model, **flags).error
    assert ASKABLE["sliding windows beside drafts"].why in error


@pytest.mark.parametrize("feature", BESIDE_WINDOWS)
def test_what_has_not_been_tried_beside_windows_is_refused(
    resolved: Resolve, tmp_path: Path, feature: str
) -> None:
    model = written(tmp_path, architectures=["GptOssForCausalLM"], **GPT_OSS)
    flags = {"tp_size": 4, "dcp_size": 2, "page_size": 16, **BESIDE_WINDOWS[feature]}
    row = ASKABLE[feature]
    error = resolved("Hopper", model, **flags).error
    asked = next((line for line in error.splitlines() if row.why in line), error)
    assert asked.removeprefix("ValueError: ").startswith(row.flag)
    assert asked.endswith(f"{row.instead}.")


def test_a_norm_over_the_heads_of_plain_tp_is_served(resolved: Resolve, tmp_path: Path) -> None:
    entries = {"model_type": "minimax_m2", "use_qk_norm": True, "num_local_experts": 4}
    model = written(tmp_path, architectures=["MiniMaxM2ForCausalLM"], **entries)
    assert resolved("Hopper", model, tp_size=8, dcp_size=2, attention_backend="triton").error == ""


@pytest.mark.parametrize(("feature", "flags"), HYBRID_FLAGS)
def test_flags_of_hybrid_models_are_refused(
    resolved: Resolve, tmp_path: Path, feature: str, flags: dict[str, Any]
) -> None:
    row = next(row for row in TABLE if row.feature == feature)
    model = written(tmp_path, architectures=["Qwen3NextForCausalLM"], **QWEN3_NEXT)
    refused = resolved("Hopper", model, tp_size=4, dcp_size=2, **flags).error
    assert row.why in refused
    assert row.instead in refused


def test_states_of_prefixes_are_kept_whatever_the_page(resolved: Resolve, tmp_path: Path) -> None:
    """Pages of one token and no overlap: upstream takes the tree's for as long as the pool's."""
    model = written(tmp_path, architectures=["Qwen3NextForCausalLM"], **QWEN3_NEXT)
    layout = {"tp_size": 4, "page_size": 1, "disable_overlap_schedule": True}
    served = resolved("Hopper", model, dcp_size=2, **layout)
    assert served.error == ""
    assert served.args["mamba_radix_cache_strategy"] == "extra_buffer"
    assert resolved("Hopper", model, **layout).args["mamba_radix_cache_strategy"] == "no_buffer"
    none = resolved("Hopper", model, dcp_size=2, disable_radix_cache=True, **layout)
    assert none.error == ""


def test_heads_of_states_are_cut_by_all_ranks(resolved: Resolve, tmp_path: Path) -> None:
    config = {**QWEN3_NEXT, "linear_num_key_heads": 6}
    model = written(tmp_path, architectures=["Qwen3NextForCausalLM"], **config)
    refused = resolved("Hopper", model, tp_size=4, dcp_size=2).error
    assert "--tp-size 4: 6 heads of this model's recurrent layers cannot be split" in refused


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
