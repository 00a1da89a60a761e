"""Hooked symbols in a tree: where they are, and the lines that are added there.

Everything is read with `ast`; nothing of the tree is imported.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from dataclasses import dataclass
from typing import Any

from sglang_helix.export.tree import PACKAGE, Tree
from sglang_helix.hook import Field, Hook

_IMPORT = "from sglang.srt import helix\n"
_WIDTH = 88  # of upstream's formatter

_parsed = functools.cache(ast.parse)


@dataclass(frozen=True)
class Symbol:
    """A function, or the module's statement that makes a table or a list.

    path: the file that the series changes. owner: the class in it, None of functions and tables.
    name: the symbol's own. node: its definition, None of a method that the class inherits.
    """

    path: str
    owner: str | None
    name: str
    node: Any


def find(tree: Tree, hook: Hook) -> Symbol:
    """The symbol that a hook is on, which must exist: `Contract.hook_problem` says whether."""
    module, path, names = _module(tree, hook.target.partition("[")[0].split("."))
    node = _registered(module, hook.key) if hook.key else _definition(module.body, names[0])
    if len(names) == 1:
        return Symbol(path, None, names[0], node)
    return Symbol(path, names[0], names[1], _definition(node.body, names[1]))


def add_hook(tree: Tree, hook: Hook, impl: str) -> None:
    """Add a hook's lines to its symbol's file.

    A function gets a decorator, the factory of a table's entry too; what a class inherits, and a
    list, a statement at the end of their module. impl: the implementation's name in the tree.
    """
    symbol = find(tree, hook)
    arguments = [f'"{impl}"', *([] if hook.stage == "launch" else [f'stage="{hook.stage}"'])]
    if hook.kind == "backend":
        line = _call("@helix.backend", f'"{hook.key}"', f'"{impl}"')
        _decorate(tree, symbol, line, innermost=True)
    elif hook.kind == "append":
        _append(tree, symbol.path, _call("helix.append", symbol.name, f'"{impl}"'))
    elif symbol.node is None:
        target = f"{symbol.owner}.{symbol.name}"
        decorator = _call(f"{target} = helix.{hook.kind}", *arguments).rstrip()
        _append(tree, symbol.path, f"{decorator}({target})\n")
    else:
        _decorate(tree, symbol, _call(f"@helix.{hook.kind}", *arguments))


def add_field(tree: Tree, field: Field) -> None:
    """Add a field to its struct, and to the order in which ServerArgs takes fields."""
    path = f"{PACKAGE}/srt/arg_groups/fields/{field.namespace}.py"
    named = next(
        node
        for node in ast.walk(_parsed(tree.read(path)))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == field.after
    )
    words = textwrap.wrap(field.help, 62, break_on_hyphens=False)
    help_lines = [f'"{line} "' for line in words[:-1]] + [f'"{words[-1]}"']
    aliases = ", ".join(f'"{flag}"' for flag in field.flags[1:])
    kind = field.type.__name__
    lines = (
        f"    {field.name}: A[\n"
        f"        {kind if field.default is not None else f'Optional[{kind}]'},\n"
        "        Arg(\n"
        f"            help={f'{chr(10)}            '.join(help_lines)},\n"
        + (f"            aliases=[{aliases}],\n" if aliases else "")
        + "        ),\n"
        f"    ] = {field.default}\n"
    )
    _insert(tree, path, {named.end_lineno or 0: lines})
    path = f"{PACKAGE}/srt/arg_groups/field_order.py"
    order = next(
        node.value
        for node in _parsed(tree.read(path)).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
    )
    _insert(tree, path, {order.elts[-1].end_lineno or 0: f'    "{field.name}",\n'})


def _decorate(tree: Tree, symbol: Symbol, line: str, *, innermost: bool = False) -> None:
    """Put a decorator above those that are there, but inside what makes a method of a class."""
    assert isinstance(symbol.node, ast.FunctionDef | ast.AsyncFunctionDef)
    inside = ("classmethod", "staticmethod")
    rows = [d.lineno for d in symbol.node.decorator_list if ast.unparse(d) not in inside]
    row = symbol.node.lineno if innermost else min([*rows, symbol.node.lineno])
    indent = " " * symbol.node.col_offset
    indented = "".join(f"{indent}{part}" for part in line.splitlines(keepends=True))
    _insert(tree, symbol.path, {**_import_helix(tree, symbol.path), row - 1: indented})


def _append(tree: Tree, path: str, line: str) -> None:
    last = len(tree.read(path).splitlines())
    _insert(tree, path, {**_import_helix(tree, path), last: f"\n\n{line}"})


def _import_helix(tree: Tree, path: str) -> dict[int, str]:
    """Its import above upstream's of its own package, as `_insert` takes it, where it lacks."""
    text = tree.read(path)
    if _IMPORT in text:
        return {}
    rows = [
        node.lineno - 1
        for node in _parsed(text).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang")
    ]
    return {rows[0]: _IMPORT}


def _insert(tree: Tree, path: str, lines: dict[int, str]) -> None:
    """Insert lines after rows, which are counted from 1 in the text as it is."""
    text = tree.read(path).splitlines(keepends=True)
    for row in sorted(lines, reverse=True):
        text.insert(row, lines[row])
    tree.write(path, "".join(text))


def _call(function: str, *arguments: str) -> str:
    """A call, broken into lines as upstream's formatter does."""
    joined = ", ".join(arguments)
    if len(function) + len(joined) + 2 <= _WIDTH:
        return f"{function}({joined})\n"
    rows = [f"    {joined}\n"]
    if len(rows[0]) > _WIDTH:
        rows = [f"    {argument},\n" for argument in arguments]
    return f"{function}(\n{''.join(rows)})\n"


def _module(tree: Tree, parts: list[str]) -> tuple[ast.Module, str, list[str]]:
    for length in range(len(parts), 0, -1):
        base = "/".join(("python", *parts[:length]))
        for path in (f"{base}.py", f"{base}/__init__.py"):
            if path in tree:
                return _parsed(tree.read(path)), path, parts[length:]
    raise LookupError(".".join(parts))


def _definition(body: list[ast.stmt], name: str) -> Any:
    """What a module or a class binds a name to; None where it does not."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [node.name]
            case ast.Assign():
                names = list(map(ast.unparse, node.targets))
            case ast.AnnAssign():
                names = [ast.unparse(node.target)]
            case _:
                names = []
        if name in names:
            return node
    return None


def _registered(module: ast.Module, key: str) -> Any:
    """The factory that a decorator registers under a name; None where there is none."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and key in map(_constant, decorator.args):
                    return node
    return None


def _constant(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None
