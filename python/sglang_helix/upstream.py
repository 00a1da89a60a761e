"""SGLang's source as the series borrows from it: read by `ast`, not imported.

What the series imports, calls, subclasses, overrides and reads of SGLang is found in its own
source, so no list of it is kept; every find is then looked up in the source of an SGLang, which
need not be the installed one, nor have its dependencies. `contract.py` reports what does not fit.
"""

from __future__ import annotations

import ast
import builtins
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef, ast.Lambda)


class Symbol(NamedTuple):
    """Something that source defines: its dotted name, and the statement (None: a module)."""

    module: str
    name: str
    node: ast.AST | None

    @property
    def dotted(self) -> str:
        """``package.module.name``."""
        return f"{self.module}.{self.name}" if self.name else self.module


class External(NamedTuple):
    """Something of another package, by its dotted name."""

    dotted: str


@dataclass(eq=False)
class Class:
    """A class of the source: what it and its methods define, and what it derives from."""

    symbol: Symbol
    members: dict[str, ast.AST]
    bases: list[Symbol | External]
    order: list[Class | External] = field(default_factory=list)


class Sources:
    """Packages by the directory that holds each; nothing of them is imported."""

    def __init__(self, packages: Mapping[str, Path]) -> None:
        self.packages = packages
        self._modules: dict[str, dict[str, ast.AST] | None] = {}
        self._trees: dict[str, ast.Module] = {}
        self._lines: dict[str, list[str]] = {}
        self._classes: dict[str, Class] = {}

    def path(self, module: str) -> Path | None:
        """The file of a module."""
        package, *parts = module.split(".")
        if package not in self.packages:
            return None
        place = self.packages[package].joinpath(*parts)
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return path
        return None

    def is_module(self, module: str) -> bool:
        """Whether there is such a module, or a folder that is one (a namespace)."""
        package, *parts = module.split(".")
        return self.path(module) is not None or (
            package in self.packages and self.packages[package].joinpath(*parts).is_dir()
        )

    def tree(self, module: str) -> ast.Module:
        """The module, parsed; empty where it is a folder."""
        if module not in self._trees:
            path = self.path(module)
            text = path.read_text() if path else ""
            self._lines[module] = text.split("\n")
            self._trees[module] = ast.parse(text)
        return self._trees[module]

    def names(self, module: str) -> dict[str, ast.AST]:
        """What a module binds at its top level, also below ``if`` and ``try``."""
        if (found := self._modules.get(module)) is None:
            found = {}
            for node in of_scope(self.tree(module).body):
                for name in _bound(node):
                    definition = isinstance(node, (*_FUNCTIONS, ast.ClassDef))
                    if definition or not isinstance(found.get(name), (*_FUNCTIONS, ast.ClassDef)):
                        found[name] = node
            self._modules[module] = found
        return found

    def body(self, symbol: Symbol) -> str:
        """The lines of a definition that was found."""
        first = getattr(symbol.node, "lineno", 1) - 1
        return "\n".join(self._lines[symbol.module][first : getattr(symbol.node, "end_lineno", 0)])

    def find(self, dotted: str) -> Symbol | External | None:
        """What a dotted name stands for, through imports of imports; None where it is not."""
        parts = dotted.split(".")
        if parts[0] not in self.packages:
            return External(dotted)
        known = 1
        while known < len(parts) and self.is_module(".".join(parts[: known + 1])):
            known += 1
        found: Symbol | External | None = Symbol(".".join(parts[:known]), "", None)
        for part in parts[known:]:
            found = self._inside(found, part)
        return found

    def _inside(self, owner: Symbol | External | None, name: str) -> Symbol | External | None:
        if owner is None:
            return None
        if isinstance(owner, External):
            return External(f"{owner.dotted}.{name}")
        if owner.node is None:
            return self.in_module(owner.module, name)
        if (cls := self.class_of(owner)) is None:
            return External(f"{owner.dotted}.{name}")  # a value: what it holds is not known
        return self.member(cls, name)

    def in_module(
        self, module: str, name: str, seen: frozenset[str] = frozenset()
    ) -> Symbol | External | None:
        """What a name of a module stands for."""
        if module in seen:
            return None
        names = self.names(module)
        node = names.get(name)
        if node is None and self.is_module(f"{module}.{name}"):
            return Symbol(f"{module}.{name}", "", None)
        if node is None:
            for star in (n for key, n in names.items() if key.startswith("*")):
                target = self.absolute(module, star)
                if target and (found := self.in_module(target, name, seen | {module})):
                    return found
            return External(f"{module}.{name}") if "__getattr__" in names else None
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            leads = imported(node, name, lambda relative: self.absolute(module, relative))
            return self.find(leads) if leads else None
        return Symbol(module, name, node)

    def absolute(self, module: str, node: ast.AST) -> str:
        """The module that a ``from`` import names."""
        if not isinstance(node, ast.ImportFrom):
            return ""
        if not node.level:
            return node.module or ""
        path = self.path(module)
        package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{node.module}" if node.module else package

    def class_of(self, symbol: Symbol | External | None) -> Class | None:
        """The class that a symbol is, or is an instance of by its assignment."""
        if not isinstance(symbol, Symbol):
            return None
        node = symbol.node
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            called = dotted_of(node.value.func)
            return self.class_of(self._chain(symbol.module, called)) if called else None
        if not isinstance(node, ast.ClassDef):
            return None
        if (known := self._classes.get(symbol.dotted)) is None:
            bases: list[Symbol | External] = []
            for base in node.bases:
                name = dotted_of(base.value if isinstance(base, ast.Subscript) else base)
                found = self._chain(symbol.module, name) if name else None
                bases.append(found or External(name or "unknown"))
            known = Class(symbol, _members(node), bases)
            self._classes[symbol.dotted] = known
            known.order = [known, *_merged([self._order(base) for base in bases])]
        return known

    def _order(self, base: Symbol | External) -> list[Class | External]:
        cls = self.class_of(base)
        if cls is not None:
            return cls.order
        return [base if isinstance(base, External) else External(base.dotted)]

    def _chain(self, module: str, dotted: str) -> Symbol | External | None:
        first, *rest = dotted.split(".")
        found = self.in_module(module, first)
        if found is None and hasattr(builtins, first):
            found = External(f"builtins.{first}")
        for part in rest:
            found = self._inside(found, part)
        return found

    def member(self, cls: Class, name: str, after: Class | None = None) -> Symbol | External | None:
        """What a class, or those it derives from, has by a name; `after`: of its order."""
        order = cls.order if after is None else cls.order[cls.order.index(after) + 1 :]
        for place in order:
            if isinstance(place, External):
                if _has(place.dotted, name):
                    return External(f"{place.dotted}.{name}")
            elif (node := place.members.get(name)) is not None:
                return Symbol(place.symbol.module, f"{place.symbol.name}.{name}", node)
            elif "__getattr__" in place.members:
                return External(f"{place.symbol.dotted}.{name}")
        return External(f"builtins.object.{name}") if hasattr(object, name) else None

    @cache  # noqa: B019 lives as long as the command
    def below(self, cls: Class, name: str) -> bool:
        """Whether a class that derives from this one, anywhere in its package, has a member."""
        package = cls.symbol.module.partition(".")[0]
        root = self.packages[package]
        line = re.compile(rf"^class (\w+)\(.*\b{cls.symbol.name}\b", re.MULTILINE)
        for path in root.rglob("*.py"):
            for heir in line.findall(path.read_text()):
                module = ".".join((package, *path.relative_to(root).with_suffix("").parts))
                found = self.class_of(self.in_module(module, heir))
                if found and cls in found.order and self.member(found, name):
                    return True
        return False

    def annotated(self, module: str, annotation: ast.expr | None) -> Class | None:
        """The class that an annotation names; of a union the one that is not None."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            sides = (annotation.left, annotation.right)
            known = [c for side in sides if (c := self.annotated(module, side)) is not None]
            others = [s for s in sides if not (isinstance(s, ast.Constant) and s.value is None)]
            return known[0] if len(others) == 1 and known else None
        if isinstance(annotation, ast.Subscript) and dotted_of(annotation.value) in (
            "Optional",
            "typing.Optional",
        ):
            annotation = annotation.slice
        name = dotted_of(annotation) if annotation is not None else None
        return self.class_of(self._chain(module, name)) if name else None


def dotted_of(node: ast.AST | None) -> str | None:
    """``a.b.c`` of such an expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted_of(node.value)):
        return f"{owner}.{node.attr}"
    return None


