"""Whoever resolved the arguments, launch, ranks and what is attached later check them."""

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from sglang_helix.flags import keep
from srt.compatibility.situations import CUTEDSL_KIMI, OURS, TP4, facts
from srt.fresh import Fresh


def launch(models: dict[str, str], cases: dict[str, Any]) -> dict[str, str]:
    """Resolve without the series, load it, and launch: how that ends."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    ended = {}
    for name, (machine, model, flags, _) in cases.items():
        capability = mock.patch("torch.cuda.get_device_capability", return_value=(10, 0))
        with mock.patch.dict(os.environ), override_platform(**facts(machine)), capability:
            given = {**TP4, **flags}
            own = {name: given.pop(name) for name in OURS if name in given}
            args = ServerArgs(model_path=models[model], device="cuda", **given)
            keep(args, **own)
            ended[name] = args
            args.resolve_once()
    load_plugins()
    for name, (machine, *_) in cases.items():
        with override_platform(**facts(machine)):
            try:
                ended[name].check_server_args()
                ended[name] = ended[name]._helix_verdict.kind
            except ValueError as error:
                ended[name] = str(error)
    return ended


TRITON = {"attention_backend": "triton", "dcp_comm_backend": "a2a"}
RESOLVED_BEFORE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "whole": ("Blackwell", "llama", {"dcp_size": 1}, "whole"),
    "works": ("Blackwell", "llama", TRITON, "works"),
    "own": ("Blackwell", "kimi_linear", CUTEDSL_KIMI, "own"),
    "backend": (
        "Blackwell",
        "llama",
        {"attention_backend": "flex_attention", "dcp_comm_backend": "a2a"},
        "--attention-backend flex_attention does not serve GQA or MHA with --dcp-size 2",
    ),
    "a backend that nobody named and nobody has seen": (
        "Blackwell",
        "llama",
        {"dcp_comm_backend": "a2a"},
        "--attention-backend trtllm_mha has not been seen on a GPU of compute capability 10.x with "
        "--dcp-size, and SGLang chose it: give the flag to have it all the same, or with one of "
        "flashinfer, triton, ",
    ),
    "a backend that was named": (
        "Blackwell",
        "llama",
        {"attention_backend": "trtllm_mha", "dcp_comm_backend": "a2a"},
        "works",
    ),
    "fi_a2a": (
        "Blackwell",
        "llama",
        {**TRITON, "dcp_comm_backend": "fi_a2a"},
        "--dcp-comm-backend fi_a2a is not supported with --dcp-size 2",
    ),
    "heads": (
        "Blackwell",
        "llama",
        {**TRITON, "tp_size": 6},
        "--dcp-size 2 with --tp-size 6: 8 query heads cannot be split over 6 ranks",
    ),
    "refused flag": (
        "Blackwell",
        "llama",
        {**TRITON, "enable_symm_mem": True},
        "--enable-symm-mem is not supported with --dcp-size 2",
    ),
    "attn_tp_size": (
        "Blackwell",
        "llama",
        {**TRITON, "dcp_comm_backend": None, "dcp_size": 1, "attn_tp_size": 2},
        "--attn-tp-size 2 was not heard: these arguments were resolved before plugins were loaded. "
        "Call sglang.srt.plugins.load_plugins() before",
    ),
}


def test_what_was_resolved_before_plugins_is_checked_at_launch(
    gpu: Fresh, models: dict[str, str]
) -> None:
    ended = gpu.value(launch, models, RESOLVED_BEFORE)
    for name, (*_, expected) in RESOLVED_BEFORE.items():
        assert expected in ended[name], name


def rank_of(model: str, machine: str, flags: dict[str, Any], before_plugins: bool) -> list[str]:
    """A rank that is about to build its groups: the serve hooks it has then."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    capability = mock.patch("torch.cuda.get_device_capability", return_value=(10, 0))
    with override_platform(**facts(machine)), capability:
        args = ServerArgs(model_path=model, device="cuda", **{**TP4, **flags})
        if before_plugins:
            args.resolve_once()
        load_plugins()
        args.resolve_once()
        from sglang.srt.plugins.hook_registry import HookRegistry
        from sglang_helix import plugin
        from sglang_helix.series import hooks

        plugin.before_process_groups(server_args=args, device="cuda", dist_port=1)
        return [hook.target for hook in hooks("serve") if hook.target in HookRegistry._patched]


def test_ranks_install_the_serve_stage_where_the_series_serves(
    gpu: Fresh, models: dict[str, str]
) -> None:
    calls = [
        (rank_of, models["llama"], "Blackwell", TRITON, False),
        (rank_of, models["kimi_linear"], "Blackwell", CUTEDSL_KIMI, False),
        (rank_of, models["llama"], "Blackwell", {"dcp_size": 1}, False),
        (rank_of, models["llama"], "Blackwell", {**TRITON, "enable_symm_mem": True}, True),
    ]
    works, own, whole, refused = gpu.outcomes(calls)
    assert works.status == own.status == whole.status == 0, works.output + own.output
    assert works.value
    assert own.value == whole.value == []
    assert refused.status == 1
    assert "--enable-symm-mem is not supported with --dcp-size 2" in refused.output


def engine(model: str, loaded: bool) -> None:
    import sglang
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    if loaded:
        load_plugins()
    sglang.Engine(server_args=ServerArgs(model_path=model, tp_size=2), attn_tp_size=1)


@pytest.mark.parametrize("loaded", [False, True])
def test_engine_does_not_lose_attn_tp_size(
    gpu: Fresh, models: dict[str, str], loaded: bool
) -> None:
    ended = gpu.outcome(engine, models["llama"], loaded)
    assert ended.status == 1
    assert "Engine(server_args=..., attn_tp_size=1): attn_tp_size would be ignored. Give" in (
        ended.output
    )


def attached(model: str, machine: str, storage: str) -> str:
    """The answer to `PUT /hicache/storage-backend` of a rank that runs the series."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    from sglang_helix.srt.managers.scheduler import attach_hicache_storage

    capability = mock.patch("torch.cuda.get_device_capability", return_value=(10, 0))
    with override_platform(**facts(machine)), capability:
        args = ServerArgs(model_path=model, device="cuda", **TP4)
        args.resolve_once()
        with mock.patch("sglang.srt.runtime_context.get_server_args", return_value=args):
            answer = attach_hicache_storage(
                lambda scheduler, request: SimpleNamespace(message="asked SGLang"),
                None,
                SimpleNamespace(hicache_storage_backend=storage),
            )
    return str(answer.message)


def test_storage_attached_later_obeys_the_rows_of_the_flag(
    gpu: Fresh, models: dict[str, str]
) -> None:
    latent, heads = models["deepseek_v2"], models["llama"]
    calls = [
        (attached, model, "Blackwell", storage)
        for model, storage in (
            (latent, "file"),
            (latent, "mooncake"),
            (latent, "nixl"),
            (heads, "file"),
            (heads, "mooncake"),
        )
    ]
    works, mooncake, nixl, heads_in_files, in_mooncake = (o.value for o in gpu.outcomes(calls))
    assert works == mooncake == heads_in_files == "asked SGLang"
    for message in (nixl, in_mooncake):
        assert (
            "is not supported with --dcp-size 2: no other store has a page format by owner"
            in message
        )
