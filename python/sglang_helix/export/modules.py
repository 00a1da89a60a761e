"""The modules of the series in SGLang's tree: where each lands, with which patch, and its text.

A module keeps the path that it mirrors. Where upstream has a file of that name, which it extends,
it lands beside it: `layers/dcp/comm.py` as `layers/dcp/comm_helix.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from sglang_helix.export.tree import PACKAGE, Tree
from sglang_helix.hook import Hook, Patch, SeriesError
from sglang_helix.series import SERIES

_ROOT = Path(__file__).parents[2]
_SRT, _SGLANG = "sglang_helix.srt", "sglang.srt"
#: What differs between the two forms, and its text in the tree.
_FORM = "sglang_helix.helix"
_IN_TREE = "sglang_helix.export.in_tree"
IN_TREE = f"{PACKAGE}/srt/helix.py"

#: What ranks share with the command line.
_SHARED = {
    f"sglang_helix.{name}": f"{_SGLANG}.layers.dcp.{name}" for name in ("advice", "cost", "layout")
}

_NAME = re.compile(r"(?<![\w.])(?:sglang_helix|srt)(?:\.\w+)+")


def lands_in_tree(hook: Hook) -> bool:
    """Whether a hook is for both forms; the plugin's own are carried out outside `srt`."""
    return hook.impl.startswith((f"{_SRT}.", f"{_FORM}:"))


class Modules:
    """The modules of the series as they land in one tree."""

    def __init__(self, tree: Tree) -> None:
        self._names = dict.fromkeys((_FORM, _IN_TREE), f"{_SGLANG}.helix")
        files = sorted((_ROOT / "sglang_helix" / "srt").rglob("*.py"))
        names = [".".join(file.relative_to(_ROOT).with_suffix("").parts) for file in files]
        places = {name: name.replace("sglang_helix", "sglang", 1) for name in names}
        for name, landed in (places | _SHARED).items():
            self._names[name] = f"{landed}_helix" if _path(landed) in tree else landed
        self._landed: set[str] = set()
        self._tree = tree

    def rename(self, name: str, landed: str) -> None:
        """Have a module beside the package land under a name."""
        self._names[name] = landed

    def landed(self, name: str) -> bool:
        """Whether a module of the series is in the tree by now."""
        return name in self._landed

    def in_tree(self, name: str) -> str:
        """A module's name in the tree, or that of what it holds, "module:function"."""
        module, colon, function = name.partition(":")
        return f"{self._names[module]}{colon}{function}"

    def of(self, patch: Patch) -> dict[str, str]:
        """Texts by path of what lands with a patch, after those before it."""
        later = {module for other in SERIES[SERIES.index(patch) + 1 :] for module in other.modules}
        waiting = [hook.impl.partition(":")[0] for hook in patch.hooks if lands_in_tree(hook)]
        waiting += patch.modules
        texts: dict[str, str] = {}
        while waiting:
            name = waiting.pop()
            if name in self._landed or name in later:
                continue
            self._landed.add(name)
            source = _file(_IN_TREE if name == _FORM else name)
            path = _path(self._names[name])
            texts[path] = self.translated(source.read_text())
            beside = source.with_suffix(".json")
            if beside.exists():
                texts[path.removesuffix(".py") + ".json"] = beside.read_text()
            package = source.with_name("__init__.py")
            if name.startswith(f"{_SRT}.") and package.stat().st_size:
                texts[path.rpartition("/")[0] + "/__init__.py"] = package.read_text()
            waiting += self._imported(source)
        if taken := [path for path in texts if path in self._tree]:
            raise SeriesError(f"SGLang has files where the series' would land: {', '.join(taken)}")
        return texts

    def translated(self, text: str) -> str:
        """A module's text with the names that modules have in the tree."""
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and self._imports_modules(node):
                assert node.lineno == node.end_lineno
                indent = " " * node.col_offset
                lines[node.lineno - 1] = "".join(
                    f"{indent}{self._import(node.module or '', alias)}\n" for alias in node.names
                )
        return _NAME.sub(self._translated, "".join(lines))

    def _imports_modules(self, node: ast.ImportFrom) -> bool:
        return any(f"{node.module}.{alias.name}" in self._names for alias in node.names)

    def _import(self, package: str, alias: ast.alias) -> str:
        parent, _, landed = self._names[f"{package}.{alias.name}"].rpartition(".")
        known_as = alias.asname or alias.name
        return f"from {parent} import {landed}" + (f" as {known_as}" if known_as != landed else "")

    def _translated(self, found: re.Match[str]) -> str:
        name, rest = found.group(), ""
        while name and name not in self._names:
            name, _, last = name.rpartition(".")
            rest = f".{last}{rest}"
        return self._names[name] + rest if name else found.group()

    def _imported(self, source: Path) -> Iterator[str]:
        """Modules of the series that a module names: in imports anywhere, and in strings."""
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang_helix"):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    name = name if name in self._names else node.module or ""
                    if name not in self._names:
                        raise SeriesError(f"{source} imports {name}, which is the plugin's alone")
                    yield name
            elif isinstance(node, ast.Constant) and node.value in self._names:
                yield node.value


def _path(name: str) -> str:
    return f"python/{name.replace('.', '/')}.py"


def _file(name: str) -> Path:
    return _ROOT.joinpath(*name.split(".")).with_suffix(".py")
