"""Tiny checkpoints with random weights, in the real file format, made on the spot.

``make_checkpoint("llama", directory)`` writes what ``transformers`` and SGLang load as any other
model: config, fp32 safetensors, and a tokenizer whose tokens are the 256 bytes. The same family,
overrides and seed give the same bytes.

Weights are scaled by fan-in and the attention logits kept sharp, so that greedy tokens are diverse,
depend on single earlier tokens, and rarely near a tie: a wrong attention shows in the tokens.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

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
_DEEPSEEK_MOE = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
}


class Family(NamedTuple):
    """What distinguishes a model family: transformers' model type and its configuration."""

    model_type: str
    config: Mapping[str, Any]


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
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
        family = FAMILIES[family]
    model_type, config = family
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**config, **overrides}), dtype=torch.float32
    )
    _fill(model, seed)
    model.save_pretrained(directory)
    _byte_tokenizer().save_pretrained(directory)
    return directory


#: Standard deviation of a projection's outputs for inputs of unit variance; 1 when not named.
#: Query and key give logits of about 3, a sharp softmax. The head gives logits wide enough that
#: fp32 rounding cannot reorder the first two.
_GAIN = {
    **dict.fromkeys(("q_proj", "k_proj", "q_b_proj", "q_norm", "k_norm"), 1.7),
    "gate": 2.0,
    "lm_head": 4.0,
}


@torch.no_grad()
def _fill(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2]
        if parameter.dim() == 1:
            # Norm weights and biases: away from their neutral value, so that they matter.
            centre = 0.0 if name.endswith("bias") else _GAIN.get(owner, 1.0)
            parameter.uniform_(centre - 0.3, centre + 0.3, generator=generator)
        else:
            gain = 1.0 if owner == "embed_tokens" else _GAIN.get(owner, 1.0)
            fan_in = 1 if owner == "embed_tokens" else parameter.shape[-1]
            parameter.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # As wide as the scores, between 0 and 1, so that it decides.
            buffer.uniform_(-0.3, 0.3, generator=generator)


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
