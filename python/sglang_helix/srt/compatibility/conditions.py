"""What several groups of rows ask about a server."""

from __future__ import annotations

from sglang_helix.srt.compatibility.row import Given
from sglang_helix.srt.compatibility.situation import Situation


def flag(name: str) -> Given:
    """The argument's value where it is set to something."""
    return lambda situation: getattr(situation.args, name) or None


def more_than_one(name: str) -> Given:
    """The argument's value where it is above 1."""
    return lambda situation: value if (value := getattr(situation.args, name)) > 1 else None


def unlike(name: str, *usual: object) -> Given:
    """The argument's value where it is none of these."""
    return lambda situation: (
        value if (value := getattr(situation.args, name)) not in usual else None
    )


def of_mla(given: Given) -> Given:
    """Of MLA models alone."""
    return lambda situation: given(situation) if situation.mla else None


def not_of_mla(given: Given) -> Given:
    """Of GQA and MHA models alone."""
    return lambda situation: None if situation.mla else given(situation)


def disaggregated(situation: Situation) -> object | None:
    """The server's role in prefill-decode disaggregation, if any."""
    mode = situation.args.disaggregation_mode
    return None if mode in ("null", None) else mode


def on_platform(*names: str) -> str | None:
    """Which of these platforms this is; None: none of them."""
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    return next((name for name in names if getattr(platform, f"is_{name}")), None)
