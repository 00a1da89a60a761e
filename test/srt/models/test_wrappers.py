"""Models that SGLang reads otherwise than transformers does: their text against transformers.

Those that read pictures too, where SGLang's class of the wrapper has no plan for a sharded prefix
of MLA, and others of the same weights under other names. What transformers answers is the answer of
the text's own class.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sglang_cpu_reference.checkpoints import FAMILIES, Family, make_checkpoint
from srt.expected import oracle
from srt.fresh import Fresh
from srt.models.serving import Report, answer_all, command_line, scheduler_of
from srt.models.test_models import BATCHES, CHUNK, NEW_TOKENS, PAGE, SIZES, check_reports

MLA = {**FAMILIES["deepseek_v3"].config, "num_hidden_layers": 2}
GQA = {**FAMILIES["llama"].config, "num_hidden_layers": 2, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
PIXTRAL = {**VISION, "model_type": "pixtral", "image_size": 16, "patch_size": 8}
PICTURES = FAMILIES["qwen3_5_vl"].config
# Queries are scaled by position, from the middle of a chunk on.
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": CHUNK // 2,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 1.0,
}
# As transformers knows them.
TEXTS = {
    "kimi_vl": Family("deepseek_v3", {**MLA, "q_lora_rank": None, "rope_parameters": ROPE}),
    "mistral-large-3": Family(
        "mistral3",
        {
            "text_config": {
                **MLA,
                "model_type": "mistral4",
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "rope_parameters": {**SCALED, "attention_factor": 1.0},
            },
            "vision_config": PIXTRAL,
            "tie_word_embeddings": False,
        },
        {"language_model_only": True},
    ),
    "mistral3": Family(
        "mistral3",
        {
            "text_config": {
                **GQA,
                "model_type": "ministral3",
                # SGLang looks for it here, and transformers in what follows.
                "original_max_position_embeddings": CHUNK // 2,
                "rope_parameters": {**SCALED, "mscale": 1.0, "mscale_all_dim": 1.0},
            },
            "vision_config": PIXTRAL,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        {
            **PICTURES,
            "vision_config": {**PICTURES["vision_config"], "deepstack_visual_indexes": [0]},
            "text_config": {
                **GQA,
                **EXPERTS,
                "rope_parameters": {
                    **ROPE,
                    "mrope_interleaved": True,
                    "mrope_section": [6, 5, 5],
                },
            },
        },
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        {
            **GQA,
            "head_dim": 16,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
        },
    ),
    # Ling is GLM's attention with DeepSeek's groups of experts.
    "ling": Family(
        "glm4_moe",
        {
            **GQA,
            **EXPERTS,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "norm_topk_prob": True,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
    ),
}


# As SGLang does.
PUBLISHED = {
    "kimi_vl": {"architectures": ["KimiVLForConditionalGeneration"]},
    "mistral-large-3": {"architectures": ["PixtralForConditionalGeneration"]},
    "mistral3": {"architectures": ["Mistral3ForConditionalGeneration"]},
    "qwen3_vl_moe": {"architectures": ["Qwen3VLMoeForConditionalGeneration"]},
    "ernie4_5_moe": {"architectures": ["Ernie4_5_MoeForCausalLM"]},
    "ling": {"architectures": ["BailingMoeV2ForCausalLM"]},
}


def kimi_vl(text: Path, weights: dict[str, Any], served: Path) -> None:
    """As published: the text's weights and configuration below their own name."""
    config = json.loads((text / "config.json").read_text())
    entries = {
        **PUBLISHED["kimi_vl"],
        "model_type": "kimi_vl",
        "text_config": config,
        "vision_config": {**VISION, "model_type": "moonvit"},
    }
    (served / "config.json").write_text(json.dumps(entries))
    save_file({f"language_model.{n}": w for n, w in weights.items()}, served / "model.safetensors")


# Weights of a layer, by the name that its publisher gave them.
MISTRAL_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "mlp.shared_experts": "shared_experts",
    "mlp.experts": "experts",
    "mlp.gate.": "gate.",
    "mlp.": "feed_forward.",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "model.language_model.embed_tokens": "tok_embeddings",
    "model.language_model.": "",
    "lm_head": "output",
}


