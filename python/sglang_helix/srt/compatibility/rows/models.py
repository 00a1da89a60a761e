"""Rows: other kinds of attention that a model brings."""

from __future__ import annotations

from sglang_helix.srt.compatibility.row import PLAIN, Given, Row
from sglang_helix.srt.compatibility.rows.windows import untried_windows
from sglang_helix.srt.compatibility.situation import Situation


def _model(name: str) -> Given:
    return lambda situation: bool(getattr(situation.model, name, None)) or None


def _shared_caches(situation: Situation) -> object | None:
    return bool(getattr(situation.model.hf_text_config, "num_kv_shared_layers", 0)) or None


def _masked_pictures(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    # They have them where the user asks for it; a default of SGLang leaves them out.
    gemma3 = "Gemma3ForConditionalGeneration" in situation.model.hf_config.architectures
    masked = gemma3 and "triton" in attention_backends_of(situation.args)
    return (masked and situation.args.enable_multimodal) or None


def _chunks(situation: Situation) -> object | None:
    # MiMo-V2's configuration has its windows under this name too.
    windows = situation.windows and not untried_windows(situation)
    return (situation.model.attention_chunk_size is not None and not windows) or None


def _sinks(situation: Situation) -> object | None:
    return (situation.mla and bool(situation.model.has_attention_sinks)) or None


def _norm_over_heads(situation: Situation) -> object | None:
    config = situation.model.hf_config
    # With the heads of plain TP on every rank, its all-reduced mean stays that of the model.
    kept = situation.sglang_groups_heads and not situation.args.dcp_replicate_q_proj
    normed = (
        "MiniMaxM2ForCausalLM" in config.architectures
        and getattr(config, "use_qk_norm", False)
        and getattr(config, "qk_norm_type", "per_layer") == "per_layer"
    )
    return (normed and not kept) or None


def _row_of_each_head(situation: Situation) -> object | None:
    config = situation.model.hf_config
    hunyuan = {"HunYuanMoEV1ForCausalLM", "HunYuanDenseV1ForCausalLM"}
    normed = bool(getattr(config, "use_qk_norm", False))
    return (normed and not hunyuan.isdisjoint(config.architectures)) or None


def _dsa_of_sglang(situation: Situation) -> object | None:
    return (situation.dsa and _trtllm_gen_or_npu()) or None


def _dsa_of_nobody(situation: Situation) -> object | None:
    return (situation.dsa and not _trtllm_gen_or_npu()) or None


def _trtllm_gen_or_npu() -> bool:
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    return bool(platform.is_npu or (platform.is_cuda and platform.device_sm // 10 == 10))


def _other_sparse(situation: Situation) -> object | None:
    from sglang.srt.configs.model_config import is_deepseek_v4, is_minimax_sparse

    config = situation.model.hf_config
    return is_deepseek_v4(config) or is_minimax_sparse(config) or None


def _dual_chunk(situation: Situation) -> object | None:
    return hasattr(situation.model.hf_config, "dual_chunk_attention_config") or None


MODELS: tuple[Row, ...] = (
    Row(
        "attention sinks of GQA and MHA models",
        "",
        "works",
        "counted once, after the exchange, in fp32; answers on a CPU are transformers'",
        alone="wrong",
        proof="every rank's part would count the sink, layers/attention/triton_backend.py",
    ),
    Row(
        "attention sinks of MLA models",
        "",
        "refused",
        "the exchange of MLA is in the model, which hands it no sinks",
        PLAIN,
        _sinks,
        alone="wrong",
        proof="refused by that reason for HYV4, arg_groups/model_overrides/deepseek_v2.py",
    ),
    Row(
        "layers that read another layer's cache (Gemma-3n, small Gemma-4)",
        "",
        "refused",
        "such a layer brings no keys and values of its chunk, which the adapters attend before "
        "they read the cache",
        PLAIN,
        _shared_caches,
        alone="wrong",
        proof="every rank attends its own rows as if they were all, models/gemma3n_causal.py",
    ),
    Row(
        "pictures of Gemma-3 with Triton",
        "--enable-multimodal",
        "refused",
        "tokens of a picture see each other both ways, by a mask that windows are not cut for",
        "Use --attention-backend fa3, which has no such masks in plain TP either, or leave the "
        "flag out",
        _masked_pictures,
    ),
    Row(
        "chunked local attention",
        "",
        "refused",
        "chunks are not cut by owner; and Llama-4 would gain nothing, with 8 key-value heads on 8 "
        "ranks, and 40 query heads that allow no 16",
        PLAIN,
        _chunks,
        alone="wrong",
        proof="no backend with chunks knows --dcp-size",
    ),
    Row(
        "encoder-decoder models",
        "",
        "refused",
        "cross attention reads a second cache that is not sharded",
        PLAIN,
        _model("is_encoder_decoder"),
        alone="refuses",
    ),
    Row(
        "sparse attention of DeepSeek (DSA: DeepSeek-V3.2, GLM-5) on Blackwell and NPUs",
        "",
        "own",
        "on Blackwell by trtllm, with EAGLE of top-k 1",
        given=_dsa_of_sglang,
        alone="serves",
        proof="layers/attention/dsa/dsa_dcp.py, arg_groups/model_overrides/deepseek_v2.py",
    ),
    Row(
        "sparse attention of DeepSeek (DSA) elsewhere",
        "",
        "refused",
        "its one kernel that reads the rows of a rank, FlashInfer's trtllm-gen, is built for "
        "Blackwell alone",
        PLAIN,
        _dsa_of_nobody,
        alone="wrong",
        proof="arg_groups/model_overrides/deepseek_v2.py takes trtllm under --dcp-size everywhere; "
        "FlashInfer's fmhaRunner.cuh stops with Unsupported architecture",
    ),
    Row(
        "other sparse attention (DeepSeek-V4, MiniMax-M3)",
        "",
        "refused",
        "top-k indices address the whole sequence",
        PLAIN,
        _other_sparse,
        alone="wrong",
        proof="its backends do not know --dcp-size, whose slots are wider than their pools",
    ),
    Row(
        "query and key norms over all heads (MiniMax-M2)",
        "",
        "refused",
        "their weights are cut by tp size, and a group's ranks hold more heads",
        "Serve this model without --dcp-size, or with one of at most tp size / key-value heads",
        _norm_over_heads,
        alone="wrong",
        proof="sgl-project/sglang#34355",
    ),
    Row(
        "queries in a row for each head (Hunyuan-A13B)",
        "",
        "refused",
        "SGLang 0.5.23 fails without it too: the class hands on a row for each head of a token, of "
        "which attention takes as many as there are tokens",
        "Serve this model with a release of SGLang whose plain TP answers",
        _row_of_each_head,
        alone="wrong",
        proof="models/hunyuan.py normalizes queries as rows of one head; "
        "padded_extend_real_tokens, layers/attention/graph_utils.py, takes them for padding",
    ),
    Row(
        "dual chunk attention",
        "",
        "refused",
        "its three partial softmaxes are not cut by owner",
        PLAIN,
        _dual_chunk,
    ),
)
