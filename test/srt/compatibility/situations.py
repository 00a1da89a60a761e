"""What the tests of verdicts are about: models by their configurations, machines, and layouts."""

from typing import Any

from sglang_helix.check import facts_of
from srt.resolved import SMALL
from srt.test_refused_models import LATENT, SPARSE

LINEAR = {"num_heads": 8, "head_dim": 32, "short_conv_kernel_size": 4}
QWEN = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "num_key_value_heads": 2,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "dsa": {"architectures": ["DeepseekV32ForCausalLM"], **SPARSE},
    "kimi_linear": {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        **LATENT,
        **MOE,
        "num_experts_per_token": 2,
        "mla_use_nope": True,
        "linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1], **LINEAR},
    },
    "ring": {
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        "model_type": "bailing_hybrid",
        **LATENT,
        **MOE,
        "layer_group_size": 2,
        "group_norm_size": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "linear_silu": False,
        "use_qk_norm": True,
    },
    "qwen3_next": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **QWEN},
    "qwen3_5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {**SMALL, **QWEN, "model_type": "qwen3_5_text"},
    },
}
TP4 = {"tp_size": 4, "dcp_size": 2}
# Of Kimi-Linear, what moves states is SGLang's own; of Qwen3.5, fewer shards than key-value heads.
CUTEDSL_KIMI = {"attention_backend": "cutedsl_mla", "enable_mixed_chunk": True}
SPLIT = {"dcp_size": 4}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "AMD": {"is_hip": True, "device_sm": 0},
    "XPU": {"is_xpu": True, "device_sm": 0},
    "NPU": {"is_npu": True, "device_sm": 0},
    "CPU": {"device_sm": 0},
}


def facts(machine: str) -> dict[str, Any]:
    if machine in ELSEWHERE:
        return {"is_cuda": False, "has_flashinfer": False, **ELSEWHERE[machine]}
    return facts_of(machine)


# Arguments that are the series' own.
OURS = ("attn_tp_size", "dcp_replicate_v_proj")
