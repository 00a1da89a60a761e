"""``python -m sglang_helix check``: the verdict of a model and flags, before anything is loaded.

SGLang resolves the arguments as for a launch, on this machine or on one that it is only told about,
which reads the model's config.json and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# What SGLang believes about a machine with such GPUs.
MACHINES: dict[str, dict[str, Any]] = {
    "Ampere": {"device_sm": 80},
    "Hopper": {"device_sm": 90, "is_sm90": True, "is_hopper_with_cuda_12_3": True},
    "Blackwell": {
        "device_sm": 100,
        "is_sm100": True,
        "is_sm100_or_sm110": True,
        "is_blackwell": True,
    },
}


def facts_of(machine: str) -> dict[str, Any]:
    """Facts for SGLang's `override_platform`."""
    facts = MACHINES[machine]
    major = facts["device_sm"] // 10
    return {"is_cuda": True, "has_flashinfer": True, "device_capability": (major, 0), **facts}


@contextmanager
def told_about(machine: str) -> Iterator[None]:
    """Within it SGLang believes to run on such a machine."""
    import os
    from unittest import mock

    from sglang.srt.runtime_context import override_platform

    facts = facts_of(machine)
    capability = mock.patch(
        "torch.cuda.get_device_capability", return_value=facts["device_capability"]
    )
    # Some steps set variables for the ranks to come.
    with mock.patch.dict(os.environ), override_platform(**facts), capability:
        yield


def check(argv: Sequence[str], machine: str | None = None) -> tuple[str, str]:
    """The verdict (works, own, refused or whole) of a server's command line, and what it means.

    machine: one of MACHINES; None for this one.
    """
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_platform

    load_plugins()
    if machine is None:
        here = get_platform()
        if not (here.is_cuda or here.is_hip or here.is_npu or here.is_xpu) and (
            not current_platform.is_out_of_tree()
        ):
            return "refused", f"this machine has no GPU: give --on, one of {', '.join(MACHINES)}"
        return _check(argv)
    with told_about(machine):
        return _check([*argv, "--device", "cuda"])


def _check(argv: Sequence[str]) -> tuple[str, str]:
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang.srt.server_args import prepare_server_args

    from sglang_helix.srt.compatibility.verdict import announcement, verdict_of

    args = prepare_server_args(list(argv))
    try:
        args.resolve_once()
        args.check_server_args()
    except (OSError, ValueError, AssertionError, RuntimeError) as refused:
        return "refused", str(refused)
    verdict, view = verdict_of(args), resolved_view(args)
    if verdict.kind == "whole":
        return "whole", "no sharded cache is asked for: SGLang serves, as without the series"
    if verdict.kind == "own":
        return "own", announcement(verdict)
    prefill, decode = attention_backends_of(view)
    backends = prefill if prefill == decode else f"{prefill} (prefill) and {decode} (decode)"
    return "works", (
        f"--tp-size {view.tp_size} --dcp-size {view.dcp_size} --dcp-comm-backend "
        f"{view.dcp_comm_backend}, attention by {backends}. The layers of the model are checked "
        "once it is built, before weights are loaded."
    )