def imported(node: ast.AST, name: str, absolute: Callable[[ast.AST], str]) -> str | None:
    """The dotted name that an import binds to a name; `absolute`: the module of a ``from``."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if (alias.asname or alias.name.partition(".")[0]) == name:
                return alias.name if alias.asname else alias.name.partition(".")[0]
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return f"{absolute(node)}.{alias.name}"
    return None


def parameters(function: Function) -> list[ast.arg]:
    """All but ``*args`` and ``**kwargs``."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def misfit(function: Function, call: ast.Call, *, bound: bool) -> str | None:
    """Why a call does not fit a signature; None where it does, or cannot be told.

    bound: whether the first parameter is given by Python (self, cls).
    """
    arguments = function.args
    placed = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][bound:]
    named = {a.arg for a in arguments.kwonlyargs}
    needed = set(placed[: len(placed) - len(arguments.defaults)]) | {
        a.arg
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    }
    keywords = {k.arg for k in call.keywords if k.arg}
    spread = any(isinstance(a, ast.Starred) for a in call.args)
    if not arguments.kwarg and (unknown := keywords - set(placed) - named):
        return f"takes no {', '.join(sorted(unknown))}"
    if spread:
        return None
    if len(call.args) > len(placed) and not arguments.vararg:
        return f"takes {len(placed)} by position, {len(call.args)} are given"
    given = keywords | set(placed[: len(call.args)])
    if not any(k.arg is None for k in call.keywords) and (lacking := needed - given):
        return f"needs {', '.join(sorted(lacking))}"
    return None


