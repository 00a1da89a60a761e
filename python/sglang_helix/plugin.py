"""SGLang's door to the series: the entry point, its stages, and the checks that fail closed.

SGLang calls `register` in every process that loads plugins. The launch stage registers the light
hooks. The serve stage runs in a scheduler process whose layout shards the cache, just before the
process groups are built, and installs the rest, but for what transfers between a prefill and a
decode server need: that is a stage of its own, for plain servers too.

SGLang logs a plugin or a hook that fails and carries on; a rank that lacks one would then serve
wrong tokens. So whatever goes wrong in a stage ends the process (SystemExit passes through
SGLang's `except Exception`), and the launcher serves only when every rank has reported its stages.

This module imports nothing that can fail: an ImportError here would be swallowed.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from sglang_helix.hook import Hook, Stage

logger = logging.getLogger(__name__)

_installed: set[str] = set()


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`: the launch stage."""
    try:
        from sglang_helix.hook import check_one_form, check_version
        from sglang_helix.series import hooks

        check_one_form()
        check_version()
        from sglang_helix.bindings import apply_hooks_in_one_walk

        apply_hooks_in_one_walk()
        _register(hooks("launch"))
        _check_calling_engine()
        _installed.add("launch")
    except Exception as failure:
        _stop("launch", failure)


def _check_calling_engine() -> None:
    """`sglang.Engine()` loads plugins itself, with its arguments already at hand."""
    if "sglang.srt.entrypoints.engine" in sys.modules:
        from sglang_helix.flags import check_calling_engine

        check_calling_engine()


def install_serve_stage() -> None:
    """In a scheduler process, before its process groups: import the heavy targets and patch."""
    install("serve")


def install(stage: Stage) -> None:
    """The same of any stage but the first."""
    if stage in _installed:
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry

        from sglang_helix.series import hooks

        verify("launch")
        if stage == "serve":
            # A platform registers its attention backends when this is imported; adapters take the
            # place of what is there.
            import sglang.srt.model_executor.model_runner  # noqa: F401

        _register(hooks(stage))
        HookRegistry.apply_hooks()
        verify(stage)
        _installed.add(stage)
    except Exception as failure:
        _stop(stage, failure)


def installed_stages() -> frozenset[str]:
    """The stages this process has installed without a failure."""
    return frozenset(_installed)


def verify(stage: Stage) -> None:
    """Raise SeriesError unless SGLang has applied every hook of a stage in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_helix.hook import HOOK_TYPES, SeriesError
    from sglang_helix.series import hooks

    missing = [
        hook.target
        for hook in hooks(stage)
        if hook.kind in HOOK_TYPES and hook.target not in HookRegistry._patched
    ]
    if missing:
        raise SeriesError(f"SGLang did not apply the hooks on {', '.join(missing)}")


def verify_series(server_args: Any, previous: Callable[[Any], None]) -> None:
    """First step of resolution: SGLang logs hooks that fail and carries on; stop instead."""
    verify("launch")
    previous(server_args)


def _register(hooks: Iterable[Hook]) -> None:
    """Check each hook against the installed SGLang and hand it to SGLang's registries."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_helix.hook import HOOK_TYPES, SeriesError

    for hook in hooks:
        if problem := hook.check():
            raise SeriesError(problem)
        implementation = hook.implementation()
        if hook.kind in HOOK_TYPES:
            if hook.target in HookRegistry._patched:
                # SGLang applies the hooks of a target once, and would ignore this one.
                raise SeriesError(
                    f"another plugin has hooked {hook.target}: leave it out of SGLANG_PLUGINS"
                )
            HookRegistry.register(hook.target, implementation, HookType(hook.kind))
        elif hook.kind == "resolution":
            from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

            register_resolution_hook(hook.target.rpartition(".")[2])(implementation)
        elif hook.kind == "backend":
            hook.table()[hook.key] = functools.partial(implementation, hook.key, hook.resolve())
        elif hook.kind == "attribute":
            owner, _, name = hook.target.rpartition(".")
            setattr(pkgutil.resolve_name(owner), name, staticmethod(implementation))
        else:
            hook.resolve().extend(implementation())


def _stop(stage: str, failure: Exception) -> NoReturn:
    message = f"sglang-helix: the {stage} stage of the series failed: {failure}"
    logger.error(message, exc_info=failure)
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(message) from failure


def before_process_groups(*args: Any, server_args: Any, **kwargs: Any) -> None:
    """Before SGLang's `init_parallel_runtime`: the stages that the series has for this rank.

    Whoever resolved the arguments: they are checked here as they were in the launcher.
    """
    from sglang_helix.srt.compatibility.verdict import stages_of
    from sglang_helix.srt.server_args import check

    try:
        check(server_args)
    except ValueError as refused:
        _stop("serve", refused)
    for stage in sorted(stages_of(server_args) - {"launch"}):
        install(stage)
