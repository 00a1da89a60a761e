"""Models of SGLang built over a sharded cache: every shard a slice of the full tensor, or refused.

Four ranks go through the scheduler's own start: plugins, published arguments, process groups, and
SGLang's model loader. N = 4, K = 2, A = 2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_cpu_reference.checkpoints import FAMILIES, make_checkpoint
from srt.fresh import Fresh
from srt.model_loader.configurations import (
    HEAD_DIM,
    HEADS,
    SMALL,
    built,
    configuration,
    vision_of_qwen,
)
from srt.models.serving import command_line
from srt.rank import become_rank

N, K = 4, 2
A = N // K


def layout(checkpoint: Path, *flags: str) -> list[str]:
    """A server's arguments: N ranks, groups of K."""
    return command_line(checkpoint, N, "--dcp-size", str(K), "--dcp-comm-backend", "a2a", *flags)


def rows(weight: torch.Tensor, heads: range) -> torch.Tensor:
    """The rows (or bias entries) of some heads."""
    return weight.unflatten(0, (-1, HEAD_DIM))[heads.start : heads.stop].flatten(0, 1)


def heads_of(rank: int, total: int, shards: int) -> range:
    """Heads that rank `rank` of N holds, when `total` of them are cut into `shards` shards."""
    shard, count = rank * shards // N, max(1, total // shards)
    first = shard * total // shards
    return range(first, first + count)


