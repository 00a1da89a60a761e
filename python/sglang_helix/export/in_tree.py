"""The seam of the sharded cache in SGLang: lines that hand a function's work to a module of it.

``@helix.around("module:function")`` above a function, and its like, import that module at the first
call and cost nothing before. With ``stage="serve"`` they act only in a rank whose cache is sharded
by these modules, with ``stage="transfer"`` in one that sends or receives caches, which
`before_process_groups` decides for its process; everywhere else the function is as it stands.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from typing import Any

from sglang.version import __version__

Function = Callable[..., Any]

#: The field of ServerArgs that holds A. `attn_tp_size` is another, derived name (tp / dp / cp).
ATTN_TP_SIZE = "attention_tensor_parallel_size"

#: That of `--dcp-replicate-v-proj`.
REPLICATE_V_PROJ = "dcp_replicate_v_proj"

#: What to do where some rank runs another tree.
RUN_THE_SAME = "run the same tree of SGLang on every node"

_stages = {"launch"}
_at_serving: list[Callable[[], None]] = []

_load = functools.cache(pkgutil.resolve_name)


class SeriesError(RuntimeError):
    """A sharded cache cannot be served as asked; the message says what and why."""


def installed_sglang() -> str:
    """Version of this SGLang."""
    return str(__version__)


def installed_stages() -> frozenset[str]:
    """What acts in this process: ``launch`` always, the others as `before_process_groups` says."""
    return frozenset(_stages)


def before_process_groups(*args: Any, server_args: Any, **kwargs: Any) -> None:
    """Before `init_parallel_runtime`: check the arguments again, and decide what this rank is."""
    from sglang_helix.srt.compatibility.verdict import stages_of
    from sglang_helix.srt.server_args import check

    check(server_args)
    begun = stages_of(server_args) - _stages
    _stages.update(begun)
    if "serve" in begun:
        for act in _at_serving:
            act()


def before(impl: str, *, stage: str = "launch") -> Callable[[Function], Function]:
    """Call ``impl(*args, **kwargs)`` first; it may return other arguments."""

    def call(original: Function, args: Any, kwargs: Any) -> Any:
        changed = _load(impl)(*args, **kwargs)
        if changed is not None:
            args, kwargs = changed
        return original(*args, **kwargs)

    return _decorator(call, stage)


def after(impl: str, *, stage: str = "launch") -> Callable[[Function], Function]:
    """Call ``impl(result, *args, **kwargs)`` afterwards; it may return another result."""

    def call(original: Function, args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        changed = _load(impl)(result, *args, **kwargs)
        return result if changed is None else changed

    return _decorator(call, stage)


def around(impl: str, *, stage: str = "launch") -> Callable[[Function], Function]:
    """Call ``impl(original, *args, **kwargs)`` instead."""

    def call(original: Function, args: Any, kwargs: Any) -> Any:
        return _load(impl)(original, *args, **kwargs)

    return _decorator(call, stage)


def replace(impl: str, *, stage: str = "launch") -> Callable[[Function], Function]:
    """Call ``impl(*args, **kwargs)`` instead."""

    def call(original: Function, args: Any, kwargs: Any) -> Any:
        return _load(impl)(*args, **kwargs)

    return _decorator(call, stage)


def resolution(impl: str) -> Callable[[Function], Function]:
    """Of a step of resolution: call ``impl(server_args, original)`` instead."""

    def call(original: Function, args: Any, kwargs: Any) -> Any:
        return _load(impl)(*args, previous=original, **kwargs)

    return _decorator(call, "launch")


def backend(name: str, impl: str) -> Callable[[Function], Function]:
    """Of the factory of an attention backend: call ``impl(name, original, runner)`` instead."""

    def call(original: Function, args: Any, kwargs: Any) -> Any:
        return _load(impl)(name, original, *args, **kwargs)

    return _decorator(call, "serve")


def append(names: list[str], impl: str) -> None:
    """Append what ``impl()`` returns to a list, in a rank whose cache is sharded."""

    def act() -> None:
        names.extend(_load(impl)())

    if "serve" in _stages:
        act()
    else:
        _at_serving.append(act)


def _decorator(
    call: Callable[[Function, Any, Any], Any], stage: str
) -> Callable[[Function], Function]:
    def decorate(original: Function) -> Function:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if stage not in _stages:
                return original(*args, **kwargs)
            return call(original, args, kwargs)

        return wrapper

    return decorate
