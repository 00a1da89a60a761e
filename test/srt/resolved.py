"""Arguments as SGLang resolves them with the series loaded, on machines that it is only told about.

One process resolves everything: resolution depends on the flags, on a checkpoint's configuration
and on what SGLang believes about the machine (its `override_platform`), and on nothing else.
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sglang_helix.check import told_about
from sglang_helix.srt.layers.attention.adapters import Attention, serving

ATTENTION: dict[str, Attention] = {"llama": "GQA", "deepseek_v2": "MLA"}
WORKING = {family: [record.name for record in serving(kind)] for family, kind in ATTENTION.items()}


class Resolved(NamedTuple):
    """How a resolution ended: some resolved arguments, or the error; and what was said."""

    args: dict[str, Any]
    backends: tuple[str, str] | None
    error: str
    said: str


Resolve = Callable[..., Resolved]


def resolve(machine: str, model: str, flags: dict[str, Any], launched: bool = False) -> Resolved:
    """launched: after what a launch and its ranks check, too."""
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang_helix.flags import make_server_args
    from sglang_helix.srt.server_args import check

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sglang_helix")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with told_about(machine):
            args = make_server_args(model_path=model, device="cuda", **flags)
            args.resolve_once()
            if launched:
                args.check_server_args()
                check(args)  # as its ranks do
            view = resolved_view(args)
            names = ("dcp_size", "dcp_comm_backend", "page_size", "chunked_prefill_size")
            names += ("mamba_radix_cache_strategy",)
            found = {name: getattr(view, name) for name in names}
            return Resolved(found, attention_backends_of(view), "", "\n".join(lines))
    except Exception as error:
        return Resolved({}, None, f"{type(error).__name__}: {error}", "\n".join(lines))
    finally:
        logger.removeHandler(handler)


#: A configuration that every model here starts from.
SMALL = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "pad_token_id": 0,
}


def written(root: Path, **entries: Any) -> str:
    """A model directory that holds a configuration alone."""
    directory = root / re.sub(r"\W+", "_", entries["architectures"][0])
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**SMALL, **entries}))
    return str(directory)
