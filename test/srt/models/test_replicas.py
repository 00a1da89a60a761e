"""Projections replicated in each KVP group: which weights, renewed by updates, or refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check, expected, prompt
from srt.fresh import Fresh
from srt.models.serving import (
    Answer,
    answer,
    answer_to,
    command_line,
    generate_request,
    scheduler_of,
    turn,
)
from srt.models.test_value_projection import switch_at

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
        heads_of_kv = full[f"{name}.kv_b_proj.weight"].chunk(A)[rank // K]
        heads_of_kv = heads_of_kv.unflatten(0, (-1, layer.qk_nope_head_dim + layer.v_head_dim))
        if not torch.equal(layer.w_kc_qrep, heads_of_kv[:, : layer.qk_nope_head_dim]):
            wrong.append(f"{name}.w_kc")
        # Behind them those of the value, [value, latent].
        values = heads_of_kv[:, layer.qk_nope_head_dim :].transpose(1, 2)
        if not torch.equal(layer.w_vc_rep, values):
            wrong.append(f"{name}.w_vc")
    return wrong


def update(rank: int, argv: list[str], before: Path, after: Path) -> list[list[Answer]]:
    """Answers with the weights of the one checkpoint, then with those of the other, then midway.

    Those that are midway are `released`, between the second and the first checkpoint.
    """
    scheduler = scheduler_of(rank, argv)
    switch_at(len(PROMPTS))
    assert not wrong_replicas(rank, scheduler, before)
    first = answer(scheduler, PROMPTS, NEW_TOKENS)
    places = places_of(scheduler)
    assert from_disk(scheduler, after) == (True, "Succeeded to update model weights.")
    assert not wrong_replicas(rank, scheduler, after)
    # Captured graphs hold the addresses.
    assert places == places_of(scheduler)
    second = answer(scheduler, PROMPTS, NEW_TOKENS)
    midway = released(scheduler, before)
    assert not wrong_replicas(rank, scheduler, before)
    assert places == places_of(scheduler)
    return [first, second, midway]


def places_of(scheduler: Any) -> list[int]:
    return [
        replica.data_ptr()
        for _, layer in mla_layers(scheduler)
        for replica in (layer.w_kc_qrep, layer.w_vc_rep)
    ]


def released(scheduler: Any, checkpoint: Path) -> list[Answer]:
    """Pause at the first token, give all memory back, take it again with new weights, and go on."""
    from sglang.srt.managers import io_struct as told

    manager = scheduler.weight_updater
    requests = [generate_request(str(i), tokens, NEW_TOKENS) for i, tokens in enumerate(PROMPTS)]
    scheduler.process_input_requests(requests)
    asked = list(scheduler.waiting_queue)
    while not all(request.output_ids for request in asked):
        turn(scheduler)
    scheduler.pause_generation(told.PauseGenerationReqInput(mode="retract"))
    assert [len(request.output_ids) for request in asked] == [1, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.memory_saver_adapter, "pause", lambda tag: lose(scheduler, tag))
        manager.release_memory_occupation(told.ReleaseMemoryOccupationReqInput())
    resume = told.ResumeMemoryOccupationReqInput
    manager.resume_memory_occupation(resume(tags=["weights"]))
    assert from_disk(scheduler, checkpoint)[0]
    manager.resume_memory_occupation(resume(tags=["kv_cache", "cuda_graph"]))
    scheduler.continue_generation(told.ContinueGenerationReqInput(torch_empty_cache=False))
    while not scheduler.is_fully_idle():
        turn(scheduler)
    scheduler.on_idle()
    return [answer_to(request) for request in asked]


def lose(scheduler: Any, tag: str) -> None:
    """What memory holds that was unmapped and mapped again: anything."""
    runner = scheduler.tp_worker.model_runner
    if tag == "weights":
        held = [weight.data for weight in runner.model.parameters()]
        for _, layer in mla_layers(scheduler):
            held += [layer.w_kc, layer.w_vc, layer.w_kc_qrep, layer.q_b_proj_qrep_weight]
            held += [layer.w_vc_rep]
    elif tag == "kv_cache":
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        names = ("kv_buffer",) if runner.use_mla_backend else ("k_buffer", "v_buffer")
        held = [buffer for name in names for buffer in getattr(pool, name)]
    else:
        return
    for tensor in held:
        tensor.fill_(torch.nan)


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
    argv += [] if family == "llama" else ["--dcp-replicate-v-proj"]
    for *answers, midway in ready.ranks(update, N, argv, *checkpoints):
        for checkpoint, of_checkpoint in zip(checkpoints, answers, strict=True):
            for tokens, got in zip(PROMPTS, of_checkpoint, strict=True):
                check(checkpoint, tokens, got, NEW_TOKENS)
        for tokens, got in zip(PROMPTS, midway, strict=True):
            first, *rest = got.completion.token_ids
            assert first == expected(checkpoints[1], tuple(tokens), NEW_TOKENS).token_ids[0]
            behind = (*tokens, first)
            assert rest == expected(checkpoints[0], behind, NEW_TOKENS - 1).token_ids


def written_in_place(scheduler: Any) -> list[str]:
    """A session of updates that writes to the weights themselves: layers with old replicas."""
    before = {
        name: [replica.clone() for replica in replicas_of(layer)]
        for name, layer in mla_layers(scheduler)
    }
    begin(scheduler)
    for _, layer in mla_layers(scheduler):
        layer.q_b_proj.weight.data *= 2
        layer.kv_b_proj.weight.data *= 2
    assert end(scheduler) == (True, "Success")
    return [
        name
        for name, layer in mla_layers(scheduler)
        for old, new in zip(before[name], replicas_of(layer), strict=True)
        if not torch.equal(new, 2 * old)
    ]


def replicas_of(layer: Any) -> list[torch.Tensor]:
    return [layer.q_b_proj_qrep_weight, layer.w_kc_qrep, layer.w_vc_rep]


def values_refused(model: torch.nn.Module, layer: Any) -> str:
    """What replicating the values of a layer with quantized absorbed weights says."""
    from sglang_helix.srt.model_executor.replicas import VALUES, ReplicationRefusedError

    values = layer.w_vc
    layer.w_vc = values.to(torch.float8_e4m3fn)
    try:
        VALUES.replicate(model, required=True)
    except ReplicationRefusedError as error:
        return str(error)
    finally:
        layer.w_vc = values
    return ""


def refused(model: torch.nn.Module, layer: Any) -> tuple[str, bool]:
    """What replicating one quantized projection says, and whether asking softly leaves it out."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
    from sglang_helix.srt.model_executor.replicas import QUERIES, ReplicationRefusedError

    method = layer.q_b_proj.quant_method
    layer.q_b_proj.quant_method = Fp8LinearMethod(Fp8Config(is_checkpoint_fp8_serialized=True))
    QUERIES.drop(layer)
    QUERIES.replicate(model, required=False)
    left_out = layer.q_b_proj_qrep_weight is None
    try:
        QUERIES.replicate(model, required=True)
    except ReplicationRefusedError as error:
        return str(error), left_out
    finally:
        layer.q_b_proj.quant_method = method
    return "", left_out


