"""What works beside a sharded cache, and what is refused: the one table.

Start-up validation (`server_args.py`) walks it, ``python -m sglang_helix compatibility`` prints it,
and every row has its test. "Sharded cache" means `--dcp-size` > 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sglang_helix.srt.layers.attention.adapters import Attention

Status = Literal["works", "refused"]


@dataclass(frozen=True)
class Situation:
    """What a row looks at: resolved arguments, the model's configuration, `--attn-tp-size`."""

    args: Any
    model: Any
    attn_tp_size: int | None = None

    @property
    def sharded_by(self) -> tuple[str, int]:
        """The flag by which the user has the cache sharded, and its value."""
        if self.attn_tp_size is not None:
            return "--attn-tp-size", self.attn_tp_size
        return "--dcp-size", self.args.dcp_size

    @property
    def attention(self) -> Attention:
        """What the model's attention is, as the table of adapters has it."""
        return "MLA" if self.mla else "GQA"

    @property
    def mla(self) -> bool:
        """Whether the model's attention is multi-head latent attention."""
        from sglang.srt.configs.model_config import AttentionArch

        return bool(self.model.attention_arch == AttentionArch.MLA)


@dataclass(frozen=True)
class Row:
    """One feature.

    feature: what it is called. flag: how a user asks for it ("" where the model brings it).
    status: of the feature beside a sharded cache. why: reason or, for what works, its evidence.
    instead: what to do where it is refused. given: its value where it is in use, else None.
    """

    feature: str
    flag: str
    status: Status
    why: str
    instead: str = ""
    given: Callable[[Situation], object | None] = lambda situation: None

    def refusal(self, situation: Situation) -> str | None:
        """The error for a start-up that asks for it; None where it does not or it works."""
        if self.status == "works":
            return None
        value = self.given(situation)
        if value is None or value is False:
            return None
        asked = f"{self.flag} {value}" if self.flag and value is not True else self.flag
        subject = asked or f"{self.feature} ({' '.join(situation.model.hf_config.architectures)})"
        flag, size = situation.sharded_by
        instead = self.instead.replace("--dcp-size", flag)
        return f"{subject} is not supported with {flag} {size}: {self.why}. {instead}."


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


def _hybrid_linear(situation: Situation) -> object | None:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(situation.model) is not None or None


def _sparse(situation: Situation) -> object | None:
    from sglang.srt.configs import model_config

    config = situation.model.hf_config
    kinds = (
        model_config.is_deepseek_dsa,
        model_config.is_deepseek_v4,
        model_config.is_minimax_sparse,
    )
    return any(sparse(config) for sparse in kinds) or None


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


def _draft_model(situation: Situation) -> object | None:
    asked = situation.args.speculative_algorithm
    return None if asked == "NGRAM" else asked


def _ngram_of_mla(situation: Situation) -> object | None:
    asked = situation.args.speculative_algorithm
    return asked if asked == "NGRAM" and situation.mla else None


def _ngram_graph(situation: Situation) -> object | None:
    ngram = situation.args.speculative_algorithm == "NGRAM"
    return _graph(situation, "decode") if ngram else None


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


def _lora(situation: Situation) -> object | None:
    args = situation.args
    # SGLang turns the flag on for the paths, but only after resolution.
    return bool(args.lora_paths if args.enable_lora is None else args.enable_lora) or None


def _beams(situation: Situation) -> object | None:
    """Of a request: there `args` has the request's `beam_width`; a server's has none."""
    width = getattr(situation.args, "beam_width", None)
    return width if width and width > 1 else None


def _untried_platform(situation: Situation) -> object | None:
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    names = ("hip", "npu", "xpu", "musa", "mps")
    return next((name for name in names if getattr(platform, f"is_{name}")), None)


def _bitsandbytes(situation: Situation) -> object | None:
    asked = (situation.model.quantization, situation.args.load_format)
    return "bitsandbytes" if "bitsandbytes" in asked and not situation.mla else None


def _untried_storage(situation: Situation) -> object | None:
    asked = situation.args.hicache_storage_backend
    return None if situation.mla and asked == "file" else asked


def _sharded_weights(situation: Situation) -> object | None:
    asked = situation.args.load_format
    shards = ("sharded_state", "presharded", "remote", "remote_instance")
    return asked if asked in shards and not situation.mla else None