def mismatches(
    rank: int, argv: list[str], checkpoints: Mapping[str, Path], replicate: bool
) -> list[str]:
    """What differs from the slices that the layout asks for, over all layers of all checkpoints."""
    from safetensors.torch import load_file
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner_components.weight_exporter import WeightExporter
    from sglang.srt.model_loader import get_model

    server_args = become_rank(rank, argv)
    wrong = []
    for name, checkpoint in checkpoints.items():
        full = load_file(checkpoint / "model.safetensors")
        config = ModelConfig.from_server_args(server_args, model_path=str(checkpoint))
        model = get_model(
            model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu")
        )
        kv_total = config.get_total_num_kv_heads()
        queries, kv = heads_of(rank, HEADS, A if replicate else N), heads_of(rank, kv_total, A)
        outputs = heads_of(rank, HEADS, N)
        layers = [
            (prefix.removesuffix(".attn"), layer)
            for prefix, layer in model.named_modules()
            if isinstance(layer, RadixAttention)
        ]
        assert len(layers) == 3
        modules = dict(model.named_modules())
        exporter = WeightExporter(
            tp_rank=rank, tp_size=N, gpu_id=0, get_model_path=str, get_model=lambda m=model: m
        )
        for prefix, layer in layers:
            parent = modules[prefix]
            for kind in ("weight", "bias"):
                if f"{prefix}.q_proj.{kind}" not in full:
                    continue
                projections = ((queries, "q"), (kv, "k"), (kv, "v"))
                parts = [rows(full[f"{prefix}.{p}_proj.{kind}"], own) for own, p in projections]
                if not torch.equal(getattr(parent.qkv_proj, kind), torch.cat(parts)):
                    wrong.append(f"{name} {prefix}: qkv {kind}")
                if not hasattr(model, "get_weights_by_name"):
                    continue
                for (_, projection), own in zip(projections, parts, strict=True):
                    weight = f"{prefix}.{projection}_proj.{kind}"
                    if exporter.get_weights_by_name(weight, 8) != own[:8].tolist():
                        wrong.append(f"{weight} by its name")
            columns = rows(full[f"{prefix}.o_proj.weight"].T, outputs).T
            if not torch.equal(parent.o_proj.weight, columns):
                wrong.append(f"{name} {prefix}: o_proj")
            found = {
                "parent": (parent.num_heads, parent.num_kv_heads),
                "sizes": (parent.q_size // HEAD_DIM, parent.kv_size // HEAD_DIM),
                "attention": (layer.tp_q_head_num, layer.tp_k_head_num),
                "values": (layer.tp_q_head_num, layer.tp_v_head_num),
                "pool": (layer.tp_q_head_num, config.get_num_kv_heads(N, K)),
            }
            wrong += [
                f"{name} {prefix}: {what} {heads}"
                for what, heads in found.items()
                if heads != (len(queries), len(kv))
            ]
    return wrong


def save(model_type: str, directory: Path, **config: Any) -> Path:
    """A checkpoint of any family that transformers knows, with random weights and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **config), dtype=torch.float32
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families with 1, 2, 4 and 8 key-value heads: fewer than A, as many as A, as many as N."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {
        f"{family} {kv}": make_checkpoint(family, root / f"{family}{kv}", num_key_value_heads=kv)
        for family in ("llama", "qwen3")
        for kv in (1, 2, 4, 8)
    }
    made["qwen2 4"] = save("qwen2", root / "qwen2", **SMALL)  # with biases
    made["granite 4"] = save("granite", root / "granite", **SMALL)
    made["mixtral 4"] = save("mixtral", root / "mixtral", num_local_experts=4, **SMALL)
    return made


@pytest.mark.parametrize("replicate", [False, True])
def test_shards_are_slices(fresh: Fresh, checkpoints: dict[str, Path], replicate: bool) -> None:
    flags = ["--dcp-replicate-q-proj"] if replicate else []
    argv = layout(next(iter(checkpoints.values())), *flags)
    results = fresh.ranks(mismatches, N, argv, checkpoints, replicate)
    for rank, wrong in enumerate(results):
        assert not wrong, f"rank {rank}: {wrong}"


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
TEXT_OF_KIMI = {
    **FAMILIES["deepseek_v2"].config,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
}
VISION_OF_KIMI = {
    "model_type": "moonvit",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "merge_kernel_size": [2, 2],
    "patch_size": 14,
    "init_pos_emb_height": 4,
    "init_pos_emb_width": 4,
}


WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention"] * 3}
FULL = {"sliding_window": 32, "layer_types": ["full_attention"] * 3}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SEVERAL = "norm over several heads"
# Architecture: how transformers reads its configuration, what that holds, why it is refused.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {**WINDOW, "sliding_window": 33, "query_pre_attn_scalar": 32},
        "a window of 33 keys, no multiple of 2",
    ),
    "GptOssForCausalLM": ("gpt_oss", {**MOE, **FULL}, "attention sinks"),
    # Start-up refuses it first: with fewer shards of attention than key-value heads.
    "MellumForCausalLM": (
        "mellum",
        {
            **MOE,
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "sliding_window": 32,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        },
        "model.layers.1.self_attn.attn has a window in a pool of its own",
    ),
    "Olmo2ForCausalLM": ("olmo2", {}, SEVERAL),
    "CohereForCausalLM": ("cohere", {"use_qk_norm": True}, SEVERAL),
    "MiniMaxM2ForCausalLM": (
        "minimax_m2",
        {
            **MOE,
            "use_qk_norm": True,
            "rotary_dim": 16,
            "qk_norm_type": "per_layer",
            "scoring_func": "sigmoid",
            "rope_theta": 1e4,
            "hidden_act": "silu",
        },
        SEVERAL,
    ),
    "Grok1ForCausalLM": ("llama", {**MOE, "attn_temperature_len": 1024}, "scaling by position"),
    "BertModel": (
        "bert",
        {"position_embedding_type": "absolute", "hidden_act": "gelu"},
        "not a causal decoder's",
    ),
    "Llama4ForCausalLM": ("llama4_text", {}, "chunked local attention"),
    "PhiForCausalLM": (
        "phi",
        {"hidden_act": "gelu"},
        "8 query and 8 key-value heads in its projection, other",
    ),
    "StableLmForCausalLM": ("stablelm", {"hidden_act": "silu"}, "no num_kv_heads and kv_size"),
    "MiniCPM3ForCausalLM": (
        "minicpm3",
        {**LATENT, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 64, "hidden_act": "silu"},
        "a class of its own",
    ),
    # The encoder has the same numbers of heads: its projections cannot be told apart.
    "Qwen2VLForConditionalGeneration": (
        "qwen2_vl",
        {"num_key_value_heads": HEADS, "vision_config": vision_of_qwen(HEADS)},
        "visual.blocks.0.attn.qkv_proj has the heads of attention",
    ),
    # SGLang has no model of its own and wraps the one of transformers.
    "HeliumForCausalLM": ("helium", {}, "no attention layers of SGLang"),
}

# Wrappers around MLA of DeepSeek's class that have no plan for a sharded prefix of their own.
PLANNED: dict[str, tuple[str, dict[str, Any]]] = {
    "KimiVLForConditionalGeneration": (
        "kimi_vl",
        {"text_config": TEXT_OF_KIMI, "vision_config": VISION_OF_KIMI},
    ),
}


def refusals(rank: int, argv: list[str], models: Mapping[str, Path]) -> dict[str, str]:
    """What the start of each model says: the error, or "built" and where its plan is from."""
    said = {}
    for architecture, error, model in built(rank, argv, models):
        plan = getattr(model, "prepare_context_parallel_metadata_for_dcp", None)
        said[architecture] = error or f"built, plan of {getattr(plan, '__module__', None)}"
    return said


@pytest.fixture(scope="module")
def said(
    fresh: Fresh, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    root = tmp_path_factory.mktemp("configurations")
    configurations = {
        architecture: configuration(architecture, model_type, entries, root)
        for architecture, (model_type, entries, *_) in [*REFUSED.items(), *PLANNED.items()]
    }
    return fresh.ranks(refusals, N, layout(checkpoints["llama 4"]), configurations)


@pytest.mark.parametrize("architecture", REFUSED)
def test_model_that_cannot_be_right_is_refused(
    said: list[dict[str, str]], architecture: str
) -> None:
    reason = REFUSED[architecture][2]
    for by_architecture in said:
        error = by_architecture[architecture]
        assert error.startswith(f"--dcp-size > 1 does not support {architecture}: "), error
        assert reason in error
        assert error.endswith("Serve it without --dcp-size.")


@pytest.mark.parametrize("architecture", PLANNED)
def test_wrapper_of_mla_is_given_a_plan(said: list[dict[str, str]], architecture: str) -> None:
    for by_architecture in said:
        wanted = "built, plan of sglang_helix.srt.layers.dcp.planner"
        assert by_architecture[architecture] == wanted


def vision_and_language(rank: int, argv: list[str], directory: Path) -> tuple[int, int, int]:
    """Key-value heads of the encoder's projection, of the language model's, and of its layers."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader

    server_args = become_rank(rank, argv)
    config = ModelConfig.from_server_args(server_args, model_path=str(directory))
    with torch.device("meta"):
        model = loader._initialize_model(config, LoadConfig())
    attention = model.model.layers[0].self_attn
    encoder = model.visual.blocks[0].attn.qkv_proj
    return encoder.num_kv_heads, attention.qkv_proj.num_kv_heads, attention.attn.tp_k_head_num


def test_encoder_stays_sharded_by_n(
    fresh: Fresh, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    entries = {"vision_config": vision_of_qwen(16)}
    directory = configuration("Qwen2VLForConditionalGeneration", "qwen2_vl", entries, tmp_path)
    results = fresh.ranks(vision_and_language, N, layout(checkpoints["llama 4"]), directory)
    assert results == [(16 // N, 4 // A, 4 // A)] * N
