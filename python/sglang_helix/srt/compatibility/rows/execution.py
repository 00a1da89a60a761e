"""Rows: graphs, compilation and what else changes a pass."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import flag
from sglang_helix.srt.compatibility.row import WITHOUT, Row
from sglang_helix.srt.compatibility.situation import Situation


def graph(situation: Situation, phase: str) -> str | None:
    """The backend of a phase's CUDA graphs; None: the phase runs without."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    backend = getattr(situation.args.cuda_graph_config, phase).backend
    return None if backend == Backend.DISABLED else str(getattr(backend, "value", backend))


def _prefill_graph(situation: Situation) -> object | None:
    return graph(situation, "prefill")


def _decode_graph_in_pieces(situation: Situation) -> object | None:
    backend = graph(situation, "decode")
    return None if backend == "full" else backend


def _glue_graph(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get()) or None


def _skipped_softmax(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of
    from sglang.srt.environ import envs

    heeded = attention_backends_of(situation.args)[1] in ("trtllm_mla", "cutedsl_mla")
    return envs.SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR.get() if heeded else None


EXECUTION: tuple[Row, ...] = (
    Row(
        "prefill CUDA graphs",
        "--cuda-graph-backend-prefill",
        "refused",
        "a captured prefill has no plan for the sharded prefix",
        "Use --cuda-graph-backend-prefill disabled",
        _prefill_graph,
    ),
    Row(
        "decode CUDA graphs in pieces",
        "--cuda-graph-backend-decode",
        "refused",
        "it has not been tried, and with --debug-cuda-graph would write to an earlier pass's rows",
        "Use --cuda-graph-backend-decode full",
        _decode_graph_in_pieces,
    ),
    Row(
        "captured preparation of decode graphs",
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
        "refused",
        "what graphs do not prepare themselves the host plans for each batch, or drafts bring",
        "Unset the variable",
        _glue_graph,
    ),
    Row(
        "torch.compile of the model",
        "--enable-torch-compile",
        "refused",
        "the adapters have not been traced",
        WITHOUT,
        flag("enable_torch_compile"),
    ),
    Row(
        "deterministic inference",
        "--enable-deterministic-inference",
        "refused",
        "a prompt's sum of two parts depends on where its cached prefix ends",
        WITHOUT,
        flag("enable_deterministic_inference"),
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
        "two-batch overlap",
        "--enable-two-batch-overlap",
        "refused",
        "half batches would exchange on two streams at once",
        WITHOUT,
        flag("enable_two_batch_overlap"),
    ),
    Row(
        "prefill-decode multiplexing",
        "--enable-pdmux",
        "refused",
        "both phases would exchange at once on one group",
        WITHOUT,
        flag("enable_pdmux"),
    ),
    Row(
        "sequence-parallel norms",
        "--enable-layernorm-sp",
        "refused",
        "a QKV projection that every rank holds whole would not gather its input",
        WITHOUT,
        flag("enable_layernorm_sp"),
    ),
    Row(
        "NVIDIA megakernel",
        "--enable-nvidia-megakernel",
        "refused",
        "it replaces the model's forward pass, and with it the exchange",
        WITHOUT,
        flag("enable_nvidia_megakernel"),
    ),
)
