"""Models that SGLang builds on a rank from a configuration alone, without weights."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from sglang_cpu_reference.checkpoints import VOCAB_SIZE
from srt.rank import become_rank

HEADS, HEAD_DIM = 8, 32
HIDDEN = HEADS * HEAD_DIM
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 4,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}


def vision_of_qwen(heads: int) -> dict[str, Any]:
    return {
        "depth": 1,
        "embed_dim": 128,
        "hidden_size": HIDDEN,
        "num_heads": heads,
        "in_chans": 3,
        "in_channels": 3,
        "patch_size": 14,
        "mlp_ratio": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def configuration(architecture: str, model_type: str, entries: dict[str, Any], root: Path) -> Path:
    directory = root / architecture
    directory.mkdir()
    written = {**SMALL, **entries, "architectures": [architecture], "model_type": model_type}
    (directory / "config.json").write_text(json.dumps(written))
    return directory


def built(
    rank: int, argv: list[str], models: Mapping[str, Path]
) -> Iterator[tuple[str, str, torch.nn.Module | None]]:
    """Of each model its architecture, the refusal or another error, and else what was built."""
    import traceback

    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader
    from sglang_helix.srt.model_loader.loader import ModelRefusedError

    server_args = become_rank(rank, argv)
    for architecture, directory in models.items():
        error, model = "", None
        try:
            config = ModelConfig.from_server_args(server_args, model_path=str(directory))
            with torch.device("meta"):
                model = loader._initialize_model(config, LoadConfig())
        except ModelRefusedError as refused:
            error = str(refused)
        except Exception:
            error = traceback.format_exc()
        yield architecture, error, model