def begin(scheduler: Any) -> None:
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput

    scheduler.weight_updater.begin_weight_update(BeginWeightUpdateReqInput())


def end(scheduler: Any) -> tuple[bool, str]:
    from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

    result = scheduler.weight_updater.end_weight_update(EndWeightUpdateReqInput())
    return result.success, result.message


def from_disk(scheduler: Any, checkpoint: Path) -> tuple[bool, str]:
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    result = scheduler.weight_updater.update_weights_from_disk(
        UpdateWeightFromDiskReqInput(model_path=str(checkpoint), load_format="auto")
    )
    return result.success, result.message


def bucket(scheduler: Any, checkpoint: Path, part: str) -> tuple[bool, str]:
    """The weights of a checkpoint with `part` in their names, as one bucket of a session."""
    from safetensors.torch import load_file
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

    full = load_file(checkpoint / "model.safetensors")
    named = [(name, weight) for name, weight in full.items() if part in name]
    with pytest.MonkeyPatch.context() as patch:
        # They travel between processes of one GPU; here they are at hand.
        patch.setattr(scheduler.tp_worker, "deserialize_own_rank", lambda payload: named)
        result = scheduler.weight_updater.update_weights_from_tensor(
            UpdateWeightsFromTensorReqInput(serialized_named_tensors=[])
        )
    return result.success, result.message


