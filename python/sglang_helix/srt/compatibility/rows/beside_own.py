"""What is refused where SGLang serves by itself."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import on_platform
from sglang_helix.srt.compatibility.row import A2A, Given, Row
from sglang_helix.srt.compatibility.rows.exchanges import symm
from sglang_helix.srt.compatibility.rows.parallel import values_first
from sglang_helix.srt.compatibility.situation import Situation

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


def _dsa_kernel(half: str) -> Given:
    def kernel(situation: Situation) -> object | None:
        name = getattr(situation.args, f"dsa_{half}_backend")
        return name if situation.dsa and on_platform("cuda") and name != "trtllm" else None

    return kernel


def _attn_tp_size(situation: Situation) -> object | None:
    return situation.attn_tp_size


def _symm_at_all(situation: Situation) -> object | None:
    return symm(situation, True)


def _no_group(situation: Situation) -> object | None:
    return None if on_platform("cuda", "hip", "npu", "xpu") else situation.args.device


def _split_heads(situation: Situation) -> object | None:
    return None if situation.sglang_groups_heads else True


def _verify_without_lse(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    args = situation.args
    drafts = args.speculative_algorithm not in (None, "NGRAM")
    if not on_platform("cuda") or situation.dsa or not (situation.mla and drafts):
        return None
    verify = attention_backends_of(args)[args.speculative_attention_mode == "decode"]
    return None if verify == "cutedsl_mla" else verify


def _backend_without_dcp(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    if not on_platform("cuda") or situation.dsa or _verify_without_lse(situation):
        return None
    prefill, decode = attention_backends_of(situation.args)
    if situation.mla:
        return None if decode in ("flashinfer", "trtllm_mla", "cutedsl_mla") else decode
    return next((backend for backend in (prefill, decode) if backend != "triton"), None)


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
        "value projection before the exchange",
        "--dcp-replicate-v-proj",
        "refused",
        "only the series has it",
        "Leave the flag out",
        values_first,
        alone="lacks",
    ),
    Row(
        "one-kernel exchange",
        "--dcp-comm-backend",
        "refused",
        "only the series has it",
        A2A,
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
        "Use --attention-backend cutedsl_mla, on Blackwell, or EAGLE, EAGLE3, NEXTN, STANDALONE or "
        "NGRAM by another backend, which the series serves",
        _verify_without_lse,
        alone="wrong",
        proof="layers/attention/attention_registry.py, flashinfer_mla_backend.py",
    ),
)