def static(function: ast.AST) -> bool:
    """Whether a method is called without its object."""
    return any(dotted_of(d) == "staticmethod" for d in getattr(function, "decorator_list", ()))


def signature(function: Function) -> str:
    """What `hook.signature_of` says of the function, once it is imported."""
    given = function.args
    placed = [*given.posonlyargs, *given.args]
    plain = len(placed) - len(given.defaults)
    parts = [a.arg + "=" * (number >= plain) for number, a in enumerate(placed)]
    if any(dotted_of(d) == "classmethod" for d in function.decorator_list):
        del parts[0]
    if given.vararg:
        parts.append(f"*{given.vararg.arg}")
    for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parts.append(a.arg + "=" * (default is not None))
    if given.kwarg:
        parts.append(f"**{given.kwarg.arg}")
    return ", ".join(parts)


def of_scope(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements and expressions of a scope, without those of scopes inside it."""
    for node in body:
        yield node
        if not isinstance(node, _SCOPES):
            yield from _inner(node)


def _inner(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, _SCOPES):
            yield from _inner(child)


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        if node.names[0].name == "*":
            return [f"*{node.module}"]
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For, ast.NamedExpr)):
        targets = [node.target]
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def _members(node: ast.ClassDef) -> dict[str, ast.AST]:
    members: dict[str, ast.AST] = {}
    for statement in of_scope(node.body):
        for name in _bound(statement):
            if name not in members or isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
                members[name] = statement
    for method in [m for m in members.values() if isinstance(m, _FUNCTIONS)]:
        given = parameters(method)
        own = given[0].arg if given else ""
        for inner in ast.walk(method):
            target = inner.target if isinstance(inner, ast.AnnAssign) else inner
            if (
                isinstance(target, ast.Attribute)
                and isinstance(target.ctx, ast.Store)
                and dotted_of(target.value) == own
            ):
                members.setdefault(target.attr, inner)
    return members


def _merged(orders: list[list[Class | External]]) -> list[Class | External]:
    """Python's order of method resolution below a class; external bases come last."""
    outside = [c for order in orders for c in order if isinstance(c, External)]
    left = [[c for c in order if isinstance(c, Class)] for order in orders]
    # A class's bases stand in their order too.
    left.append([order[0] for order in left if order])
    merged: list[Class | External] = []
    while left := [order for order in left if order]:
        first = next(
            (o[0] for o in left if not any(o[0] in other[1:] for other in left)), left[0][0]
        )
        merged.append(first)
        left = [[c for c in order if c is not first] for order in left]
    return [*merged, *outside]


def _has(dotted: str, name: str) -> bool:
    try:
        return hasattr(pkgutil.resolve_name(dotted), name)
    except (ImportError, AttributeError, ValueError):
        return True  # not installed: it cannot be told
