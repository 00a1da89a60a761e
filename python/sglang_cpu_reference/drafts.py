"""Draft models for tiny checkpoints that draft well without training.

All layers of a target but its last do nothing, and a draft is a copy of that one: it computes the
target itself minus the first token, which drafts do not see. So most drafts are right, and whether
one is depends on every row of the draft's cache.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sglang_cpu_reference.checkpoints import Family, make_checkpoint

Weights = dict[str, torch.Tensor]


def make_eagle(directory: Path, *, noise: float = 0.0, **overrides: Any) -> tuple[Path, Path]:
    """A llama of one layer, and its EAGLE head: checkpoints of a target and of a draft.

    noise: standard deviation of what is added to every weight of the head; 1 makes it random.
    overrides: of the target's configuration, here and below; see `make_checkpoint`.
    """
    target = make_checkpoint("llama", directory / "target", num_hidden_layers=1, **overrides)
    weights = _neutral(target)
    head = directory / "draft"
    shutil.copytree(target, head, ignore=shutil.ignore_patterns("*.safetensors"))
    _configure(head, architectures=["LlamaForCausalLMEagle"])
    layer = {
        name.removeprefix("model."): weight
        for name, weight in weights.items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    width = weights["model.embed_tokens.weight"].shape[1]
    layer["fc.weight"] = torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1)
    layer["fc.bias"] = torch.zeros(width)
    generator = torch.Generator().manual_seed(1)
    for name, weight in layer.items():
        layer[name] = weight + noise * torch.randn(weight.shape, generator=generator)
    layer["embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    _save(layer, head)
    return target, head


def make_eagle3(directory: Path, **overrides: Any) -> tuple[Path, Path]:
    """A llama of several layers, and an EAGLE3 head that looks at no layer but at tokens.

    Its layer adds to what the target was at, where the target's adds to the token. So that this
    makes little difference, the layer adds much; from the second draft on it makes some.
    """
    target = make_checkpoint("llama", directory / "target", num_hidden_layers=5, **overrides)
    weights = _neutral(target)
    last = "model.layers.4."
    for name in (f"{last}self_attn.o_proj.weight", f"{last}mlp.down_proj.weight"):
        weights[name] *= 8
    _idle(weights, range(4))
    _save(weights, target)
    head = directory / "draft"
    shutil.copytree(target, head, ignore=shutil.ignore_patterns("*.safetensors"))
    _configure(
        head,
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        draft_vocab_size=weights["lm_head.weight"].shape[0],
    )
    layer = {
        name.replace(last, "midlayer."): weight
        for name, weight in weights.items()
        if name.startswith(last)
    }
    width = weights["lm_head.weight"].shape[1]
    for name in ("q_proj", "k_proj", "v_proj"):
        part = layer[f"midlayer.self_attn.{name}.weight"]
        layer[f"midlayer.self_attn.{name}.weight"] = torch.cat([part, torch.zeros_like(part)], 1)
    layer |= {
        "midlayer.hidden_norm.weight": torch.ones(width),
        "fc.weight": torch.zeros(width, 3 * width),
        "norm.weight": torch.ones(width),
        "lm_head.weight": weights["lm_head.weight"],
    }
    _save(layer, head)
    return target, head


def make_mtp(
    directory: Path, family: str | Family = "deepseek_v3", **overrides: Any
) -> tuple[Path, None]:
    """A DeepSeek-V3 or GLM-4-MoE of two layers with one more to draft (MTP): one checkpoint."""
    layers = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    target = make_checkpoint(family, directory / "target", **layers, **overrides)
    weights = _neutral(target)
    _idle(weights, range(1))
    width = weights["lm_head.weight"].shape[1]
    for name in list(weights):
        if name.startswith("model.layers.1."):
            weights[name.replace("layers.1.", "layers.2.")] = weights[name]
    weights |= {
        "model.layers.2.enorm.weight": torch.ones(width),
        "model.layers.2.hnorm.weight": torch.ones(width),
        "model.layers.2.eh_proj.weight": torch.cat(
            [torch.eye(width), torch.zeros(width, width)], 1
        ),
        "model.layers.2.shared_head.norm.weight": torch.ones(width),
        "model.layers.2.shared_head.head.weight": weights["lm_head.weight"],
        "model.layers.2.embed_tokens.weight": weights["model.embed_tokens.weight"],
    }
    _save(weights, target)
    _configure(target, num_nextn_predict_layers=1)
    return target, None


def make_qwen_mtp(directory: Path, **overrides: Any) -> tuple[Path, None]:
    """A Qwen3-MoE of one layer with one more to draft (MTP): a single checkpoint."""
    target = make_checkpoint("qwen3_moe", directory / "target", num_hidden_layers=1, **overrides)
    weights = _neutral(target)
    width = weights["lm_head.weight"].shape[1]
    for name in list(weights):
        if name.startswith("model.layers.0."):
            weights[name.replace("model.", "mtp.", 1)] = weights[name]
    weights |= {
        "mtp.pre_fc_norm_embedding.weight": torch.ones(width),
        "mtp.pre_fc_norm_hidden.weight": torch.ones(width),
        "mtp.fc.weight": torch.cat([torch.eye(width), torch.zeros(width, width)], 1),
        "mtp.norm.weight": torch.ones(width),
    }
    _save(weights, target)
    return target, None


def _idle(weights: Weights, layers: range) -> None:
    """Make layers add nothing."""
    for layer in layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()


def _neutral(checkpoint: Path) -> Weights:
    """Set a checkpoint's norms to 1 and its embeddings to unit length, so that norms do nothing."""
    weights = load_file(checkpoint / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            weights[name] = torch.ones_like(weight)
    table = weights["model.embed_tokens.weight"]
    unit = table / table.pow(2).mean(-1, keepdim=True).sqrt()
    weights["model.embed_tokens.weight"] = unit
    _save(weights, checkpoint)
    return weights


def _configure(checkpoint: Path, **entries: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def _save(weights: Weights, checkpoint: Path) -> None:
    own = {name: weight.contiguous().clone() for name, weight in weights.items()}
    save_file(own, checkpoint / "model.safetensors", metadata={"format": "pt"})
