"""The compatibility table: every feature that meets a sharded cache, and who serves it.

Start-up validation walks it (`verdict.py`), ``python -m sglang_helix compatibility`` prints it, and
every row has its test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sglang_helix.srt.compatibility.situation import Situation
from sglang_helix.srt.layers.attention.adapters import ADAPTERS

Status = Literal["works", "own", "refused"]

# What unmodified SGLang does with the feature beside `--dcp-size`.
Alone = Literal["", "serves", "MLA", "starts", "wrong", "refuses", "lacks"]


@dataclass(frozen=True)
class Row:
    """One feature.

    feature: what it is called. flag: how a user asks for it ("" where the model brings it).
    status: of the feature beside a sharded cache: the series serves it (works), SGLang does, as it
        is and without the series (own), or start-up stops (refused).
    why: reason or, for what works, its evidence.
    instead: what to do where it is refused; no full stop, "--dcp-size" becomes the flag given.
    given: its value where it is in use, else None.
    alone: what SGLang does without the series: it serves; serves MLA alone; starts, and nothing of
        its code, tests or docs speaks of it; starts, and crashes or answers wrongly; refuses; or
        has no such thing. Default: MLA for what works, starts for what is refused.
    proof: of `alone`, where SGLang serves or is wrong: its code (below sglang/srt), test or thread.
    """

    feature: str
    flag: str
    status: Status
    why: str
    instead: str = ""
    given: Callable[[Situation], object | None] = lambda situation: None
    alone: Alone = ""
    proof: str = ""

    def in_use(self, situation: Situation) -> bool:
        """Whether the situation has the feature."""
        value = self.given(situation)
        return value is not None and value is not False

    @property
    def by_sglang(self) -> Alone:
        """`alone`, with its default."""
        return self.alone or ("MLA" if self.status == "works" else "starts")

    @property
    def fails_alone(self) -> bool:
        """Whether the refusal holds where SGLang runs without the series too."""
        return self.by_sglang in ("wrong", "refuses")

    def refusal(self, situation: Situation, own: tuple[str, ...] = ()) -> str | None:
        """The error for a start-up that asks for it; None where it does not or it is served.

        own: the features by which SGLang serves the rest of the situation by itself, if any.
        """
        value = self.given(situation)
        if self.status != "refused" or value is None or value is False:
            return None
        asked = f"{self.flag} {value}" if self.flag and value is not True else self.flag
        subject = asked or f"{self.feature} ({' '.join(situation.model.hf_config.architectures)})"
        flag, size = situation.sharded_by
        instead = self.instead if own else self.instead.replace("--dcp-size", flag)
        beside = f"{flag} {size}"
        if own:
            beside = f"SGLang's own --dcp-size, which serves {', '.join(own)} here"
        return f"{subject} is not supported with {beside}: {self.why}. {instead}."


def _flag(name: str) -> Callable[[Situation], object | None]:
    """The argument's value where it is set to something."""
    return lambda situation: getattr(situation.args, name) or None


def _more_than_one(name: str) -> Callable[[Situation], object | None]:
    return lambda situation: value if (value := getattr(situation.args, name)) > 1 else None


def _unlike(name: str, *usual: object) -> Callable[[Situation], object | None]:
    return lambda situation: (
        value if (value := getattr(situation.args, name)) not in usual else None
    )


def _model(name: str) -> Callable[[Situation], object | None]:
    return lambda situation: bool(getattr(situation.model, name, None)) or None


# Classes of windows with a pool of their own that are served.
_POOLED = {
    "GptOssForCausalLM",
    "GraniteSWAForCausalLM",
    "LagunaForCausalLM",
    "MellumForCausalLM",
}


def _window(situation: Situation) -> object | None:
    untried = _POOLED.isdisjoint(situation.model.hf_config.architectures)
    return (situation.windows and untried) or None


def _window_uneven(situation: Situation) -> object | None:
    window = situation.cut_windows
    return window if window % situation.args.dcp_size else None


def _window_drafts(situation: Situation) -> object | None:
    drafts = situation.args.speculative_algorithm
    return drafts if situation.windows or situation.cut_windows else None


def _window_heads(situation: Situation) -> object | None:
    args = situation.args
    whole = situation.plain_heads_grouped and not args.dcp_replicate_q_proj
    return (situation.windows and not whole) or None


def _windows(given: Callable[[Situation], object | None]) -> Callable[[Situation], object | None]:
    return lambda situation: given(situation) if situation.windows else None


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
    windows = situation.windows and not _window(situation)
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


# MLA classes for which SGLang plans no gathering of a sharded prefix.
NO_PLAN = {
    "BailingMoeV2_5ForCausalLM",
    "BailingMoeV3ForCausalLM",
    "BailingMoeV3VLForConditionalGeneration",
    "DeepseekVL2ForCausalLM",
    "Dots3NoteForCausalLM",
    "DotsVLMForCausalLM",
    "GigaChat35ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "KimiVLForConditionalGeneration",
    "LongcatFlashForCausalLM",
    "MiniCPM3ForCausalLM",
    "PixtralForConditionalGeneration",
    "SarvamMLAForCausalLM",
}


def _no_plan(situation: Situation) -> object | None:
    planless = not NO_PLAN.isdisjoint(situation.model.hf_config.architectures)
    return (situation.mla and planless) or None


# Hybrid models that the series serves where plain TP groups their heads.
_HYBRIDS = {
    "FalconH1ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "KimiLinearForCausalLM",
    "Lfm2ForCausalLM",
    "NemotronHForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
}


def _states_moved(situation: Situation) -> bool:
    """What else reads or moves recurrent states: none of it is proven over a sharded cache."""
    args = situation.args
    return bool(
        args.speculative_algorithm
        or args.enable_hierarchical_cache
        or args.enable_mixed_chunk
        or args.enable_page_major_kv_layout
        or args.enable_linear_replayssm
        or args.enable_linear_replayssm_spec
        or args.enable_int8_mamba_checkpoint
        or args.mamba_radix_cache_strategy == "extra_buffer_lazy"
        or args.pp_size > 1
        or _disaggregated(situation)
    )


def _hybrid_served(situation: Situation) -> bool:
    known = not _HYBRIDS.isdisjoint(situation.model.hf_config.architectures)
    return known and situation.plain_heads_grouped and not _states_moved(situation)


