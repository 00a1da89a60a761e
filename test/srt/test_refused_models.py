"""Rows of the compatibility table that a model brings: refused, or served by what can."""

from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES
from sglang_helix.srt.compatibility.table import TABLE
from srt.resolved import Resolve, written
from srt.test_server_args import ASKABLE, BESIDE_WINDOWS, HYBRID_FLAGS, HYBRID_REPLICAS

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
    (
        "queries in a row for each head (Hunyuan-A13B)",
        "HunYuanMoEV1ForCausalLM",
        {"model_type": "hunyuan_v1_moe", "use_qk_norm": True},
    ),
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


@pytest.mark.parametrize(
    ("family", "architecture", "groups"),
    [
        ("bailing_hybrid", "BailingMoeV2_5ForCausalLM", {"group_norm_size": 4}),
        ("nemotron_h", "NemotronHForCausalLM", {"n_groups": 4}),
    ],
)
def test_groups_of_heads_of_states_are_cut_by_all_ranks(
    resolved: Resolve, tmp_path: Path, family: str, architecture: str, groups: dict[str, int]
) -> None:
    model_type, config, published = FAMILIES[family]
    given = {**config, **published, **groups}
    entries = {name: value for name, value in given.items() if value is not None}
    model = written(tmp_path, model_type=model_type, architectures=[architecture], **entries)
    assert resolved("Hopper", model, tp_size=4, dcp_size=2).error == ""
    refused = resolved("Hopper", model, tp_size=8, dcp_size=2).error
    assert "--tp-size 8: 4 heads of this model's recurrent layers cannot be split" in refused
