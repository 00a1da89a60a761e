"""Query projections replicated in each KVP group: which weights, renewed by updates, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.fresh import Fresh
from srt.models.serving import Answer, answer, command_line, scheduler_of
from srt.test_end_to_end import check, prompt

N, A = 4, 2
K = N // A
PROMPTS = (prompt(30, seed=20), prompt(7, seed=21))
NEW_TOKENS = 3


def mla_layers(scheduler: Any) -> list[tuple[str, Any]]:
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    model = scheduler.tp_worker.model_runner.model
    modules = model.named_modules()
    return [(name, m) for name, m in modules if isinstance(m, DeepseekV2AttentionMLA)]


def wrong_replicas(rank: int, scheduler: Any, checkpoint: Path) -> list[str]:
    """Layers whose replica is not the rows of the KVP group's heads in the checkpoint."""
    from safetensors.torch import load_file

    full = load_file(checkpoint / "model.safetensors")
    wrong = []
    for name, layer in mla_layers(scheduler):
        projection = "q_b_proj" if layer.has_q_b_proj else "q_proj"
        heads = full[f"{name}.{projection}.weight"].chunk(A)[rank // K]
        if not torch.equal(layer.q_b_proj_qrep_weight, heads):
            wrong.append(f"{name}.{projection}")
        # Of each head, the key's rows of kv_b_proj: [key, latent].
        keys = full[f"{name}.kv_b_proj.weight"].chunk(A)[rank // K]
        keys = keys.unflatten(0, (-1, layer.qk_nope_head_dim + layer.v_head_dim))
        if not torch.equal(layer.w_kc_qrep, keys[:, : layer.qk_nope_head_dim]):
            wrong.append(f"{name}.w_kc")
    return wrong


def update(
    rank: int, argv: list[str], before: Path, after: Path
) -> tuple[list[Answer], list[Answer]]:
    """Answers with the weights of the one checkpoint, then with those of the other."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    scheduler = scheduler_of(rank, argv)
    assert not wrong_replicas(rank, scheduler, before)
    first = answer(scheduler, PROMPTS, NEW_TOKENS)
    places = [layer.w_kc_qrep.data_ptr() for _, layer in mla_layers(scheduler)]
    result = scheduler.weight_updater.update_weights_from_disk(
        UpdateWeightFromDiskReqInput(model_path=str(after), load_format="auto")
    )
    assert result.success, result.message
    assert not wrong_replicas(rank, scheduler, after)
    # Captured graphs hold the addresses.
    assert places == [layer.w_kc_qrep.data_ptr() for _, layer in mla_layers(scheduler)]
    return first, answer(scheduler, PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("deepseek_v2", {}), ("deepseek_v2", {"q_lora_rank": None})],
)
def test_weight_update_renews_replicas(
    ready: Fresh, tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    checkpoints = [
        make_checkpoint(family, tmp_path / str(seed), seed=seed, num_hidden_layers=2, **overrides)
        for seed in (0, 1)
    ]
    argv = command_line(checkpoints[0], N, "--attn-tp-size", str(A), "--max-total-tokens", "256")
    for answers in ready.ranks(update, N, argv, *checkpoints):
        for checkpoint, of_checkpoint in zip(checkpoints, answers, strict=True):
            for tokens, got in zip(PROMPTS, of_checkpoint, strict=True):
                check(checkpoint, tokens, got, NEW_TOKENS)


def written_in_place(rank: int, argv: list[str]) -> list[str]:
    """A session of updates that writes to the weights themselves: layers with old replicas."""
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput, EndWeightUpdateReqInput

    scheduler = scheduler_of(rank, argv)
    before = {
        name: (layer.q_b_proj_qrep_weight.clone(), layer.w_kc_qrep.clone())
        for name, layer in mla_layers(scheduler)
    }
    scheduler.weight_updater.begin_weight_update(BeginWeightUpdateReqInput())
    for _, layer in mla_layers(scheduler):
        layer.q_b_proj.weight.data *= 2
        layer.kv_b_proj.weight.data *= 2
    scheduler.weight_updater.end_weight_update(EndWeightUpdateReqInput())
    return [
        name
        for name, layer in mla_layers(scheduler)
        for old, new in zip(
            before[name], (layer.q_b_proj_qrep_weight, layer.w_kc_qrep), strict=True
        )
        if not torch.equal(new, 2 * old)
    ]


def test_end_of_an_update_in_place_renews_replicas(ready: Fresh, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("deepseek_v2", tmp_path, num_hidden_layers=2)
    argv = command_line(checkpoint, N, "--attn-tp-size", str(A), "--max-total-tokens", "256")
    assert ready.ranks(written_in_place, N, argv) == [[]] * N


def refused(rank: int, argv: list[str]) -> tuple[str, bool]:
    """What replicating one quantized projection says, and whether asking softly leaves it out."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
    from sglang_helix.srt.model_executor.model_runner import (
        ReplicationRefusedError,
        replicate_q_proj,
    )

    scheduler = scheduler_of(rank, argv)
    model = scheduler.tp_worker.model_runner.model
    layer = mla_layers(scheduler)[1][1]
    layer.q_b_proj.quant_method = Fp8LinearMethod(Fp8Config(is_checkpoint_fp8_serialized=True))
    layer.q_b_proj_qrep_weight = None
    replicate_q_proj(model, required=False)
    left_out = layer.q_b_proj_qrep_weight is None
    try:
        replicate_q_proj(model, required=True)
    except ReplicationRefusedError as error:
        return str(error), left_out
    return "", left_out


def test_projection_that_cannot_be_replicated_is_refused(ready: Fresh, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("deepseek_v2", tmp_path, num_hidden_layers=2)
    argv = command_line(checkpoint, N, "--attn-tp-size", str(A), "--max-total-tokens", "256")
    for message, left_out in ready.ranks(refused, N, argv):
        assert "model.layers.1.self_attn cannot be replicated" in message
        assert "Fp8LinearMethod" in message
        assert "--no-dcp-replicate-q-proj" in message
        assert left_out
