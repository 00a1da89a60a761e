"""Tiny checkpoints with random weights, in the real file format, made on the spot.

``make_checkpoint("llama", directory)`` writes what ``transformers`` and SGLang load as any other
model: config, fp32 safetensors, and a tokenizer whose tokens are the 256 bytes. The same family,
overrides and seed give the same bytes.

Weights are scaled by fan-in and the attention logits kept sharp, so that greedy tokens are diverse,
depend on single earlier tokens, and rarely near a tie: a wrong attention shows in the tokens.
"""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from sglang_cpu_reference.oracle import reference_of

#: One token per byte, then these, numbered from 256. The model's vocabulary is a little wider, as
#: real ones are.
SPECIAL_TOKENS = MappingProxyType(
    {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
)
VOCAB_SIZE = 320

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
_GQA = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
# Models whose configurations do not name it have heads of hidden size / heads.
_GQA_16 = {**_GQA, "head_dim": 16}
_MLA = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    # The widths of the real models, which kernels are written for; the rest is small.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
_QWEN_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
_GDN = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 64,
}
_KDA = {
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-5,  # SGLang has it built into the norm behind the recurrence
    "q_lora_rank": None,
    "linear_attn_config": {
        "kda_layers": [1, 3],  # counted from 1
        "full_attn_layers": [2, 4],
        "num_heads": 8,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "first_k_dense_replace": 0,  # transformers saves a dense layer under the name of a sparse one
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_renormalize": True,
    "routed_scaling_factor": 1.0,  # SGLang's model leaves it to kernels, not to its torch experts
}
_LIGHTNING = {
    "num_hidden_layers": 4,
    "layer_group_size": 2,
    "head_dim": 16,
    "group_norm_size": 4,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "linear_silu": False,
    "first_k_dense_replace": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 1.0,  # left to kernels, as KDA's
}
_MAMBA2 = {
    "num_hidden_layers": 5,
    "hybrid_override_pattern": "M*-M*",
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 64,
}
_PICTURES = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 128,
        "patch_size": 8,
    },
    "image_token_id": 259,
    "video_token_id": 260,
    "vision_start_token_id": 261,
    "vision_end_token_id": 262,
    "tie_word_embeddings": False,
}
_DEEPSEEK_MOE = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
}


class Family(NamedTuple):
    """What distinguishes a model family: transformers' model type and its configuration.

    written: entries of config.json that SGLang reads in the place of what transformers writes;
    None leaves one out.
    """

    model_type: str
    config: Mapping[str, Any]
    written: Mapping[str, Any] = MappingProxyType({})


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("llama", {**_COMMON, **_GQA}),
        "mistral": Family("mistral", {**_COMMON, **_GQA, "sliding_window": None}),
        "mixtral": Family("mixtral", {**_COMMON, **_GQA_16, "num_local_experts": 8}),
        "qwen2": Family("qwen2", {**_COMMON, **_GQA}),
        "qwen2_moe": Family(
            "qwen2_moe",
            {**_COMMON, **_GQA_16, **_QWEN_MOE, "shared_expert_intermediate_size": 64},
        ),
        "qwen3": Family("qwen3", {**_COMMON, **_GQA}),
        "qwen3_moe": Family("qwen3_moe", {**_COMMON, **_GQA, **_QWEN_MOE, "norm_topk_prob": True}),
        "glm4": Family("glm4", {**_COMMON, **_GQA, "attention_bias": True}),
        "glm4_moe": Family(
            "glm4_moe",
            {
                **_COMMON,
                **_GQA,
                **_DEEPSEEK_MOE,
                "attention_bias": True,
                "use_qk_norm": True,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "norm_topk_prob": True,
            },
        ),
        "qwen3_next": Family("qwen3_next", {**_COMMON, **_GQA, **_QWEN_MOE, **_GDN}),
        "qwen3_5": Family("qwen3_5_text", {**_COMMON, **_GQA, **_GDN}),
        "qwen3_5_vl": Family("qwen3_5", {**_PICTURES, "text_config": {**_COMMON, **_GQA, **_GDN}}),
        "qwen3_5_moe_vl": Family(
            "qwen3_5_moe", {**_PICTURES, "text_config": {**_COMMON, **_GQA, **_QWEN_MOE, **_GDN}}
        ),
        "qwen3_5_moe": Family("qwen3_5_moe_text", {**_COMMON, **_GQA, **_QWEN_MOE, **_GDN}),
        "nemotron_h": Family(
            "nemotron_h",
            {**_COMMON, **_GQA, **_MAMBA2},
            {"hybrid_override_pattern": "M*-M*", "layers_block_type": None},
        ),
        "granitemoehybrid": Family(
            "granitemoehybrid",
            {
                **_COMMON,
                **_GQA_16,
                "num_hidden_layers": 4,
                "layer_types": ["mamba", "attention"] * 2,
                "mamba_n_heads": 8,
                "mamba_d_head": 32,
                "mamba_n_groups": 1,
                "mamba_d_state": 16,
                "mamba_chunk_size": 64,
                "shared_intermediate_size": 128,
                # Its default is 1, of which softmax is so sharp that fp32's rounding shows.
                "attention_multiplier": 0.2,
                "position_embedding_type": "rope",
                "num_local_experts": 0,
                "num_experts_per_tok": 0,
            },
        ),
        "lfm2": Family(
            "lfm2",
            {
                **_COMMON,
                **_GQA_16,
                "num_hidden_layers": 4,
                "layer_types": ["conv", "full_attention"] * 2,
                "conv_L_cache": 3,
                "block_auto_adjust_ff_dim": False,
            },
        ),
        "lfm2_moe": Family(
            "lfm2_moe",
            {
                **_COMMON,
                **_GQA_16,
                "num_hidden_layers": 4,
                "layer_types": ["conv", "full_attention"] * 2,
                "conv_L_cache": 3,
                "num_dense_layers": 1,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
            },
        ),
        "falcon_h1": Family(
            "falcon_h1",
            {
                **_COMMON,
                **_GQA,
                "num_hidden_layers": 2,
                "mamba_n_heads": 8,
                "mamba_d_head": 32,
                "mamba_d_ssm": 256,
                "mamba_n_groups": 4,
                "mamba_d_state": 16,
                "mamba_chunk_size": 64,
            },
        ),
        # No layer has positions; a scale of YaRN would be the configuration's alone.
        "kimi_linear": Family(
            "kimi_linear",
            {**_COMMON, **_MLA, **_KDA, "rope_parameters": None},
            {"rope_parameters": None},
        ),
        "bailing_hybrid": Family(
            "bailing_hybrid",
            {**_COMMON, **_MLA, **_LIGHTNING, "rope_parameters": None},
            {"rope_parameters": None},
        ),
        "gpt_oss": Family(
            "gpt_oss",
            {
                **_COMMON,
                **_GQA,
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 16,
                "intermediate_size": 128,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 4096,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                },
            },
        ),
        "deepseek_v2": Family(
            "deepseek_v2",
            {
                **_COMMON,
                **_MLA,
                **_DEEPSEEK_MOE,
                "topk_method": "greedy",
                "n_group": 1,
                "topk_group": 1,
                "scoring_func": "softmax",
                "routed_scaling_factor": 1.0,
                "norm_topk_prob": False,
            },
        ),
        "deepseek_v3": Family(
            "deepseek_v3",
            {
                **_COMMON,
                **_MLA,
                **_DEEPSEEK_MOE,
                # transformers knows one method for V3, SGLang asks for its name.
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "norm_topk_prob": True,
            },
        ),
    }
)


