"""``python -m sglang_helix layout``: rows against brute force over heads and ranks."""

import json
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES
from sglang_helix.__main__ import main
from sglang_helix.layout import Shape, rows

pytestmark = pytest.mark.quick

GQA = Shape(64, 8, 128, 128, 256, 80)
MLA = Shape(128, None, 576, 512, 576, 61)


@pytest.mark.parametrize("tp_size", [1, 2, 8, 16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_capacity_is_counted_from_the_heads_that_ranks_hold(tp_size: int, kv_heads: int) -> None:
    shape = GQA._replace(kv_heads=kv_heads)
    listed = list(rows(shape, tp_size, 2.0**40, 2))
    assert [row.layout.kvp_size for row in listed] == sorted({r.layout.kvp_size for r in listed})
    plain = listed[0]
    assert plain.layout.kvp_size == 1
    for row in listed:
        shards = row.layout.attn_tp_size
        # The distinct key-value heads that the query heads of one shard attend to.
        per_shard = shape.query_heads // shards
        held = {head // (shape.query_heads // kv_heads) for head in range(per_shard)}
        assert row.kv_heads == len(held)
        assert row.kv_bytes == len(held) * 256 * 80 * 2
        assert row.ratio == pytest.approx(row.kv_tokens / plain.kv_tokens, rel=1e-4)
        expected = max(1, kv_heads // tp_size) * row.layout.kvp_size / max(1, kv_heads // shards)
        assert row.ratio == expected


def test_mla_gains_k_times() -> None:
    for row in rows(MLA, 8, 2.0**30, 2):
        assert row.ratio == row.layout.kvp_size
        assert row.kv_bytes == 576 * 61 * 2


def test_replicated_queries_save_one_collective_and_their_bytes() -> None:
    for row in rows(MLA, 8, 2.0**30, 2):
        saved = int(row.layout.kvp_size > 1)
        for backend in ("a2a", "ag_rs"):
            assert row.collectives[backend] - row.collectives[f"{backend}+q"] == saved
            gathered = 16 * 576 * 2 * (row.layout.kvp_size - 1)
            assert row.wire_bytes[backend] - row.wire_bytes[f"{backend}+q"] == gathered


def test_command_reads_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["layout", "--model-path", str(tmp_path), "--tp", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["8", "4", "2", "1"]


def test_windows_are_not_counted_as_sharded(capsys: pytest.CaptureFixture[str]) -> None:
    """gpt-oss: 18 of 36 layers keep the whole context, 8 key-value heads of 64, bf16."""
    model = Path(__file__).parents[2] / "docs/models/gpt-oss-120b"
    assert main(["layout", "--model-path", str(model), "--tp", "8"]) == 0
    out = capsys.readouterr().out
    kib = 18 * 2 * 64 * 2 / 1024
    assert f"| {kib:.1f} |" in out.splitlines()[2]
    assert "Without 18 window layers" in out


def test_weights_of_values_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3: 128 heads of 512 x 128 in 61 layers; rows of 128 in place of 512 elements."""
    model = str(Path(__file__).parents[2] / "docs/models/DeepSeek-V3")
    assert main(["layout", "--model-path", model, "--tp", "8"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("`--dcp-replicate-v-proj`, which projects values before the exchange")
    held = 128 * 512 * 128 * 61 * 2 / 2**30
    narrow, wide = (16 * 7 * (2 * width + 16) / 1024 for width in (128, 512))
    assert f"{held:.2f} GiB a rank at `--dcp-size 8`" in said
    assert f"{narrow:.1f} KiB in place of {wide:.1f} behind attention" in said


def test_a_drafts_cost_stands_beside_the_gain(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3's MTP: latents of 61 + K layers where there were 61, of 62 in plain TP."""
    model = str(Path(__file__).parents[2] / "docs/models/DeepSeek-V3")
    command = ["layout", "--model-path", model, "--tp", "8", "--draft-model-path", model]
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("With one draft layer, whole on every rank, beside plain TP: ")
    assert f"{62 * 8 / 69:.2f}x at `--dcp-size 8` (+{8 / 61:.1%} memory)" in said


def test_command_says_what_it_could_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layout", "--model-path", str(tmp_path / "none"), "--tp", "8"]) == 1
    assert "--model-path" in capsys.readouterr().err


def test_states_of_a_hybrid_model_are_counted_beside_its_full_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**FAMILIES["qwen3_next"].config, "architectures": ["Qwen3NextForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_next"}))
    assert main(["layout", "--model-path", str(tmp_path), "--tp", "4"]) == 0
    table, states = capsys.readouterr().out.split("\n\n")
    # Two of four layers, one head of each rank, K and V of 32 numbers.
    assert f"| 2 | 2 | 4, 2 | 1 | {2 * 64 * 2 / 1024:.1f} |" in table
    # Two layers: 2 value heads of 16 x 16 in fp32, and 3 inputs of the convolution in bf16.
    state = 2 * (2 * 16 * 16 * 4 + 3 * (2 * 16 + 2 * 16) * 2)
    assert states.startswith(f"Recurrent states: {state / 2**20:.1f} MiB a rank for each request")
    assert f"as much as {2 * state // (2 * 64 * 2)} KV tokens with --dcp-size 2" in states
