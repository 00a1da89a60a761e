"""Models that the loader leaves as plain TP builds them, or only gives a plan, and transformers.

With A >= KV nothing is fitted, whatever names a class has. The load is that of `test_models.py`.
"""

from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES, Family, make_checkpoint
from srt.fresh import Fresh
from srt.models.test_models import serve_and_check

COMMON = {**FAMILIES["llama"].config, "num_hidden_layers": 2}
WIDE = {**COMMON, "head_dim": 16}  # for configurations that take it from the hidden size
MLA = {**FAMILIES["deepseek_v2"].config, "num_hidden_layers": 2}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}

# Two key-value heads, or one.
GQA = {
    "afmoe": Family(  # a gate beside the projections; its experts are Triton only
        "afmoe",
        {
            **COMMON,
            "layer_types": ["full_attention"] * 2,
            "num_dense_layers": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "num_shared_experts": 1,
        },
    ),
    "hy_v3": Family(
        "hy_v3",
        {
            **COMMON,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": ROPE,
        },
        {"use_qk_norm": True, "first_k_dense_replace": 1, "route_norm": True},
    ),
    "gpt_bigcode": Family(
        "gpt_bigcode",
        {
            "vocab_size": COMMON["vocab_size"],
            "n_embd": 128,
            "n_head": 8,
            "n_layer": 2,
            "n_inner": 256,
            "n_positions": 4096,
            "multi_query": True,
        },
    ),
    "ministral3": Family("ministral3", COMMON),
    "minimax_m2": Family(  # norms over all heads, whose means all ranks share
        "minimax_m2",
        {
            **COMMON,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "rope_parameters": ROPE,
        },
        {
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "rotary_dim": 32,
            "rope_theta": 10000.0,
        },
    ),
    "stablelm": Family("stablelm", {**WIDE, "hidden_act": "silu"}),
}


@pytest.mark.parametrize("family", GQA)
def test_model_as_built_equals_transformers(ready: Fresh, tmp_path: Path, family: str) -> None:
    model = make_checkpoint(GQA[family], tmp_path)
    serve_and_check(ready, model, 4, 2, "a2a", replicated=False)


# MLA of DeepSeek's class in models that have no plan of their own.
PLANNED = {
    "glm4_moe_lite": Family(
        "glm4_moe_lite",
        {
            **MLA,
            "rope_parameters": ROPE,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    # Two attention layers in one, and experts that give back their input. With a scaling of the
    # rotary embedding, which is none, since its class can be built with one alone.
    "longcat_flash": Family(
        "longcat_flash",
        {
            **MLA,
            "head_dim": 64,
            "ffn_hidden_size": 256,
            "expert_ffn_hidden_size": 64,
            "zero_expert_num": 4,
            "moe_topk": 3,
            "routed_scaling_factor": 2.5,
            "rope_parameters": ROPE,
        },
        {
            "rope_theta": 10000.0,
            "rope_parameters": None,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 1.0,
                "original_max_position_embeddings": 4096,
            },
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
    ),
}


@pytest.mark.parametrize("family", PLANNED)
def test_model_without_a_plan_equals_transformers(
    ready: Fresh, tmp_path: Path, family: str
) -> None:
    serve_and_check(ready, make_checkpoint(PLANNED[family], tmp_path), 4, 2, "a2a")
