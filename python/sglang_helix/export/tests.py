"""The tests and the benchmark of the series in SGLang's tree, registered for upstream's runners.

Of the tests those that need nothing but SGLang and the series: what serves whole models needs the
CPU platform, which is a distribution of its own. Tests land where upstream's runners look for them,
helpers beside upstream's own. They are in a clone of this project, not in its package: where there
is none, nothing lands.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sglang_helix.export.modules import Modules

_PROJECT = Path(__file__).parents[3]
_TESTS = _PROJECT / "test"
_BENCHMARK = "benchmark/dcp"
_COMMANDS = ("__init__", "__main__", "kernels", "collectives", "attention")

_REGISTERED = "test/registered/dcp"
_UPSTREAMS = "sglang.test"

# Seconds are estimates, for the runner to divide its work by.
_CPU = 'register_cpu_ci(est_time=20, suite="base-a-test-cpu")'
_SUITES = {
    "gpu": 'register_cuda_ci(est_time=60, stage="base-b", runner_config="1-gpu-large")',
    "multi_gpu": 'register_cuda_ci(est_time=300, stage="base-c", runner_config="4-gpu-h100")',
}


class Tests:
    """What has not landed yet of the tests and the benchmark."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self._waiting = [file for file in sorted(_TESTS.rglob("test_*.py")) if _lands(file)]
        places = [_PROJECT / _BENCHMARK / f"{name}.py" for name in _COMMANDS]
        self._waiting += [place for place in places if place.exists()]
        for helper in {helper for file in self._waiting for helper in _helpers(file)}:
            if helper.is_relative_to(_TESTS):
                name = _dotted(helper, _TESTS)
                modules.rename(name, f"{_UPSTREAMS}.dcp.{name.removeprefix('srt.')}")

    def landing(self) -> dict[str, str]:
        """Texts by path of those whose modules of the series have all landed."""
        texts: dict[str, str] = {}
        for file in list(self._waiting):
            helpers = _helpers(file)
            if all(self._modules.landed(name) for part in (file, *helpers) for name in _uses(part)):
                self._waiting.remove(file)
                for part in (file, *helpers):
                    texts[self._path(part)] = self._text(part)
        return texts

    def _path(self, file: Path) -> str:
        if file.is_relative_to(_PROJECT / _BENCHMARK):
            return str(file.relative_to(_PROJECT))
        if file.name.startswith("test_"):
            return f"{_REGISTERED}/{file.relative_to(_TESTS / 'srt')}"
        return f"python/{self._modules.in_tree(_dotted(file, _TESTS)).replace('.', '/')}.py"

    def _text(self, file: Path) -> str:
        text = self._modules.translated(file.read_text())
        if not self._path(file).startswith(_REGISTERED):
            return text
        calls = [call for mark, call in _SUITES.items() if _marked(text, mark)] or [_CPU]
        names = ", ".join(sorted({call.partition("(")[0] for call in calls}))
        return (
            f"{text}\n\nfrom sglang.test.ci.ci_register import {names}  # noqa: E402\n\n"
            + "".join(f"{call}\n" for call in calls)
            + '\nif __name__ == "__main__":\n    raise SystemExit(pytest.main([__file__]))\n'
        )


def _lands(file: Path) -> bool:
    """Whether a test needs nothing but SGLang, the series, and helpers that do not either."""
    parts = (file, *_helpers(file))
    return (
        file.is_relative_to(_TESTS / "srt")
        and "import pytest\n" in file.read_text()
        and not any(part.name.startswith("test_") for part in parts[1:])
        and all(_is_of_the_tree(name) for part in parts for name in _imports(part))
    )


def _is_of_the_tree(name: str) -> bool:
    first = name.partition(".")[0]
    if first == "sglang_helix":
        return name.startswith(("sglang_helix.srt.", "sglang_helix.helix"))
    return first not in ("sglang_cpu_reference", "benchmark") and name != "srt.fresh"


def _uses(file: Path) -> set[str]:
    return {name for name in _imports(file) if name.startswith("sglang_helix.srt.")}


@cache
def _helpers(file: Path) -> tuple[Path, ...]:
    """Modules of this project beside the package that a file imports, and those that they do."""
    found: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        for name in _imports(waiting.pop()):
            root = {"srt": _TESTS, "benchmark": _PROJECT}.get(name.partition(".")[0])
            path = root.joinpath(*name.split(".")).with_suffix(".py") if root else None
            # Two may import one another, inside of functions.
            if path and path.exists() and path != file and path not in found:
                found[path] = None
                waiting.append(path)
    return tuple(found)


@cache
def _imports(file: Path) -> frozenset[str]:
    """Modules that a file imports anywhere, and what it imports from packages."""
    return frozenset(_imported(ast.parse(file.read_text())))


def _imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            package = node.module or ""
            for alias in node.names:
                inside = f"{package}.{alias.name}"
                place = (_TESTS if package.startswith("srt") else _PROJECT).joinpath(
                    *(["python"] if package.startswith("sglang_helix") else []),
                    *inside.split("."),
                )
                yield inside if place.with_suffix(".py").exists() else package
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _marked(text: str, mark: str) -> bool:
    return re.search(rf"\bmark\.{mark}\b", text) is not None


def _dotted(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts)