def make_checkpoint(
    family: str | Family, directory: Path | str, *, seed: int = 0, **overrides: Any
) -> Path:
    """Write a checkpoint of the family into the directory (created if missing); returns the path.

    family: a name in `FAMILIES`, or any other that transformers has. overrides replace entries of
    its configuration, e.g. ``num_key_value_heads=4`` or ``q_lora_rank=None``. Raises ValueError for
    an unknown name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
        family = FAMILIES[family]
    model_type, config, written = family
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if reference := reference_of(model_type):
        model = reference(reference.config_class(**{**config, **overrides}))
    else:
        kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
        model = kind.from_config(
            AutoConfig.for_model(model_type, **{**config, **overrides}), dtype=torch.float32
        )
    biases = (one for one in model.named_buffers() if one[0].endswith("e_score_correction_bias"))
    fill(chain(model.named_parameters(), biases), seed)
    model.save_pretrained(directory)
    if written:
        path = directory / "config.json"
        entries = {**json.loads(path.read_text()), **written}
        kept = {name: entry for name, entry in entries.items() if entry is not None}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    tokenizer = _byte_tokenizer()
    tokenizer.save_pretrained(directory)
    if "vision_config" in config and not written.get("language_model_only"):
        _processor(tokenizer, config["vision_config"]["patch_size"]).save_pretrained(directory)
    return directory


#: Standard deviation of a projection's outputs for inputs of unit variance; 1 when not named.
#: Query and key give logits of about 3, a sharp softmax. The head gives logits wide enough that
#: fp32 rounding cannot reorder the first two.
_GAIN = {
    **dict.fromkeys(("q_proj", "k_proj", "q_b_proj", "q_norm", "k_norm"), 1.7),
    **dict.fromkeys(("gate", "router"), 2.0),
    "lm_head": 4.0,
}


@torch.no_grad()
def fill(tensors: Iterable[tuple[str, torch.Tensor]], seed: int = 0) -> None:
    """Random values for a checkpoint's tensors, in place, by their names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tensors:
        owner, kind = name.split(".")[-2:]
        if kind == "A_log":
            # States that forget over tens to hundreds of tokens, each head at its own pace.
            parameter.uniform_(-5.0, -2.0, generator=generator)
        elif kind == "sinks":
            # Next to logits of about 3: some decide. SGLang keeps them in bf16.
            parameter.uniform_(-1, 3, generator=generator)
            parameter.copy_(parameter.bfloat16())
        elif parameter.dim() == 1:
            # Norm weights and biases: away from their neutral value, so that they matter. Those of
            # routers are as wide as the scores, between 0 and 1, so that they decide.
            centre = 0.0 if kind.endswith("bias") else _GAIN.get(owner, 1.0)
            if owner.endswith("norm") and not parameter.any():
                centre -= 1.0  # the model adds it
            parameter.uniform_(centre - 0.3, centre + 0.3, generator=generator)
        else:
            embedding = owner in ("embed_tokens", "word_embeddings")
            gain = 1.0 if embedding else _GAIN.get(owner, 1.0)
            fan_in = 1 if embedding else parameter.shape[-1]
            parameter.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)


def _processor(tokenizer: Any, patch_size: int) -> Any:
    """What turns pictures into patches, without which SGLang serves no text either."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch_size),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=patch_size),
        chat_template="{{ messages }}",
    )


def _byte_tokenizer() -> Any:
    """A byte-level BPE without merges: token i is byte i, so any text is its UTF-8 bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(vocab=_byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE -> that byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