def _symm(situation: Situation, problem: bool) -> object | None:
    from sglang_helix.srt.layers.dcp.exchange import BACKENDS

    asked = situation.args.dcp_comm_backend
    backend = BACKENDS.get(asked)
    return asked if problem and backend and backend.prepare else None


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
    Row("mixed chunk", "--enable-mixed-chunk", "works", "answers equal plain TP, GQA and MLA"),
    Row("pipeline parallelism", "--pp-size", "works", "end-to-end test, two stages of two ranks"),
    Row("streaming, OpenAI endpoints", "", "works", "answers equal plain TP, GQA and MLA"),
    Row("structured output", "--grammar-backend", "works", "answers equal plain TP, GQA and MLA"),
    Row("log-probabilities of prompts", "", "works", "equal plain TP, GQA and MLA"),
    Row("sampling penalties, several samples", "", "works", "answers equal plain TP"),
    Row("health and metrics", "--enable-metrics", "works", "served, GQA and MLA"),
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
        "answers are transformers', GQA, accepted drafts asserted; without CUDA graphs",
    ),
    Row("no prefix cache", "--disable-radix-cache", "works", "answers are transformers', MLA"),
    Row(
        "other accelerators than CUDA",
        "platform",
        "refused",
        "it has never been tried there",
        "Leave --dcp-size out, or leave helix out of SGLANG_PLUGINS for SGLang's own",
        _untried_platform,
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
    ),
    Row(
        "one-kernel exchange of heads that are not whole 16-byte vectors",
        "--dcp-comm-backend",
        "refused",
        "it moves heads in 16-byte vectors, and this model's are not a whole number of them",
        _A2A,
        _symm_ragged_heads,
    ),
    Row(
        "one-kernel exchange of the reference backend",
        "--dcp-comm-backend",
        "refused",
        "torch_native decodes in fp32, and symm carries the dtype of the model",
        "Use --dcp-comm-backend a2a, or another --attention-backend",
        _symm_reference,
    ),
    Row(
        "one-kernel exchange in pipeline stages",
        "--dcp-comm-backend",
        "refused",
        "its programs wait while they fill the GPU, and could keep out NCCL's, which send to the "
        "next stage meanwhile and which peers wait for",
        _A2A,
        _symm_stages,
    ),
    Row(
        "attention data parallelism",
        "--attn-dp-size",
        "refused",
        "KVP groups could cross replicas",
        f"Instead, {_ONE_GROUP}",
        _more_than_one("attn_dp_size"),
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
    ),
    Row(
        "speculative decoding, but with n-gram drafts",
        "--speculative-algorithm",
        "refused",
        "draft models attend with caches and metadata of their own, none of them by owner",
        "Use NGRAM, or leave the flag or --dcp-size out",
        _draft_model,
    ),
    Row(
        "n-gram drafts of MLA models",
        "--speculative-algorithm",
        "refused",
        "a verify pass of MLA has no plan to gather the latent prefix",
        _WITHOUT,
        _ngram_of_mla,
    ),
    Row(
        "n-gram drafts verified in CUDA graphs",
        "--cuda-graph-backend-decode",
        "refused",
        "a captured verify pass has not been tried",
        "Use --cuda-graph-backend-decode disabled with --speculative-algorithm NGRAM",
        _ngram_graph,
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
        "prefill-decode disaggregation",
        "--disaggregation-mode",
        "refused",
        "SGLang's transfer of K and V knows neither owners nor the heads of a group, and refuses; "
        "MLA's, by Mooncake, NIXL or Mori, has not been tried",
        _WITHOUT,
        _unlike("disaggregation_mode", "null", None),
    ),
    Row(
        "storage behind the hierarchical cache, but for MLA in files",
        "--hicache-storage-backend",
        "refused",
        "K and V have no page format by owner, and no other store has been tried with MLA",
        "Leave the flag out, copies on the host work; for MLA, file works too",
        _untried_storage,
    ),
    Row(
        "LMCache",
        "--enable-lmcache",
        "refused",
        "it stores whole pages",
        _WITHOUT,
        _flag("enable_lmcache"),
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
        "unified memory pool",
        "--enable-unified-memory",
        "refused",
        "its write locations are translated before the owner of a row is known",
        _WITHOUT,
        _flag("enable_unified_memory"),
    ),
    Row(
        "LoRA",
        "--enable-lora",
        "refused",
        "its buffers are sized by tp size, not by the heads of a group",
        _WITHOUT,
        _lora,
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
        "captured graphs answer wrongly at small batches (sgl-project/sglang#37768)",
        _WITHOUT,
        _flag("enable_symm_mem"),
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
        "it is prefill-decode disaggregation, which is refused itself",
        _WITHOUT,
        _flag("enable_pd_role_switch"),
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
        "sliding-window attention",
        "",
        "refused",
        "windows are not cut by owner",
        _PLAIN,
        _model("is_hybrid_swa"),
    ),
    Row(
        "attention sinks",
        "",
        "refused",
        "every rank's part would count the sink",
        _PLAIN,
        _model("has_attention_sinks"),
    ),
    Row(
        "chunked local attention",
        "",
        "refused",
        "chunks are not cut by owner",
        _PLAIN,
        _model("attention_chunk_size"),
    ),
    Row(
        "encoder-decoder models",
        "",
        "refused",
        "cross attention reads a second cache that is not sharded",
        _PLAIN,
        _model("is_encoder_decoder"),
    ),
    Row(
        "hybrid linear attention",
        "",
        "refused",
        "recurrent states cannot be split by token",
        _PLAIN,
        _hybrid_linear,
    ),
    Row(
        "sparse attention (DSA, DeepSeek-V4, MiniMax-M3)",
        "",
        "refused",
        "top-k indices address the whole sequence",
        _PLAIN,
        _sparse,
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


def refusals(situation: Situation) -> list[str]:
    """Every reason not to start; empty when the combination works."""
    return [reason for row in TABLE if (reason := row.refusal(situation))]