def published_name(name: str, names: dict[str, str]) -> str:
    """The publisher's name of a weight."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def mistral_large_3(text: Path, weights: dict[str, Any], served: Path) -> None:
    """As published: names and a configuration of its own."""
    config = json.loads((text / "config.json").read_text())["text_config"]
    rope = config["rope_parameters"]
    original = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
    same = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    same += ("vocab_size", "max_position_embeddings", "head_dim")
    params = {
        **{name: config[name] for name in same},
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "tied_embeddings": False,
        "llama_4_scaling": {**original, "beta": rope["llama_4_scaling_beta"]},
        "yarn": {
            **original,
            "factor": rope["factor"],
            "apply_scale": False,
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
        },
        "moe": {
            "route_every_n": 1,
            "first_k_dense_replace": config["first_k_dense_replace"],
            "num_experts": config["n_routed_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
            "routed_scale": 1.0,
            "expert_hidden_dim": config["moe_intermediate_size"],
            "num_shared_experts": config["n_shared_experts"],
        },
        "vision_encoder": {
            **VISION,
            "image_token_id": 259,
            "num_channels": 3,
            "image_size": 16,
            "patch_size": 8,
            "rope_theta": 10000.0,
            "spatial_merge_size": 2,
            "mm_projector_id": "patch_merge",
            "add_pre_mm_projector_layer_norm": True,
            "adapter_bias": False,
        },
    }
    (served / "params.json").write_text(json.dumps(params))
    save_file(
        {
            published_name(name, MISTRAL_NAMES): weight
            for name, weight in weights.items()
            if "vision" not in name
        },
        served / "consolidated.safetensors",
    )


def qwen3_vl_moe(text: Path, weights: dict[str, Any], served: Path) -> None:
    """Experts one by one: in one, those of transformers stand the other way round."""
    (served / "config.json").write_text((text / "config.json").read_text())
    save_file(weights, served / "model.safetensors")


LING_NAMES = {
    "embed_tokens": "word_embeddings",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "e_score_correction_bias": "expert_bias",
}


def ling(text: Path, weights: dict[str, Any], served: Path) -> None:
    """As published: names of its own, and one projection for queries, keys and values."""
    entries = {
        **json.loads((text / "config.json").read_text()),
        **PUBLISHED["ling"],
        "model_type": "llama",  # its own code's is not at hand
        "num_shared_experts": 1,
        "moe_router_enable_expert_bias": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "partial_rotary_factor": 0.5,
        "use_bias": False,
        "use_qkv_bias": False,
        "embedding_dropout": 0.0,
    }
    (served / "config.json").write_text(json.dumps(entries))
    named = {}
    for name, weight in weights.items():
        owner, is_query, _ = name.partition("self_attn.q_proj")
        if is_query:
            parts = [weights[f"{owner}self_attn.{kind}_proj.weight"] for kind in "qkv"]
            named[f"{owner}attention.query_key_value.weight"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            named[published_name(name, LING_NAMES)] = weight
    save_file(named, served / "model.safetensors")


def by_expert(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights of experts one by one, which a built model of transformers holds in one."""
    found = {}
    for name, weight in weights.items():
        layer, is_experts, kind = name.partition("experts.")
        if not is_experts or layer.endswith("shared_") or weight.dim() < 3:
            found[name] = weight.clone()
            continue
        for number, one in enumerate(weight):
            parts = {"gate_proj": one, "up_proj": one}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
            else:
                parts = {kind: one}
            for part, own in parts.items():
                found[f"{layer}experts.{number}.{part}.weight"] = own.clone()
    return found


WRITERS: dict[str, Callable[[Path, dict[str, Any], Path], None]] = {
    "kimi_vl": kimi_vl,
    "mistral-large-3": mistral_large_3,
    "qwen3_vl_moe": qwen3_vl_moe,
    "ling": ling,
}


@pytest.mark.parametrize("family", TEXTS)
def test_text_as_published_equals_transformers(ready: Fresh, tmp_path: Path, family: str) -> None:
    text = served = make_checkpoint(TEXTS[family], tmp_path / "text")
    if family in WRITERS:
        served = tmp_path / family
        served.mkdir()
        WRITERS[family](text, by_expert(oracle(text).model.state_dict()), served)
    layout = ("--dcp-size", "2", "--dcp-comm-backend", "a2a", "--skip-tokenizer-init")
    argv = command_line(served, 2, *layout, *SIZES, "--dtype", "float32")
    check_reports(text, ready.ranks(in_fp32, 2, argv, PUBLISHED[family]), 2 * PAGE)


def in_fp32(rank: int, argv: list[str], published: dict[str, list[str]]) -> Report:
    """In a rank: its answers."""
    from sglang.srt.arg_groups.model_override_base import MODEL_OVERRIDES
    from sglang.srt.models import ernie4
    from sglang.srt.models.llava import LlavaForConditionalGeneration

    # SGLang has Mistral's class in bf16, whatever is asked for.
    MODEL_OVERRIDES.pop("PixtralForConditionalGeneration")
    # Where it runs in torch, the experts' bias has one dimension.
    ernie4._is_cpu = True
    # What it knows of text and tower it finds by importing each class of transformers.
    parts = {
        "Ministral3Config": "Ministral3ForCausalLM",
        "PixtralVisionConfig": "PixtralVisionModel",
    }
    LlavaForConditionalGeneration._config_cls_name_to_arch_name_mapping = lambda *_: parts
    scheduler = scheduler_of(rank, argv)
    assert scheduler.model_config.hf_config.architectures == published["architectures"]
    return answer_all(scheduler, BATCHES, NEW_TOKENS, retracting=True)