def _hybrid_linear(situation: Situation, *, grouped: bool) -> object | None:
    other = situation.hybrid is not None and not _hybrid_served(situation)
    return (other and situation.sglang_groups_heads == grouped) or None


def _hybrid_linear_grouped(situation: Situation) -> object | None:
    return _hybrid_linear(situation, grouped=True)


def _hybrid_linear_split(situation: Situation) -> object | None:
    return _hybrid_linear(situation, grouped=False)


def _dsa_of_sglang(situation: Situation) -> object | None:
    return (situation.dsa and _trtllm_gen_or_npu()) or None


def _dsa_of_nobody(situation: Situation) -> object | None:
    return (situation.dsa and not _trtllm_gen_or_npu()) or None


def _trtllm_gen_or_npu() -> bool:
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    return bool(platform.is_npu or (platform.is_cuda and platform.device_sm // 10 == 10))


def _dsa_kernel(half: str) -> Callable[[Situation], object | None]:
    def kernel(situation: Situation) -> object | None:
        name = getattr(situation.args, f"dsa_{half}_backend")
        return name if situation.dsa and _platform("cuda") and name != "trtllm" else None

    return kernel


def _gated_replicas(situation: Situation) -> object | None:
    gated = situation.hybrid is not None and not situation.mla
    return (gated and bool(situation.args.dcp_replicate_q_proj)) or None


def _states_without_snapshots(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import mamba_extra_buffer_of

    args = situation.args
    if situation.hybrid is None or args.disable_radix_cache or mamba_extra_buffer_of(args):
        return None
    return args.mamba_radix_cache_strategy


def _chunk_without_states(situation: Situation) -> object | None:
    args, states = situation.args, situation.hybrid
    size, page = args.chunked_prefill_size, args.page_size * args.dcp_size
    if states is None or args.disable_radix_cache or size is None or size <= 0:
        return None
    # Cut to whole pages of the tree, then to whole chunks of the kernels.
    chunk = max(getattr(states, "mamba_chunk_size", 64), args.page_size)
    return size if size // page * page < chunk else None


def _other_sparse(situation: Situation) -> object | None:
    from sglang.srt.configs.model_config import is_deepseek_v4, is_minimax_sparse

    config = situation.model.hf_config
    return is_deepseek_v4(config) or is_minimax_sparse(config) or None


def _dual_chunk(situation: Situation) -> object | None:
    return hasattr(situation.model.hf_config, "dual_chunk_attention_config") or None


def _graph(situation: Situation, phase: str) -> str | None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    backend = getattr(situation.args.cuda_graph_config, phase).backend
    return None if backend == Backend.DISABLED else str(getattr(backend, "value", backend))


def _prefill_graph(situation: Situation) -> object | None:
    return _graph(situation, "prefill")


def _decode_graph_in_pieces(situation: Situation) -> object | None:
    backend = _graph(situation, "decode")
    return None if backend == "full" else backend


# NEXTN is another name of EAGLE.
_DRAFT_MODELS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")


def _draft_model(situation: Situation, *, own: bool) -> object | None:
    """A draft model that SGLang serves beside a sharded cache, or one that it does not."""
    from sglang.srt.arg_groups.overrides import attention_backends_of
    from sglang.srt.configs.model_config import is_qwen3_5

    asked = situation.args.speculative_algorithm
    if asked in (None, "NGRAM"):
        return None
    verified = asked not in _DRAFT_MODELS or "cutedsl_mla" in attention_backends_of(situation.args)
    served = situation.dsa or is_qwen3_5(situation.model.hf_config) or (situation.mla and verified)
    return asked if served == own else None


def _draft_of_sglang(situation: Situation) -> object | None:
    return _draft_model(situation, own=True)


def _other_draft(situation: Situation) -> object | None:
    asked = _draft_model(situation, own=False)
    return None if asked in _DRAFT_MODELS else asked


def _drafts(given: Callable[[Situation], object | None]) -> Callable[[Situation], object | None]:
    return lambda situation: given(situation) if situation.args.speculative_algorithm else None


def _draft_models(
    given: Callable[[Situation], object | None],
) -> Callable[[Situation], object | None]:
    asked = _drafts(given)
    return lambda situation: (
        None if situation.args.speculative_algorithm == "NGRAM" else asked(situation)
    )


def _tree(situation: Situation) -> object | None:
    """Trees of drafts, unless a backend reads them whose pages are known to be the allocator's."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    args = situation.args
    topk = args.speculative_eagle_topk
    names = {args.speculative_draft_attention_backend} - {None} or {*attention_backends_of(args)}
    return topk if topk and topk > 1 and not names <= {"triton", "torch_native"} else None


def _plan_stream(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get()) or None


def _decode_graph(situation: Situation) -> object | None:
    """Graphs that nobody asked for by name, or of a backend that captures no verify pass."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    args, attention = situation.args, situation.attention
    capture = {record.name for record in ADAPTERS if attention in record.drafts_in_graphs}
    named = args.cuda_graph_backend_decode is not None
    served = named and capture >= {*attention_backends_of(args)}
    return None if served else _graph(situation, "decode")


def _mla(given: Callable[[Situation], object | None]) -> Callable[[Situation], object | None]:
    return lambda situation: given(situation) if situation.mla else None


def _not_mla(given: Callable[[Situation], object | None]) -> Callable[[Situation], object | None]:
    return lambda situation: None if situation.mla else given(situation)


def _attention_replicas(situation: Situation, *, own: bool) -> object | None:
    args = situation.args
    shards = args.tp_size // args.attn_dp_size // args.attn_cp_size
    served = situation.sglang_groups_heads and shards % args.dcp_size == 0
    return args.attn_dp_size if args.attn_dp_size > 1 and served == own else None


def _attention_replicas_of_sglang(situation: Situation) -> object | None:
    return _attention_replicas(situation, own=True)


def _attention_replicas_refused(situation: Situation) -> object | None:
    return _attention_replicas(situation, own=False)


def _positive_of_mla(name: str) -> Callable[[Situation], object | None]:
    return lambda situation: (
        value if (value := getattr(situation.args, name)) > 0 and situation.mla else None
    )


def _short_chunk(situation: Situation) -> object | None:
    size = situation.args.chunked_prefill_size
    page = situation.args.page_size * situation.args.dcp_size
    return size if size is not None and 0 < size < page else None


def _hnd_layout(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_USE_HND_KVCACHE.get()) or None


def _glue_graph(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get()) or None


def _skipped_softmax(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of
    from sglang.srt.environ import envs

    heeded = attention_backends_of(situation.args)[1] in ("trtllm_mla", "cutedsl_mla")
    return envs.SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR.get() if heeded else None


def _disaggregated(situation: Situation) -> object | None:
    mode = situation.args.disaggregation_mode
    return None if mode in ("null", None) else mode


def _other_transfer(situation: Situation) -> object | None:
    """A transfer backend but Mooncake."""
    backend = situation.args.disaggregation_transfer_backend
    by_mooncake = backend in ("mooncake", "mooncake_tcp")
    return None if by_mooncake or _disaggregated(situation) is None else backend


def _transfer_of_sglang(situation: Situation) -> object | None:
    """What of disaggregation is not proven: other backends, and host copies of what is decoded."""
    if _disaggregated(situation) is None:
        return None
    offload = situation.args.disaggregation_decode_enable_offload_kvcache
    return _other_transfer(situation) or offload or None


def _transferred(
    given: Callable[[Situation], object | None],
) -> Callable[[Situation], object | None]:
    """Of a disaggregated server."""
    return lambda situation: given(situation) if _disaggregated(situation) else None


def _states_or_windows(situation: Situation) -> object | None:
    beside = situation.windows or situation.hybrid is not None
    return _disaggregated(situation) if beside else None


def _staging(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_DISAGG_STAGING_BUFFER.get()) or None


def _lora(situation: Situation) -> object | None:
    args = situation.args
    # SGLang turns the flag on for the paths, but only after resolution.
    return bool(args.lora_paths if args.enable_lora is None else args.enable_lora) or None


def _beams(situation: Situation) -> object | None:
    """Of a request: there `args` has the request's `beam_width`; a server's has none."""
    width = getattr(situation.args, "beam_width", None)
    return width if width and width > 1 else None


def _platform(*names: str) -> str | None:
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    return next((name for name in names if getattr(platform, f"is_{name}")), None)


def _platform_of_sglang(situation: Situation) -> object | None:
    return _platform("hip", "npu", "xpu")


def _platform_of_nobody(situation: Situation) -> object | None:
    return _platform("musa", "mps")


def _bitsandbytes(situation: Situation) -> object | None:
    asked = (situation.model.quantization, situation.args.load_format)
    return "bitsandbytes" if "bitsandbytes" in asked and not situation.mla else None


def _storage_of_sglang(situation: Situation) -> object | None:
    asked = situation.args.hicache_storage_backend
    return asked if situation.mla and asked == "mooncake" else None


def _storage_of_nobody(situation: Situation) -> object | None:
    asked = situation.args.hicache_storage_backend
    return None if asked == "file" or (situation.mla and asked == "mooncake") else asked


def _sharded_weights(situation: Situation) -> object | None:
    asked = situation.args.load_format
    shards = ("sharded_state", "presharded", "remote", "remote_instance")
    return asked if asked in shards and not situation.mla else None


def _attn_tp_size(situation: Situation) -> object | None:
    return situation.attn_tp_size


def _symm_at_all(situation: Situation) -> object | None:
    return _symm(situation, True)


def _no_group(situation: Situation) -> object | None:
    return None if _platform("cuda", "hip", "npu", "xpu") else situation.args.device


def _split_heads(situation: Situation) -> object | None:
    return None if situation.sglang_groups_heads else True


def _backend_without_dcp(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    if not _platform("cuda") or situation.dsa:
        return None
    prefill, decode = attention_backends_of(situation.args)
    if situation.mla:
        return None if decode in ("flashinfer", "trtllm_mla", "cutedsl_mla") else decode
    return next((backend for backend in (prefill, decode) if backend != "triton"), None)


def _verify_without_lse(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    args = situation.args
    drafts = args.speculative_algorithm not in (None, "NGRAM")
    if not _platform("cuda") or situation.dsa or not (situation.mla and drafts):
        return None
    verify = attention_backends_of(args)[args.speculative_attention_mode == "decode"]
    return None if verify == "cutedsl_mla" else verify


def _symm(situation: Situation, problem: bool) -> object | None:
    from sglang_helix.srt.layers.dcp.exchange import BACKENDS

    asked = situation.args.dcp_comm_backend
    backend = BACKENDS.get(asked)
    return asked if problem and backend and backend.prepare else None


def _fi_a2a(situation: Situation) -> object | None:
    backend = situation.args.dcp_comm_backend
    return backend if backend == "fi_a2a" else None


def _symm_without_cuda(situation: Situation) -> object | None:
    from sglang.srt.runtime_context import get_platform

    return _symm(situation, not get_platform().is_cuda)


def _symm_ragged_heads(situation: Situation) -> object | None:
    from sglang_helix.srt.layers.dcp.partial import VECTOR_BYTES

    model = situation.model
    width = model.kv_lora_rank if situation.mla else model.v_head_dim
    return _symm(situation, width * model.dtype.itemsize % VECTOR_BYTES != 0)


def _symm_reference(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of
    from sglang.srt.runtime_context import get_platform

    reference = attention_backends_of(situation.args)[1] == "torch_native"
    return _symm(situation, reference and get_platform().is_cuda)


def _symm_stages(situation: Situation) -> object | None:
    return _symm(situation, situation.args.pp_size > 1)


def _symm_hosts(situation: Situation) -> object | None:
    args = situation.args
    ranks_of_a_host = args.tp_size // max(args.nnodes // args.pp_size, 1)
    return _symm(situation, ranks_of_a_host % args.dcp_size != 0)


_ONE_GROUP = "use --tp-size and --dcp-size alone"
_WITHOUT = "Leave the flag out, or leave --dcp-size out"
_A2A = "Use --dcp-comm-backend a2a"
_PLAIN = "Serve this model without --dcp-size"

# Asked for by a request, so it is refused by request: `beam_search/coordinator.py`.
BEAM_SEARCH = Row(
    "beam search",
    "beam_width",
    "refused",
    "beams continue one prompt token by token, in slots of a page that all of them would share",
    "Ask for no beams, or serve without --dcp-size",
    _beams,
)

TABLE: tuple[Row, ...] = (
    Row("chunked prefill", "--chunked-prefill-size", "works", "end-to-end matrix, odd sizes"),
    Row("prefix cache", "--disable-radix-cache off", "works", "end-to-end matrix, hits asserted"),
    Row("page size", "--page-size", "works", "end-to-end matrix, pages of 1 and 64"),
    Row("replicated query projection", "--dcp-replicate-q-proj", "works", "end-to-end matrix"),
    Row("mixed chunk", "--enable-mixed-chunk", "works", "answers equal plain TP, GQA"),
    Row("pipeline parallelism", "--pp-size", "works", "end-to-end test, two stages of two ranks"),
    Row("streaming, OpenAI endpoints", "", "works", "answers equal plain TP, GQA and MLA"),
    Row("structured output", "--grammar-backend", "works", "answers equal plain TP, GQA and MLA"),
    Row("log-probabilities of prompts", "", "works", "equal plain TP, GQA and MLA"),
    Row("sampling penalties, several samples", "", "works", "answers equal plain TP"),
    Row("health and metrics", "--enable-metrics", "works", "served, GQA and MLA"),
    Row("sessions", "/open_session", "works", "turns and branches equal plain TP, GQA and MLA"),
    Row("several nodes", "--nnodes", "works", "two nodes answer as transformers, GQA and MLA"),
    Row("expert parallelism", "--ep-size", "works", "answers equal plain TP, MLA"),
    Row(
        "memory released and resumed",
        "/release_memory_occupation",
        "works",
        "answers equal plain TP afterwards, GQA and MLA; on the CPU, where nothing is unmapped",
    ),
    Row("retraction and resumption", "", "works", "end-to-end test with a small pool"),
    Row("abort", "", "works", "end-to-end test, pool free again afterwards"),
    Row("graceful shutdown", "", "works", "what runs at SIGTERM is answered; no process is left"),
    Row("overlap schedule", "--disable-overlap-schedule off", "works", "servers on a GPU"),
    Row("data-parallel replicas", "--dp-size", "works", "two replicas of two ranks, MLA"),
    Row(
        "hierarchical cache",
        "--enable-hierarchical-cache",
        "works",
        "answers from host copies are transformers', GQA and MLA, hits asserted",
    ),
    Row(
        "n-gram drafts",
        "--speculative-algorithm NGRAM",
        "works",
        "answers are transformers', GQA and MLA, accepted drafts asserted; graphs: see below",
        alone="starts",
    ),
    Row(
        "EAGLE, EAGLE3, MTP (NEXTN) and draft models of their own (STANDALONE)",
        "--speculative-algorithm",
        "works",
        "answers are transformers', GQA and MLA, as many drafts right as without --dcp-size; "
        "graphs: see below",
        alone="starts",
    ),
    Row("no prefix cache", "--disable-radix-cache", "works", "answers are transformers', MLA"),
    Row(
        "AMD, Ascend and Intel accelerators",
        "platform",
        "own",
        "the series has never been tried there; SGLang has MLA by aiter, DSA on NPUs, GQA on XPUs",
        given=_platform_of_sglang,
        alone="serves",
        proof="layers/attention/aiter_backend.py, xpu_backend.py, hardware_backend/npu",
    ),
    Row(
        "other accelerators",
        "platform",
        "refused",
        "SGLang builds no decode-context-parallel group there",
        "Leave --dcp-size out",
        _platform_of_nobody,
        alone="refuses",
    ),
    Row(
        "prefill chunk shorter than a widened page",
        "--chunked-prefill-size",
        "refused",
        "a chunk must hold at least one page of the whole group (page size x dcp size)",
        "Use a larger chunk or a smaller --page-size",
        _short_chunk,
    ),
    Row(
        "mixed chunk of MLA models",
        "--enable-mixed-chunk",
        "refused",
        "each layer of a mixed batch gathers the whole context of every running request, 9 GiB for "
        "8 of a million tokens",
        "Leave the flag out: chunks of prompts then run between decode steps",
        _mla(_flag("enable_mixed_chunk")),
    ),
    Row(
        "FlashInfer's all-to-all of GQA and MHA models",
        "--dcp-comm-backend",
        "refused",
        "it serves MLA models only, and this model's attention is not MLA",
        _A2A,
        _not_mla(_fi_a2a),
    ),
    Row(
        "prefill chunks of changing size",
        "--enable-dynamic-chunking",
        "refused",
        "it has not been tried, and chunks may get shorter than a page of the whole group",
        _WITHOUT,
        _flag("enable_dynamic_chunking"),
    ),
    Row(
        "one-kernel exchange without NVIDIA GPUs",
        "--dcp-comm-backend",
        "refused",
        "it needs CUDA devices that have peer access to each other",
        _A2A,
        _symm_without_cuda,
        alone="lacks",
    ),
    Row(
        "one-kernel exchange of heads that are not whole 16-byte vectors",
        "--dcp-comm-backend",
        "refused",
        "it moves heads in 16-byte vectors, and this model's are not a whole number of them",
        _A2A,
        _symm_ragged_heads,
        alone="lacks",
    ),
    Row(
        "one-kernel exchange of the reference backend",
        "--dcp-comm-backend",
        "refused",
        "torch_native decodes in fp32, and symm carries the dtype of the model",
        "Use --dcp-comm-backend a2a, or another --attention-backend",
        _symm_reference,
        alone="lacks",
    ),
    Row(
        "one-kernel exchange in pipeline stages",
        "--dcp-comm-backend",
        "refused",
        "its programs wait while they fill the GPU, and could keep out NCCL's, which send to the "
        "next stage meanwhile and which peers wait for",
        _A2A,
        _symm_stages,
        alone="lacks",
    ),
    Row(
        "one-kernel exchange between hosts",
        "--dcp-comm-backend",
        "refused",
        "it needs peer access inside a KVP group, and some of these groups are on several hosts",
        "Use --dcp-comm-backend a2a, or a --dcp-size that divides the ranks of a host",
        _symm_hosts,
        alone="lacks",
    ),
    Row(
        "attention data parallelism of MLA models and Qwen3.5",
        "--attn-dp-size",
        "own",
        "groups of a replica: dcp size divides tp size / attn dp size",
        given=_attention_replicas_of_sglang,
        alone="serves",
        proof="arg_groups/parallel_hook.py",
    ),
    Row(
        "other attention data parallelism",
        "--attn-dp-size",
        "refused",
        "KVP groups could cross replicas, or their ranks hold different key-value heads",
        f"Instead, {_ONE_GROUP}",
        _attention_replicas_refused,
        alone="wrong",
        proof="sgl-project/sglang#34355",
    ),
    Row(
        "prefill context parallelism",
        "--attn-cp-size",
        "refused",
        "the two divide the sequence differently",
        f"Instead, {_ONE_GROUP}",
        _more_than_one("attn_cp_size"),
    ),
    Row(
        "upstream's KV cache sharding",
        "--enable-kv-cache-sharding",
        "refused",
        "the cache would be sharded twice",
        _WITHOUT,
        _flag("enable_kv_cache_sharding"),
        alone="refuses",
    ),
    Row(
        "DSPARK and what cutedsl_mla verifies, of MLA models, and draft models of DSA and Qwen3.5",
        "--speculative-algorithm",
        "own",
        "EAGLE and MTP of top-k 1 and DSPARK; MLA verified by cutedsl_mla, DSA by trtllm",
        given=_draft_of_sglang,
        alone="serves",
        proof="test_kimi_linear_dcp_dspark4; layers/attention/cutedsl_mla_backend.py, "
        "models/qwen3_5.py",
    ),
    Row(
        "other kinds of drafts",
        "--speculative-algorithm",
        "refused",
        "it has a worker of its own, which has not been tried",
        "Use EAGLE, EAGLE3, NEXTN, STANDALONE or NGRAM, or leave the flag or --dcp-size out",
        _other_draft,
    ),
    Row(
        "drafts whose number adapts",
        "--speculative-adaptive",
        "refused",
        "it builds the target's attention as if it were the draft's, over a whole cache",
        _WITHOUT,
        _flag("speculative_adaptive"),
    ),
    Row(
        "several draft layers that are models of their own",
        "--enable-multi-layer-eagle",
        "refused",
        "it has a worker of its own, which has not been tried",
        _WITHOUT,
        _flag("enable_multi_layer_eagle"),
    ),
    Row(
        "drafts accepted by rejection sampling",
        "--speculative-use-rejection-sampling",
        "refused",
        "it has not been tried",
        _WITHOUT,
        _flag("speculative_use_rejection_sampling"),
    ),
    Row(
        "draft models in pipeline stages",
        "--pp-size",
        "refused",
        "the last stage alone has the draft, and hands its trees to the others, not tried",
        "Use --pp-size 1, or leave --speculative-algorithm or --dcp-size out",
        _draft_models(_more_than_one("pp_size")),
    ),
    Row(
        "hierarchical cache with draft models",
        "--enable-hierarchical-cache",
        "refused",
        "copies of a draft's whole cache would go by the owners of the target's",
        "Leave the flag or --speculative-algorithm out",
        _draft_models(_flag("enable_hierarchical_cache")),
        alone="refuses",
    ),
    Row(
        "trees of drafts read by other backends than triton",
        "--speculative-eagle-topk",
        "refused",
        "the draft's attention would look for branches in pages of --page-size, and they lie in "
        "pages of the whole group",
        "Use 1, or --speculative-draft-attention-backend triton",
        _draft_models(_tree),
    ),
    Row(
        "preparation of verify passes on a stream of its own",
        "SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
        "refused",
        "it has not been tried",
        "Unset the variable",
        _draft_models(_plan_stream),
    ),
    Row(
        "drafts in prefill-decode disaggregation",
        "--disaggregation-mode",
        "refused",
        "a draft's cache, and n-grams of a prompt that another server read, have not been tried",
        "Leave the flag or --speculative-algorithm out",
        _drafts(_disaggregated),
    ),
    Row(
        "drafts verified in CUDA graphs, unless these are named",
        "--cuda-graph-backend-decode",
        "refused",
        "no GPU has replayed a captured verify pass yet, and trtllm_mha captures none",
        "Use --cuda-graph-backend-decode disabled with --speculative-algorithm",
        _drafts(_decode_graph),
    ),
    Row(
        "decode CUDA graphs in pieces",
        "--cuda-graph-backend-decode",
        "refused",
        "it has not been tried, and with --debug-cuda-graph would write to an earlier pass's rows",
        "Use --cuda-graph-backend-decode full",
        _decode_graph_in_pieces,
    ),
    BEAM_SEARCH,
    Row(
        "diffusion language models",
        "--dllm-algorithm",
        "refused",
        "their attention is not causal",
        _WITHOUT,
        _flag("dllm_algorithm"),
    ),
    Row(
        "prefill-decode disaggregation of MLA models by Mooncake",
        "--disaggregation-mode",
        "works",
        "from a plain prefill server and between equal layouts, answers are transformers'; other "
        "layouts are named at the first request",
        alone="serves",
        proof="test_kimi_linear_pd_dcp4; arg_groups/pd_disaggregation_hook.py",
    ),
    Row(
        "prefill-decode disaggregation of MLA models by NIXL, Mori, or with host copies",
        "--disaggregation-transfer-backend",
        "own",
        "between equal dcp sizes, and from a prefill server without one; host copies of what is "
        "decoded are --disaggregation-decode-enable-offload-kvcache",
        given=_mla(_transfer_of_sglang),
        alone="serves",
        proof="arg_groups/pd_disaggregation_hook.py",
    ),
    Row(
        "prefill-decode disaggregation of GQA and MHA models by Mooncake",
        "--disaggregation-mode",
        "works",
        "from a plain prefill server whose ranks and the decode server's head shards divide one "
        "another, and between equal layouts, answers are transformers'; other layouts are named at "
        "the first request; a plain prefill server needs the series too",
        alone="refuses",
    ),
    Row(
        "prefill-decode disaggregation of GQA and MHA models by NIXL, Mori and others",
        "--disaggregation-transfer-backend",
        "refused",
        "it sends whole tokens from rank to rank, and a sharded rank has some tokens of the heads "
        "of a group",
        "Use --disaggregation-transfer-backend mooncake, or leave --dcp-size out",
        _not_mla(_other_transfer),
        alone="refuses",
    ),
    Row(
        "recurrent states or windows in prefill-decode disaggregation of GQA and MHA models",
        "--disaggregation-mode",
        "refused",
        "states and windows are sent beside K and V, which has not been tried",
        _WITHOUT,
        _not_mla(_states_or_windows),
        alone="refuses",
    ),
    Row(
        "decoded K and V in the hierarchical cache",
        "--disaggregation-decode-enable-offload-kvcache",
        "refused",
        "it has not been tried",
        "Leave the flag out",
        _not_mla(_transferred(_flag("disaggregation_decode_enable_offload_kvcache"))),
        alone="refuses",
    ),
    Row(
        "checksums of what is transferred",
        "--disaggregation-enable-kv-checksum",
        "refused",
        "a sharded rank's pages hold other bytes than those of the rank that sent them",
        "Leave the flag out",
        _transferred(_flag("disaggregation_enable_kv_checksum")),
    ),
    Row(
        "staged transfers",
        "SGLANG_DISAGG_STAGING_BUFFER",
        "refused",
        "the staging buffer gathers heads, not the tokens of an owner",
        "Unset the variable",
        _transferred(_staging),
    ),
    Row(
        "K, V and latents in files behind the hierarchical cache",
        "--hicache-storage-backend file",
        "works",
        "answers from files are transformers', hits asserted; a page of which one rank has no file "
        "ends everyone's prefix; files of another dtype or memory layout are not read",
    ),
    Row(
        "Mooncake behind the hierarchical cache of MLA models",
        "--hicache-storage-backend",
        "own",
        "pages of the latent, one share of each rank",
        given=_storage_of_sglang,
        alone="serves",
        proof="arg_groups/hicache_hook.py, managers/cache_controller.py",
    ),
    Row(
        "other storage behind the hierarchical cache",
        "--hicache-storage-backend",
        "refused",
        "no other store has a page format by owner",
        "Use file, or leave the flag out, copies on the host work",
        _storage_of_nobody,
        alone="refuses",
    ),
    Row(
        "LMCache",
        "--enable-lmcache",
        "refused",
        "it stores whole pages",
        _WITHOUT,
        _flag("enable_lmcache"),
        alone="refuses",
    ),
    Row(
        "HiSparse",
        "--enable-hisparse",
        "refused",
        "its host pages are not sharded",
        _WITHOUT,
        _flag("enable_hisparse"),
    ),
    Row(
        "FlexKV",
        "--enable-flexkv",
        "refused",
        "it stores whole pages",
        _WITHOUT,
        _flag("enable_flexkv"),
    ),
    Row(
        "external cache linker",
        "--enable-unified-cache-external-linker",
        "refused",
        "it transfers whole pages",
        _WITHOUT,
        _flag("enable_unified_cache_external_linker"),
    ),
    Row(
        "prefix caches of other plugins",
        "--radix-cache-backend",
        "refused",
        "they are not known to count in widened pages",
        _WITHOUT,
        _flag("radix_cache_backend"),
    ),
    Row(
        "streaming sessions",
        "--enable-streaming-session",
        "refused",
        "a session keeps slots between requests, which has not been tried",
        _WITHOUT,
        _flag("enable_streaming_session"),
    ),
    Row(
        "sessions in the prefix tree",
        "--enable-session-radix-cache",
        "refused",
        "a session keeps slots between requests, which has not been tried",
        _WITHOUT,
        _flag("enable_session_radix_cache"),
    ),
    Row(
        "cache canary",
        "--kv-canary",
        "refused",
        "it checks rows at widened slots, beyond the end of a sharded pool",
        _WITHOUT,
        _unlike("kv_canary", "none"),
    ),
    Row(
        "FP4 and MXFP8 caches",
        "--kv-cache-dtype",
        "refused",
        "their scales are not stored by owner",
        "Use auto, bfloat16 or an fp8 type",
        _unlike("kv_cache_dtype", "auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
    ),
    Row(
        "unified memory pool of MLA models",
        "--enable-unified-memory",
        "own",
        "on flashinfer, trtllm_mla and cutedsl_mla",
        given=_mla(_flag("enable_unified_memory")),
        alone="serves",
        proof="arg_groups/kv_cache_hook.py",
    ),
    Row(
        "unified memory pool of GQA and MHA models",
        "--enable-unified-memory",
        "refused",
        "its write locations are translated before the owner of a row is known",
        _WITHOUT,
        _not_mla(_flag("enable_unified_memory")),
        alone="refuses",
    ),
    Row(
        "LoRA of MLA models",
        "--enable-lora",
        "own",
        "with replicated queries, adapters of the query and key-value up-projections are refused",
        given=_mla(_lora),
        alone="serves",
        proof="lora/lora_manager.py",
    ),
    Row(
        "LoRA of GQA and MHA models",
        "--enable-lora",
        "refused",
        "its buffers are sized by tp size, not by the heads of a group",
        _WITHOUT,
        _not_mla(_lora),
    ),
    Row(
        "bitsandbytes weights of GQA and MHA models",
        "--load-format",
        "refused",
        "its loader cuts key-value heads by tp size",
        _WITHOUT,
        _bitsandbytes,
    ),
    Row(
        "weights saved in shards, of GQA and MHA models",
        "--load-format",
        "refused",
        "the shards were cut for another division of the key-value heads",
        "Load the original checkpoint",
        _sharded_weights,
    ),
    Row(
        "weights of MLA models kept on the CPU",
        "--cpu-offload-gb",
        "refused",
        "query weights are gathered from the GPU, and it has not been tried",
        _WITHOUT,
        _positive_of_mla("cpu_offload_gb"),
    ),
    Row(
        "groups of layers of MLA models kept on the CPU",
        "--offload-group-size",
        "refused",
        "query weights are gathered from the GPU, and it has not been tried",
        _WITHOUT,
        _positive_of_mla("offload_group_size"),
    ),
    Row(
        "weight cache",
        "--weight-cache-mode",
        "refused",
        "its daemon builds models without plugins",
        _WITHOUT,
        _unlike("weight_cache_mode", "off"),
    ),
    Row(
        "NCCL symmetric memory",
        "--enable-symm-mem",
        "refused",
        "captured graphs answer wrongly at small batches",
        _WITHOUT,
        _flag("enable_symm_mem"),
        alone="wrong",
        proof="sgl-project/sglang#37768",
    ),
    Row(
        "multi-item scoring",
        "--enable-mis",
        "refused",
        "items of a prompt do not see one another, but the sharded prefix is seen whole",
        _WITHOUT,
        _flag("enable_mis"),
    ),
    Row(
        "switching disaggregation roles",
        "--enable-pd-role-switch",
        "refused",
        "it is prefill-decode disaggregation that rebuilds no groups",
        _WITHOUT,
        _flag("enable_pd_role_switch"),
        alone="refuses",
    ),
    Row(
        "two-batch overlap",
        "--enable-two-batch-overlap",
        "refused",
        "half batches would exchange on two streams at once",
        _WITHOUT,
        _flag("enable_two_batch_overlap"),
    ),
    Row(
        "sequence-parallel norms",
        "--enable-layernorm-sp",
        "refused",
        "a QKV projection that every rank holds whole would not gather its input",
        _WITHOUT,
        _flag("enable_layernorm_sp"),
    ),
    Row(
        "NVIDIA megakernel",
        "--enable-nvidia-megakernel",
        "refused",
        "it replaces the model's forward pass, and with it the exchange",
        _WITHOUT,
        _flag("enable_nvidia_megakernel"),
    ),
    Row(
        "prefill-decode multiplexing",
        "--enable-pdmux",
        "refused",
        "both phases would exchange at once on one group",
        _WITHOUT,
        _flag("enable_pdmux"),
    ),
    Row(
        "torch.compile of the model",
        "--enable-torch-compile",
        "refused",
        "the adapters have not been traced",
        _WITHOUT,
        _flag("enable_torch_compile"),
    ),
    Row(
        "prefill CUDA graphs",
        "--cuda-graph-backend-prefill",
        "refused",
        "a captured prefill has no plan for the sharded prefix",
        "Use --cuda-graph-backend-prefill disabled",
        _prefill_graph,
    ),
    Row(
        "deterministic inference",
        "--enable-deterministic-inference",
        "refused",
        "a prompt's sum of two parts depends on where its cached prefix ends",
        _WITHOUT,
        _flag("enable_deterministic_inference"),
    ),
    Row(
        "elastic expert parallelism",
        "--elastic-ep-backend",
        "refused",
        "KVP groups are fixed at start",
        _WITHOUT,
        _flag("elastic_ep_backend"),
    ),
    Row(
        "Ray",
        "--use-ray",
        "refused",
        "its scheduler actors do not load plugins, so ranks would run without the series",
        _WITHOUT,
        _flag("use_ray"),
    ),
    Row(
        "head-major cache layout",
        "SGLANG_USE_HND_KVCACHE",
        "refused",
        "the owner's rows are written token by token",
        "Unset the variable",
        _hnd_layout,
    ),
    Row(
        "captured preparation of decode graphs",
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
        "refused",
        "it would read the slots of an earlier batch, and rows to write depend on the slots",
        "Unset the variable",
        _glue_graph,
    ),
    Row(
        "skipped softmax in decode",
        "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR",
        "refused",
        "each rank would skip by the scores of its own tokens",
        "Unset the variable",
        _skipped_softmax,
    ),
    Row(
        "sliding windows in a pool of their own (gpt-oss, Granite-SWA, Laguna, Mellum)",
        "",
        "works",
        "window layers stay as plain TP keeps them, full layers are sharded; answers on a CPU are "
        "transformers', both pools conserved exactly; not yet seen on a GPU",
        alone="wrong",
        proof="the allocator of windows does not widen, mem_cache/kv_cache_configurator.py",
    ),
    Row(
        "attention sinks of GQA and MHA models",
        "",
        "works",
        "counted once, after the exchange, in fp32; answers on a CPU are transformers'; not yet "
        "seen on a GPU",
        alone="wrong",
        proof="every rank's part would count the sink, layers/attention/triton_backend.py",
    ),
    Row(
        "sliding windows in the pool of all layers (Gemma-2, Gemma-3, Command-A, Exaone-4)",
        "",
        "works",
        "each rank attends the window's tokens that it holds, exactly as many keys as the "
        "configuration says (upstream's Triton attends one less at decode, some classes one more); "
        "not yet seen on a GPU",
        alone="wrong",
        proof="every rank would count its own tokens back, layers/attention/triton_backend.py",
    ),
    Row(
        "sliding windows that the ranks of a group do not share evenly",
        "",
        "refused",
        "kernels count a window in tokens of this rank, as many on every rank",
        "Split the sequence over a number of ranks that divides the window, or serve this model "
        "without --dcp-size",
        _window_uneven,
        alone="wrong",
        proof="every rank would count its own tokens back, layers/attention/triton_backend.py",
    ),
    Row(
        "sliding windows in a pool of their own, of other classes",
        "",
        "refused",
        "this class has not been tried",
        _PLAIN,
        _window,
        alone="wrong",
        proof="the allocator of windows does not widen, mem_cache/kv_cache_configurator.py",
    ),
    Row(
        "sliding windows with replicated queries, or fewer attention shards than key-value heads",
        "",
        "refused",
        "window layers keep the heads of plain TP, and so do full layers where each rank of a "
        "group has the same key-value head",
        "Split the sequence over at most tp size / key-value heads ranks, with gathered queries, "
        "or serve this model without --dcp-size",
        _window_heads,
        alone="wrong",
        proof="sgl-project/sglang#34355",
    ),
    Row(
        "sliding windows beside the hierarchical cache",
        "--enable-hierarchical-cache",
        "refused",
        "host copies of two pools with pages of different lengths have not been tried",
        _WITHOUT,
        _windows(_flag("enable_hierarchical_cache")),
    ),
    Row(
        "sliding windows beside drafts",
        "--speculative-algorithm",
        "refused",
        "accepted drafts move in one pool by owner and in the other not, and the window of each "
        "draft begins elsewhere in the prefix: neither is built",
        _WITHOUT,
        _window_drafts,
    ),
    Row(
        "sliding windows in pipeline stages",
        "--pp-size",
        "refused",
        "it has not been tried",
        "Use --tp-size and --dcp-size alone",
        _windows(_more_than_one("pp_size")),
    ),
    Row(
        "layers that read another layer's cache (Gemma-3n, small Gemma-4)",
        "",
        "refused",
        "such a layer brings no keys and values of its chunk, which the adapters attend before "
        "they read the cache",
        _PLAIN,
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
        "attention sinks of MLA models",
        "",
        "refused",
        "the exchange of MLA is in the model, which hands it no sinks",
        _PLAIN,
        _sinks,
        alone="wrong",
        proof="refused by that reason for HYV4, arg_groups/model_overrides/deepseek_v2.py",
    ),
    Row(
        "chunked local attention",
        "",
        "refused",
        "chunks are not cut by owner; and Llama-4 would gain nothing, with 8 key-value heads on 8 "
        "ranks, and 40 query heads that allow no 16",
        _PLAIN,
        _chunks,
        alone="wrong",
        proof="no backend with chunks knows --dcp-size",
    ),
    Row(
        "encoder-decoder models",
        "",
        "refused",
        "cross attention reads a second cache that is not sharded",
        _PLAIN,
        _model("is_encoder_decoder"),
        alone="refuses",
    ),
    Row(
        "hybrid linear attention of Qwen3-Next, Qwen3.5, Kimi-Linear, Nemotron-H, Granite-4-H, "
        "Falcon-H1 and LFM2",
        "",
        "works",
        "answers are transformers', hits asserted; A a multiple of KV heads, states as in plain TP",
        alone="serves",
        proof="test_kimi_linear_dcp4, test_qwen3p5_triton_dcp; Qwen3-Next starts",
    ),
    Row(
        "replicated queries of hybrid models",
        "",
        "refused",
        "gates beside the queries of some are cut by tp size, and the others have not been tried",
        "Use --dcp-size alone (tp size / attn tp size), or --no-dcp-replicate-q-proj beside "
        "--attn-tp-size",
        _gated_replicas,
        alone="lacks",
    ),
    Row(
        "prefixes of hybrid models without snapshots of states",
        "--mamba-radix-cache-strategy",
        "refused",
        "a state is then kept for the end of a request alone, which is no page of the group",
        "Use --disable-radix-cache, or extra_buffer where the model has it",
        _states_without_snapshots,
        alone="refuses",
    ),
    Row(
        "prefill chunk of hybrid models shorter than a chunk of their kernels",
        "--chunked-prefill-size",
        "refused",
        "chunks are cut to whole widened pages and to whole chunks of the kernels that make states",
        "Use a larger chunk, or a smaller --page-size",
        _chunk_without_states,
        alone="refuses",
    ),
    Row(
        "other hybrid linear attention of MLA, of Qwen3.5 and where A is a multiple of KV heads; "
        "what else moves states",
        "",
        "own",
        "recurrent states stay as under plain TP; GQA by --attention-backend triton; speculative "
        "decoding, the hierarchical cache, mixed chunks, pipeline stages and disaggregation",
        given=_hybrid_linear_grouped,
        alone="serves",
        proof="test_kimi_linear_dcp4, test_qwen3p5_triton_dcp; models/kimi_k3.py",
    ),
    Row(
        "other hybrid linear attention",
        "",
        "refused",
        "the ranks of a group would hold different key-value heads",
        "Serve this model without --dcp-size, or with a smaller one",
        _hybrid_linear_split,
        alone="wrong",
        proof="sgl-project/sglang#34355",
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
        _PLAIN,
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
        _PLAIN,
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
        "dual chunk attention",
        "",
        "refused",
        "its three partial softmaxes are not cut by owner",
        _PLAIN,
        _dual_chunk,
    ),
)

# By a request to a server that runs, and so by request: `managers/scheduler.py`.
STORAGE: tuple[Row, ...] = tuple(
    row for row in TABLE if row.flag == "--hicache-storage-backend" and row.status != "works"
)

# What only the series has, refused where SGLang serves by itself.
ONLY_THE_SERIES: tuple[Row, ...] = (
    Row(
        "attention on fewer head shards than ranks",
        "--attn-tp-size",
        "refused",
        "only the series has it",
        "Use --dcp-size in its place: tp size / attn tp size",
        _attn_tp_size,
        alone="lacks",
    ),
    Row(
        "one-kernel exchange",
        "--dcp-comm-backend",
        "refused",
        "only the series has it",
        _A2A,
        _symm_at_all,
        alone="lacks",
    ),
)

# Refused where SGLang serves by itself, beside the rows of `TABLE` that it fails too.
BESIDE_OWN: tuple[Row, ...] = (
    *ONLY_THE_SERIES,
    Row(
        "CPUs and other devices",
        "platform",
        "refused",
        "SGLang builds its decode-context-parallel group on CUDA, HIP, NPU and XPU only",
        "Leave --dcp-size out",
        _no_group,
        alone="refuses",
    ),
    Row(
        "key-value heads that ranks of a group do not share",
        "",
        "refused",
        "SGLang's loader gives the ranks of a group different key-value heads",
        "Use a --dcp-size of at most tp size / key-value heads, or leave it out",
        _split_heads,
        alone="wrong",
        proof="sgl-project/sglang#34355; arg_groups/attention_hook.py refuses it on XPUs",
    ),
    Row(
        "MLA models without a plan for a sharded prefix",
        "",
        "refused",
        "SGLang's model class plans no gathering of the latent prefix",
        "Leave --dcp-size out",
        _no_plan,
        alone="wrong",
        proof="model_executor/runner/eager_runner.py makes none, and attention reads it",
    ),
    Row(
        "attention backends without decode context parallelism, on NVIDIA GPUs",
        "--attention-backend",
        "refused",
        "it reads the rows of other ranks' tokens and returns no LSE",
        "Use --attention-backend triton for GQA and MHA, flashinfer, trtllm_mla or cutedsl_mla for "
        "MLA",
        _backend_without_dcp,
        alone="wrong",
        proof="sgl-project/sglang#35384, #39440, #30444",
    ),
    *(
        Row(
            f"{half} kernels of DSA but trtllm, on NVIDIA GPUs",
            f"--dsa-{half}-backend",
            "refused",
            "it reads the rows of other ranks' tokens and returns no LSE",
            "Use trtllm, or leave the flag out",
            _dsa_kernel(half),
            alone="wrong",
            proof="layers/attention/dsa_backend.py: only _forward_trtllm knows --dcp-size",
        )
        for half in ("prefill", "decode")
    ),
    Row(
        "drafts of MLA models that another backend than cutedsl_mla verifies, on NVIDIA GPUs",
        "--attention-backend",
        "refused",
        "its verify pass returns no LSE",
        "Use --attention-backend cutedsl_mla",
        _verify_without_lse,
        alone="wrong",
        proof="layers/attention/attention_registry.py, flashinfer_mla_backend.py",
    ),
)