class Updates(NamedTuple):
    """What one rank saw in a life of updates, by the names of the tests below."""

    gathered_in: list[tuple[str, bool]]
    old_after_writing_in_place: list[str]
    refusal: tuple[str, bool]
    refusal_of_values: str
    bad_path: tuple[bool, str]
    kept_after_bad_path: bool
    gathers: list[int]
    old_after_buckets: list[str]
    failing_disk: tuple[bool, str]
    stale_after_disk: list[str]
    failing_bucket: tuple[bool, str]
    end_after_bucket: tuple[bool, str]
    requantized: tuple[bool, str]
    after_requantized: list[Answer]
    replicated_after_requantized: list[bool]
    requantized_again: tuple[bool, str]
    healed: list[Answer]
    old_after_healing: list[str]


def regions_of_replicas(runner: Any) -> list[tuple[str, bool]]:
    """By gathering: the kind of memory that it allocates in, and whether the host has a copy."""
    from sglang_helix.srt.model_executor import model_runner
    from sglang_helix.srt.model_executor.replicas import Replica

    within: list[tuple[str, bool]] = []
    seen: list[tuple[str, bool]] = []

    @contextmanager
    def region(tag: str, enable_cpu_backup: bool) -> Iterator[None]:
        within.append((tag, enable_cpu_backup))
        yield
        within.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.memory_saver_adapter, "region", region)
        patch.setattr(Replica, "replicate", lambda *_, **__: seen.extend(within))
        model_runner.load_model(None, runner)
    return seen


def live(rank: int, argv: list[str], before: Path, after: Path) -> Updates:
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.runtime_context import get_parallel

    scheduler = scheduler_of(rank, argv)
    runner = scheduler.tp_worker.model_runner
    layers = dict(mla_layers(scheduler))
    seen: dict[str, Any] = {"gathered_in": regions_of_replicas(runner)}
    seen["old_after_writing_in_place"] = written_in_place(scheduler)
    seen["refusal"] = refused(runner.model, layers["model.layers.1.self_attn"])
    seen["refusal_of_values"] = values_refused(runner.model, layers["model.layers.1.self_attn"])
    from_disk(scheduler, before)

    places = [layer.w_kc_qrep.data_ptr() for layer in layers.values()]
    seen["bad_path"] = from_disk(scheduler, before / "nowhere")
    seen["kept_after_bad_path"] = places == [
        layer.w_kc_qrep.data_ptr() for layer in layers.values()
    ] and not wrong_replicas(rank, scheduler, before)

    group = get_parallel().dcp_group
    gathered: list[int] = []
    all_gather = group.all_gather
    group.all_gather = lambda *args, **kwargs: gathered.append(1) or all_gather(*args, **kwargs)
    begin(scheduler)
    seen["gathers"] = []
    for part in ("mlp", "norm", "self_attn"):
        assert bucket(scheduler, after, part)[0]
        seen["gathers"].append(len(gathered))
    assert end(scheduler)[0]
    seen["gathers"].append(len(gathered))
    del group.all_gather
    seen["old_after_buckets"] = wrong_replicas(rank, scheduler, after)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("disk on fire")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(DefaultModelLoader, "_get_weights_iterator", broken)
        seen["failing_disk"] = from_disk(scheduler, before)
    seen["stale_after_disk"] = [
        name for name, layer in layers.items() if replicas_of(layer) != [None] * 3
    ]
    assert from_disk(scheduler, before)[0]

    begin(scheduler)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 2:
            patch.setattr(runner.model, "load_weights", broken)
        seen["failing_bucket"] = bucket(scheduler, after, "norm")
    seen["end_after_bucket"] = end(scheduler)

    begin(scheduler)
    assert bucket(scheduler, before, "")[0]
    layer = layers["model.layers.1.self_attn"]
    keys = layer.w_kc
    if rank == 3:
        layer.w_kc = keys.to(torch.float8_e4m3fn)
    seen["requantized"] = end(scheduler)
    layer.w_kc = keys
    seen["after_requantized"] = answer(scheduler, PROMPTS, NEW_TOKENS)
    seen["replicated_after_requantized"] = [
        layer.w_kc_qrep is not None for layer in layers.values()
    ]
    begin(scheduler)
    assert bucket(scheduler, before, "norm")[0]
    layer.w_kc = keys.to(torch.float8_e4m3fn)
    seen["requantized_again"] = end(scheduler)
    layer.w_kc = keys
    assert from_disk(scheduler, after)[0]
    seen["healed"] = answer(scheduler, PROMPTS, NEW_TOKENS)
    seen["old_after_healing"] = wrong_replicas(rank, scheduler, after)
    return Updates(**seen)


