"""The series' flags in `sglang serve --help`. Extends `sglang/cli/serve.py`.

SGLang prints that help before it loads plugins, and nothing of SGLang's own asks an installed
plugin earlier. Torch does: importing it calls every entry point of the group `torch.backends`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_SERVER_ARGS = "sglang.srt.server_args"


def load_plugins_for_help() -> None:
    """Entry point of `torch.backends`: does nothing but in `sglang serve --help`.

    There it has SGLang's plugins loaded as soon as the module of the flags is.

    Torch lets `import torch` fail over whatever an entry point raises, in every process of the
    environment. So this module imports nothing but Python's own, nothing leaves this function, and
    its name stays what environments have noted that were installed before.
    """
    with contextlib.suppress(Exception):
        if sys.argv[1:2] == ["serve"] and {"-h", "--help"} & set(sys.argv[2:]):
            sys.meta_path.insert(0, _ServerArgsFinder())


class _ServerArgsFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _SERVER_ARGS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadsPluginsAfter(spec.loader)
        return spec


class _LoadsPluginsAfter(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from sglang.srt.plugins import load_plugins

        load_plugins()
