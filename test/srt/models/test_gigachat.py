"""GigaChat-3.5, which transformers does not have: sharded against SGLang's own model on one rank.

Gated Delta Net as Qwen3-Next's, and MLA of DeepSeek's class behind gates, whose tokens
`test_hybrid.py` compares with transformers. What is proven here is that sharding changes nothing.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sglang_cpu_reference.checkpoints import VOCAB_SIZE, fill
from srt.expected import LOGPROB_TOLERANCE
from srt.fresh import Fresh
from srt.models.serving import Report, serve
from srt.models.test_hybrid import BATCHES, LAYOUTS, NEW_TOKENS, ROWS

HIDDEN, HEADS, QUERIES, LATENT, NOPE, ROPE, VALUE = 128, 16, 64, 512, 32, 64, 32
KEY_HEADS, VALUE_HEADS, STATE = 4, 8, 16
INNER, EXPERT, EXPERTS = 256, 64, 8
LAYERS = ["linear_attention", "full_attention"] * 2
CONFIG = {
    "architectures": ["GigaChat35ForCausalLM"],
    "model_type": "gigachat3_5",
    "torch_dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": EXPERT,
    "num_hidden_layers": len(LAYERS),
    "layer_types": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": QUERIES,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": STATE,
    "linear_value_head_dim": STATE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "eos_token_id": 258,
}


def gated(norm: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A norm behind a gate of low rank, as the checkpoint names it."""
    yield f"{norm}.weight", (width,)
    yield f"{norm}.gate_up_projection.weight", (16, width)
    yield f"{norm}.gate_down_projection.weight", (width, 16)


def feed_forward(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", (width, HIDDEN)
    yield f"{name}.up_proj.weight", (width, HIDDEN)
    yield f"{name}.down_proj.weight", (HIDDEN, width)


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors."""
    yield "model.embed_tokens.weight", (VOCAB_SIZE, HIDDEN)
    yield "lm_head.weight", (VOCAB_SIZE, HIDDEN)
    yield from gated("model.norm", HIDDEN)
    for number, kind in enumerate(LAYERS):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        for norm in ("input", "post_attention", "post_self_attn", "post_feedforward"):
            yield from gated(f"{layer}.{norm}_layernorm", HIDDEN)
        if kind == "full_attention":
            yield f"{attention}.q_a_proj.weight", (QUERIES, HIDDEN)
            yield from gated(f"{attention}.q_a_layernorm", QUERIES)
            yield f"{attention}.q_b_proj.weight", (HEADS * (NOPE + ROPE), QUERIES)
            yield f"{attention}.kv_a_proj_with_mqa.weight", (LATENT + ROPE, HIDDEN)
            yield from gated(f"{attention}.kv_a_layernorm", LATENT)
            yield f"{attention}.kv_b_proj.weight", (HEADS * (NOPE + VALUE), LATENT)
            yield f"{attention}.gate_proj.weight", (HEADS * VALUE, HIDDEN)
            yield f"{attention}.o_proj.weight", (HIDDEN, HEADS * VALUE)
        else:
            keys, values = KEY_HEADS * STATE, VALUE_HEADS * STATE
            yield f"{attention}.in_proj_qkvz.weight", (2 * keys + 2 * values, HIDDEN)
            yield f"{attention}.in_proj_ba.weight", (2 * VALUE_HEADS, HIDDEN)
            yield f"{attention}.conv1d.weight", (2 * keys + values, 1, 4)
            yield f"{attention}.A_log", (VALUE_HEADS,)
            yield f"{attention}.dt_bias", (VALUE_HEADS,)
            yield f"{attention}.norm.weight", (STATE,)
            yield f"{attention}.out_proj.weight", (HIDDEN, values)
        if number == 0:  # dense
            yield from feed_forward(f"{layer}.mlp", INNER)
            continue
        yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
        yield f"{layer}.mlp.gate.e_score_correction_bias", (EXPERTS,)
        yield from feed_forward(f"{layer}.mlp.shared_experts", EXPERT)
        for expert in range(EXPERTS):
            yield from feed_forward(f"{layer}.mlp.experts.{expert}", EXPERT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gigachat")
    weights = {name: torch.zeros(shape) for name, shape in shapes()}
    fill(weights.items())
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def served(processes: Fresh, model: Path, tp: int, dcp: int, *flags: str) -> list[Report]:
    page, chunk, _ = LAYOUTS[dcp]
    flags += ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    flags += ("--max-total-tokens", str(ROWS), "--skip-tokenizer-init", "--dtype", "float32")
    flags += ("--disable-radix-cache",)  # SGLang takes no snapshots of its states
    return serve(processes, model, tp, flags, BATCHES, NEW_TOKENS, retracting=True)


@pytest.fixture(scope="module")
def whole(fresh: Fresh, model: Path) -> Report:
    """SGLang's own answers, on one rank."""
    (report,) = served(fresh, model, 1, 1)
    return report


@pytest.mark.parametrize(
    ("tp", "dcp", "flags"),
    [(2, 2, "--dcp-comm-backend a2a"), (4, 2, "--dcp-replicate-q-proj"), (4, 4, "")],
)
def test_sharded_equals_one_rank(
    ready: Fresh, model: Path, whole: Report, tp: int, dcp: int, flags: str
) -> None:
    completions = [one.completion for answers in whole.answers for one in answers]
    assert len({tuple(one.token_ids) for one in completions}) == len(completions)
    for report in served(ready, model, tp, dcp, "--dcp-size", str(dcp), *flags.split()):
        said = [one.completion for answers in report.answers for one in answers]
        for ours, theirs in zip(said, completions, strict=True):
            assert ours.token_ids == theirs.token_ids
            for got, want in zip(ours.top, theirs.top, strict=True):
                assert [token for token, _ in got] == [token for token, _ in want]
                for (_, a), (_, b) in zip(got, want, strict=True):
                    assert abs(a - b) < LOGPROB_TOLERANCE
        # Two layers keep a cache, once in the group; a page of it is not used.
        rows = report.kv_tokens // dcp + LAYOUTS[dcp][0]
        assert report.kv_bytes == rows * 2 * (LATENT + ROPE) * 4