@pytest.fixture(scope="module")
def updates(
    ready: Fresh, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], list[Updates]]:
    root = tmp_path_factory.mktemp("updates")
    checkpoints = [
        make_checkpoint("deepseek_v2", root / str(seed), seed=seed, num_hidden_layers=2)
        for seed in (0, 1)
    ]
    flags = ("--attn-tp-size", str(A), "--max-total-tokens", "256", "--enable-weights-cpu-backup")
    flags += ("--dcp-replicate-v-proj",)
    argv = command_line(checkpoints[0], N, *flags)
    return checkpoints, ready.ranks(live, N, argv, *checkpoints)


def test_memory_of_replicas_is_released_with_the_weights(updates: Any) -> None:
    assert [seen.gathered_in for seen in updates[1]] == [[("weights", True)] * 2] * N


def test_end_of_an_update_in_place_renews_replicas(updates: Any) -> None:
    assert [seen.old_after_writing_in_place for seen in updates[1]] == [[]] * N


def test_projection_that_cannot_be_replicated_is_refused(updates: Any) -> None:
    for seen in updates[1]:
        message, left_out = seen.refusal
        assert "model.layers.1.self_attn cannot be replicated" in message
        assert "Fp8LinearMethod" in message
        assert "--no-dcp-replicate-q-proj" in message
        assert left_out
        message = seen.refusal_of_values
        assert "value projection of model.layers.1.self_attn cannot be replicated" in message
        assert "torch.float8_e4m3fn" in message
        assert "Leave --dcp-replicate-v-proj out" in message


def test_update_that_changed_nothing_leaves_replicas(updates: Any) -> None:
    for seen in updates[1]:
        assert not seen.bad_path[0]
        assert "rank" not in seen.bad_path[1]  # the same on all: as plain TP says it
        assert seen.kept_after_bad_path


def test_session_of_buckets_gathers_once(updates: Any) -> None:
    for seen in updates[1]:
        assert seen.gathers == [0, 0, 0, 3 * 2]  # three weights in each of two layers
        assert not seen.old_after_buckets


def test_rank_that_fails_fails_the_request_on_every_rank(updates: Any) -> None:
    for seen in updates[1]:
        said = "rank 1: Failed to get weights iterator: disk on fire."
        assert seen.failing_disk == (False, said)
        assert not seen.stale_after_disk
        assert seen.failing_bucket == (False, "rank 2: OSError: disk on fire")
        assert seen.end_after_bucket == (True, "Success")


def test_layer_that_can_no_longer_be_replicated_is_never_served_stale(updates: Any) -> None:
    checkpoints, by_rank = updates
    for seen in by_rank:
        for succeeded, message in (seen.requantized, seen.requantized_again):
            assert not succeeded
            assert "model.layers.1.self_attn cannot be replicated" in message
            assert "torch.float8_e4m3fn" in message
        assert seen.replicated_after_requantized == [True, False]
        for tokens, got in zip(PROMPTS, seen.after_requantized, strict=True):
            check(checkpoints[0], tokens, got, NEW_TOKENS)
        for tokens, got in zip(PROMPTS, seen.healed, strict=True):
            check(checkpoints[1], tokens, got, NEW_TOKENS)
        assert not seen.old_after_healing
