"""Rows: how parts of attention are exchanged."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import flag, not_of_mla
from sglang_helix.srt.compatibility.row import A2A, WITHOUT, Row
from sglang_helix.srt.compatibility.situation import Situation


def symm(situation: Situation, problem: bool) -> object | None:
    """The exchange asked for, where it is in one kernel and the problem is there."""
    from sglang_helix.srt.layers.dcp.exchange import BACKENDS

    asked = situation.args.dcp_comm_backend
    backend = BACKENDS.get(asked)
    return asked if problem and backend and backend.kernel else None


def _fi_a2a(situation: Situation) -> object | None:
    backend = situation.args.dcp_comm_backend
    return backend if backend == "fi_a2a" else None


def _symm_without_cuda(situation: Situation) -> object | None:
    from sglang.srt.runtime_context import get_platform

    return symm(situation, not get_platform().is_cuda)


def _symm_ragged_heads(situation: Situation) -> object | None:
    from sglang_helix.srt.layers.dcp.partial import VECTOR_BYTES

    model = situation.model
    widths = [model.kv_lora_rank if situation.mla else model.v_head_dim]
    widths += [model.v_head_dim] if situation.replicates_v_proj else []
    ragged = any(width * model.dtype.itemsize % VECTOR_BYTES for width in widths)
    return symm(situation, ragged)


def _symm_reference(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of
    from sglang.srt.runtime_context import get_platform

    reference = attention_backends_of(situation.args)[1] == "torch_native"
    return symm(situation, reference and get_platform().is_cuda)


def _symm_stages(situation: Situation) -> object | None:
    return symm(situation, situation.args.pp_size > 1)


def _symm_hosts(situation: Situation) -> object | None:
    args = situation.args
    ranks_of_a_host = args.tp_size // max(args.nnodes // args.pp_size, 1)
    return symm(situation, ranks_of_a_host % args.dcp_size != 0)


EXCHANGES: tuple[Row, ...] = (
    Row(
        "FlashInfer's all-to-all of GQA and MHA models",
        "--dcp-comm-backend",
        "refused",
        "it serves MLA models only, and this model's attention is not MLA",
        A2A,
        not_of_mla(_fi_a2a),
    ),
    Row(
        "one-kernel exchange without NVIDIA GPUs",
        "--dcp-comm-backend",
        "refused",
        "it needs CUDA devices that have peer access to each other",
        A2A,
        _symm_without_cuda,
        alone="lacks",
    ),
    Row(
        "one-kernel exchange of heads that are not whole 16-byte vectors",
        "--dcp-comm-backend",
        "refused",
        "it moves heads in 16-byte vectors, and this model's are not a whole number of them",
        A2A,
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
        A2A,
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
        "NCCL symmetric memory",
        "--enable-symm-mem",
        "refused",
        "captured graphs answer wrongly at small batches",
        WITHOUT,
        flag("enable_symm_mem"),
        alone="wrong",
        proof="sgl-project/sglang#37768",
    ),
)
