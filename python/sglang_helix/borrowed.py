"""How one module of the series uses SGLang: every import, call, attribute and name in a string.

Read scope by scope, as `upstream.py` looks things up; what a variable is follows from imports,
annotations and the calls that made it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from sglang_helix.upstream import (
    Class,
    External,
    Function,
    Symbol,
    dotted_of,
    imported,
    misfit,
    of_scope,
    parameters,
    static,
)

if TYPE_CHECKING:
    from sglang_helix.contract import Contract

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NAME = re.compile(r"sglang(\.\w+)+(:[\w.]+)?")
_LAUNCH = {"num_warps", "num_stages", "num_ctas"}  # what Triton takes beside a kernel's own


class Use(NamedTuple):
    """One place where the series uses SGLang; `problem` is empty where it fits."""

    symbol: str
    where: str
    problem: str = ""


class Reader:
    """Reads one module of the series, scope by scope."""

    def __init__(self, contract: Contract, module: str) -> None:
        self.contract, self.module, self.sources = contract, module, contract.sources

    def read(self, tree: ast.Module) -> Iterator[Use]:
        """Every use in the module, some of them twice."""
        yield from self._scope(tree.body, {}, {}, None)

    def _scope(
        self,
        body: list[ast.stmt],
        names: dict[str, str],
        types: dict[str, Class | None],
        cls: Class | None,
    ) -> Iterator[Use]:
        """names: what imports bind, dotted; types: classes of variables; cls: of `self`."""
        inside = list(of_scope(body))
        for node in inside:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    name = alias.asname or alias.name
                    dotted = imported(node, name, lambda n: self.sources.absolute(self.module, n))
                    if dotted:
                        names[name] = dotted
                        yield from self._use(dotted, node)
        known = _Names(self, names, types, cls)
        for node in inside:
            target: ast.expr | None = None
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, found = node.targets[0], known.type_of(node.value)
            elif isinstance(node, ast.AnnAssign):
                target, found = node.target, self.sources.annotated(self.module, node.annotation)
            if isinstance(target, ast.Name):
                types[target.id] = found
        for node in inside:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                yield from self._attribute(node, known)
            elif isinstance(node, ast.Call):
                yield from self._call(node, known)
            elif isinstance(node, ast.ClassDef):
                own = self.sources.class_of(self.sources.in_module(self.module, node.name))
                yield from self._scope(node.body, dict(names), dict(types), own)
            elif isinstance(node, _FUNCTIONS):
                yield from self._function(node, names, types, cls)
            elif isinstance(node, ast.Lambda):
                body = [ast.Expr(node.body)]
                yield from self._scope(body, dict(names), dict(types), cls)
            if isinstance(node, (ast.Constant, ast.JoinedStr)) and (
                text := _NAME.fullmatch(self._text(node))
            ):
                yield from self._use(text[0].replace(":", "."), node)

    def _function(
        self,
        node: Function,
        names: dict[str, str],
        types: dict[str, Class | None],
        cls: Class | None,
    ) -> Iterator[Use]:
        given = parameters(node)
        inner = {k: v for k, v in names.items() if k not in {a.arg for a in given}}
        known = dict(types)
        known.update({a.arg: self.sources.annotated(self.module, a.annotation) for a in given})
        if cls is not None and node in cls.members.values() and given and not static(node):
            known[given[0].arg] = cls
        outside = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        body = [*(ast.Expr(expression) for expression in outside), *node.body]
        yield from self._scope(body, inner, known, cls)

    def _use(self, dotted: str, node: ast.AST, problem: str = "") -> Iterator[Use]:
        if dotted.split(".")[0] == "sglang":
            if not problem and self.sources.find(dotted) is None:
                problem = "does not exist"
            yield Use(dotted, self._where(node), problem)

    def _where(self, node: ast.AST) -> str:
        return f"{self.contract.file(self.module)}:{getattr(node, 'lineno', 0)}"

    def _attribute(self, node: ast.Attribute, known: _Names) -> Iterator[Use]:
        if dotted := known.dotted(node):
            yield from self._use(dotted, node)
        elif found := known.members(node):
            there = [symbol for symbol in found if symbol is not None]
            for symbol in there:
                if isinstance(symbol, Symbol):
                    yield from self._use(symbol.dotted, node)
            if not there and node.attr not in self.contract.kept:
                owner = known.type_of(node.value) or known.cls
                assert owner is not None
                name = f"{owner.symbol.dotted}.{node.attr}"
                if name.startswith("sglang.srt.server_args.ServerArgs."):
                    there_after_all = node.attr in self.contract.arguments()
                else:
                    there_after_all = self.sources.below(owner, node.attr)
                problem = "" if there_after_all else "does not exist"
                yield Use(name, self._where(node), problem)

    def _call(self, node: ast.Call, known: _Names) -> Iterator[Use]:
        kernel = isinstance(node.func, ast.Subscript)
        func = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        dotted = known.dotted(func)
        bound = not dotted
        if dotted:
            found = [self.sources.find(dotted)]
            owner = self.sources.find(dotted.rpartition(".")[0])
            # Of an object that a module holds.
            bound = isinstance(owner, Symbol) and isinstance(
                owner.node, (ast.Assign, ast.AnnAssign)
            )
        else:
            found = list(known.members(func)) if isinstance(func, ast.Attribute) else []
        problems: list[tuple[Symbol, str | None]] = []
        for symbol in found:
            if not isinstance(symbol, Symbol) or not symbol.module.startswith("sglang."):
                continue
            asked = node
            if kernel:
                own = [k for k in node.keywords if k.arg not in _LAUNCH]
                asked = ast.Call(node.func, node.args, own)
            if isinstance(symbol.node, _FUNCTIONS):
                by_class = not bound and any(
                    dotted_of(d) == "classmethod" for d in symbol.node.decorator_list
                )
                takes_self = (bound and not static(symbol.node)) or by_class
                problems.append((symbol, misfit(symbol.node, asked, bound=takes_self)))
            elif isinstance(symbol.node, ast.ClassDef) and not bound:
                problems.append((symbol, self._constructor(symbol, asked)))
        # Of a mixin's several upstream classes a call must fit each.
        for symbol, problem in problems:
            if problem:
                yield from self._use(symbol.dotted, node, problem)

    def _constructor(self, symbol: Symbol, call: ast.Call) -> str | None:
        cls = self.sources.class_of(symbol)
        assert cls is not None
        init = self.sources.member(cls, "__init__")
        if isinstance(init, Symbol) and isinstance(init.node, _FUNCTIONS):
            return misfit(init.node, call, bound=True)
        fields = {name for part in cls.order if isinstance(part, Class) for name in part.members}
        unknown = {keyword.arg for keyword in call.keywords if keyword.arg} - fields
        return f"takes no {', '.join(sorted(unknown))}" if unknown else None

    def _text(self, node: ast.Constant | ast.JoinedStr) -> str:
        """A string, with constants of the module put into its braces."""
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = ""
        for part in parts:
            constant: ast.AST | None = part
            if isinstance(part, ast.FormattedValue):
                bound = self.sources.names(self.module).get(dotted_of(part.value) or "")
                constant = getattr(bound, "value", None)
            if not isinstance(constant, ast.Constant) or not isinstance(constant.value, str):
                return ""
            text += constant.value
        return text


class _Names:
    """What names of a scope stand for."""

    def __init__(
        self,
        reader: Reader,
        names: dict[str, str],
        types: dict[str, Class | None],
        cls: Class | None,
    ) -> None:
        self.reader, self.names, self.types, self.cls = reader, names, types, cls

    def dotted(self, node: ast.expr) -> str | None:
        """The dotted name of what imports lead to."""
        chain = dotted_of(node)
        if chain is None:
            return None
        first, dot, rest = chain.partition(".")
        return f"{self.names[first]}{dot}{rest}" if first in self.names else None

    def type_of(self, node: ast.expr) -> Class | None:
        """The class of an expression, where it is known."""
        sources = self.reader.sources
        if isinstance(node, ast.Name) and node.id in self.types:
            return self.types[node.id]
        if isinstance(node, ast.Call):
            called = self.dotted(node.func)
            found = sources.find(called) if called else None
            if isinstance(found, Symbol) and isinstance(found.node, _FUNCTIONS):
                return sources.annotated(found.module, found.node.returns)
            if isinstance(found, Symbol) and isinstance(found.node, ast.ClassDef):
                return sources.class_of(found)
            return None
        if dotted := self.dotted(node):
            found = sources.find(dotted)
            is_class = isinstance(found, Symbol) and isinstance(found.node, ast.ClassDef)
            return None if is_class else sources.class_of(found)
        if isinstance(node, ast.Attribute) and (owner := self.type_of(node.value)):
            member = sources.member(owner, node.attr)
            if isinstance(member, Symbol):
                annotation = getattr(member.node, "annotation", None)
                annotation = annotation or getattr(member.node, "returns", None)
                return sources.annotated(member.module, annotation)
        return None

    def members(self, node: ast.Attribute) -> list[Symbol | External | None]:
        """What ``x.name`` may be: of `self` in each class that derives; empty: not known."""
        sources, contract = self.reader.sources, self.reader.contract
        value = node.value
        if isinstance(value, ast.Call) and dotted_of(value.func) == "super" and self.cls:
            heirs = contract.heirs(self.cls)
            return [sources.member(heir, node.attr, after=self.cls) for heir in heirs]
        owner = self.type_of(value)
        if owner is None:
            return []
        if owner in contract.classes:
            return [sources.member(heir, node.attr) for heir in contract.heirs(owner)]
        return [sources.member(owner, node.attr)]


def narrower(own: Function, theirs: Function) -> str:
    """Which parameters of a method its override would not take."""
    if own.args.kwarg:
        return ""
    names = {a.arg for a in parameters(own)}
    lacking = [a.arg for a in parameters(theirs)[1:] if a.arg not in names]
    if own.args.vararg:
        lacking = [name for name in lacking if name in {a.arg for a in theirs.args.kwonlyargs}]
    return f"takes {', '.join(lacking)} too, which the override does not" if lacking else ""
