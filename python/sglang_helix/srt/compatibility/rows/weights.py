"""Rows: how weights are loaded, kept and adapted."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import not_of_mla, of_mla, unlike
from sglang_helix.srt.compatibility.row import WITHOUT, Given, Row
from sglang_helix.srt.compatibility.situation import Situation


def _positive_of_mla(name: str) -> Given:
    return lambda situation: (
        value if (value := getattr(situation.args, name)) > 0 and situation.mla else None
    )


def _lora(situation: Situation) -> object | None:
    args = situation.args
    # SGLang turns the flag on for the paths, but only after resolution.
    return bool(args.lora_paths if args.enable_lora is None else args.enable_lora) or None


def _bitsandbytes(situation: Situation) -> object | None:
    asked = (situation.model.quantization, situation.args.load_format)
    return "bitsandbytes" if "bitsandbytes" in asked and not situation.mla else None


def _sharded_weights(situation: Situation) -> object | None:
    asked = situation.args.load_format
    shards = ("sharded_state", "presharded", "remote", "remote_instance")
    return asked if asked in shards and not situation.mla else None


WEIGHTS: tuple[Row, ...] = (
    Row(
        "LoRA of MLA models",
        "--enable-lora",
        "own",
        "with replicated queries, adapters of the query and key-value up-projections are refused",
        given=of_mla(_lora),
        alone="serves",
        proof="lora/lora_manager.py",
    ),
    Row(
        "LoRA of GQA and MHA models",
        "--enable-lora",
        "refused",
        "its buffers are sized by tp size, not by the heads of a group",
        WITHOUT,
        not_of_mla(_lora),
    ),
    Row(
        "bitsandbytes weights of GQA and MHA models",
        "--load-format",
        "refused",
        "its loader cuts key-value heads by tp size",
        WITHOUT,
        _bitsandbytes,
    ),
    Row(
        "weights saved in shards, of GQA and MHA models",
        "--load-format",
        "refused",
        "the shards were cut for another division of the key-value heads",
        "Load the original checkpoint",
        _sharded_weights,
    ),
    Row(
        "weights of MLA models kept on the CPU",
        "--cpu-offload-gb",
        "refused",
        "query weights are gathered from the GPU, and it has not been tried",
        WITHOUT,
        _positive_of_mla("cpu_offload_gb"),
    ),
    Row(
        "groups of layers of MLA models kept on the CPU",
        "--offload-group-size",
        "refused",
        "query weights are gathered from the GPU, and it has not been tried",
        WITHOUT,
        _positive_of_mla("offload_group_size"),
    ),
    Row(
        "weight cache",
        "--weight-cache-mode",
        "refused",
        "its daemon builds models without plugins",
        WITHOUT,
        unlike("weight_cache_mode", "off"),
    ),
)
