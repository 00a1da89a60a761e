"""What a hook is, and how its declaration is checked against the installed SGLang.

Importing this module imports neither SGLang nor torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

SUPPORTED_SGLANG = ("0.5.23",)

Kind = Literal[
    "before", "after", "around", "replace", "resolution", "backend", "append", "attribute"
]
Stage = Literal["launch", "serve", "transfer"]

# The kinds that SGLang's own hook registry installs.
HOOK_TYPES = frozenset({"before", "after", "around", "replace"})


class SeriesError(RuntimeError):
    """The series cannot be installed as declared; the message says what and why."""


@dataclass(frozen=True)
class Hook:
    """One place of SGLang that the series changes.

    target: dotted name of the function, method or table entry (``module.TABLE[key]``).
    kind: how it is changed. ``before``, ``after``, ``around`` and ``replace`` are SGLang's hook
        types; ``resolution`` wraps a step of server-argument resolution; ``backend`` takes the
        place of an attention backend's factory, and is called with the backend's name and that
        factory in front; ``append`` adds names to a list in place; ``attribute`` sets a class
        attribute to the implementation, as a static method.
    stage: ``launch`` hooks go into every process and import nothing heavy; ``serve`` hooks go
        into a scheduler process just before its process groups are built, and only when the
        layout shards the cache; ``transfer`` hooks go there too, where it disaggregates prefill
        from decode by Mooncake, sharded or not: one of the two servers may be.
    impl: ``module:function`` of this package.
    signature: parameter names of the target, ``=`` after those with a default; empty for what is
        not called by the series.
    why, how, upstream, until: the catalogue entry: what is wrong or missing without the hook,
        what the hook does, where upstream discusses it, and when the hook can be dropped.
    """

    target: str
    kind: Kind
    stage: Stage
    impl: str
    signature: str
    why: str
    how: str
    upstream: str
    until: str

    def implementation(self) -> Callable[..., Any]:
        """Import and return the function that carries the change."""
        return pkgutil.resolve_name(self.impl)

    @property
    def key(self) -> str:
        """Key of a table entry; empty for other targets."""
        return self.target.partition("[")[2].rstrip("]")

    def table(self) -> dict[str, Any]:
        """The table whose entry `key` is the target."""
        return pkgutil.resolve_name(self.target.partition("[")[0])

    def resolve(self) -> Any:
        """Import and return the target; raises SeriesError where it does not exist."""
        try:
            return self.table()[self.key] if self.key else pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError, KeyError) as missing:
            raise SeriesError(f"{self.target} does not exist ({missing})") from missing

    def check(self) -> str | None:
        """Compare the target with its declaration; None when it fits, else what differs."""
        try:
            target = self.resolve()
            found = "" if self.kind == "attribute" else signature_of(target)
        except SeriesError as missing:
            return str(missing)
        if found != self.signature:
            return f"{self.target} takes ({found}), expected ({self.signature})"
        return None


@dataclass(frozen=True)
class Field:
    """An input of ServerArgs that SGLang lacks: a field in its own tree, beside them in a plugin.

    name, type: of the field. default: where the user gives none; of a bool that is False.
    namespace, after: the struct of `arg_groups/fields` that it belongs to, and its neighbour there.
    flags, help, metavar: its command line; the first flag is the one that the name gives. A bool's
        takes no value.
    """

    name: str
    namespace: str
    after: str
    type: type
    flags: tuple[str, ...]
    help: str
    metavar: str | None = None

    @property
    def default(self) -> bool | None:
        """What the field holds where the user gives nothing."""
        return False if self.type is bool else None

    @property
    def argument(self) -> str:
        """Its name in Python: of `sglang.Engine`'s argument."""
        return self.flags[-1].removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Patch:
    """A part of the series that can be loaded without the later ones.

    fields: inputs of ServerArgs that it adds. modules: what lands with this patch in SGLang's own
    tree although an earlier one could import it; every other module lands with the first that does.
    """

    name: str
    summary: str
    hooks: tuple[Hook, ...]
    fields: tuple[Field, ...] = ()
    modules: tuple[str, ...] = ()


def signature_of(target: Any) -> str:
    """Parameter names of a callable, ``=`` after defaults; empty for what is not callable."""
    if not callable(target):
        return ""
    return ", ".join(
        {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        + name
        + ("=" if parameter.default is not parameter.empty else "")
        for name, parameter in inspect.signature(target).parameters.items()
    )


def installed_sglang() -> str:
    """Version of the installed SGLang distribution; raises SeriesError without one."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError as missing:
        raise SeriesError("sglang is not installed") from missing


def check_version() -> None:
    """Raise SeriesError unless the installed SGLang is one the series was written for."""
    found = installed_sglang()
    if found not in SUPPORTED_SGLANG:
        raise SeriesError(
            f"sglang-helix supports sglang {' or '.join(SUPPORTED_SGLANG)}, but {found} is "
            f"installed: pip install sglang=={SUPPORTED_SGLANG[-1]}, or uninstall sglang-helix"
        )


def check_one_form() -> None:
    """Raise SeriesError where SGLang has the series in its own tree, too."""
    if importlib.util.find_spec(".helix", "sglang.srt") is not None:
        raise SeriesError(
            "this SGLang has the series in its own tree (sglang/srt/helix.py), and the plugin "
            "would start it twice: pip uninstall sglang-helix, or use a tree without those commits"
        )
