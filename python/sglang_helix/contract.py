"""What the series takes for granted of SGLang beside its hooks, and where an SGLang differs.

Three things: that what the series borrows is there and fits how it is used; that the bodies of what
it hooks or overrides are those that it was written against (`contract.json`, made by ``python -m
sglang_helix series --record`` once every difference was read); and that somebody has looked at
every argument of a server and every environment variable (`srt/compatibility/looked_at.py`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sglang_helix.hook import Hook, SeriesError
from sglang_helix.series import hooks
from sglang_helix.srt.compatibility.looked_at import (
    ARGUMENTS,
    ARGUMENTS_NOT_SEEN,
    VARIABLES,
    VARIABLES_NOT_SEEN,
    listed,
)
from sglang_helix.upstream import (
    Class,
    External,
    Function,
    Sources,
    Symbol,
    dotted_of,
    imported,
    misfit,
    of_scope,
    parameters,
    signature,
    static,
)

HERE = Path(__file__).parent
RECORD = HERE / "contract.json"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_FLAG = re.compile(r"--([\w-]+)")
_VARIABLE = re.compile(r"\bSGLANG_\w+")
# Modules of the series that ask about arguments, also by their names in strings.
_ASK = (
    "build",
    "check",
    "srt.arg_groups",
    "srt.compatibility",
    "srt.distributed.agreement",
    "srt.entrypoints",
    "srt.server_args",
)
_NAME = re.compile(r"sglang(\.\w+)+(:[\w.]+)?")
_LAUNCH = {"num_warps", "num_stages", "num_ctas"}  # what Triton takes beside a kernel's own


class Use(NamedTuple):
    """One place where the series uses SGLang; `problem` is empty where it fits."""

    symbol: str
    where: str
    problem: str = ""


class Contract:
    """The series' source beside that of an SGLang.

    Args:
        sglang: the directory of the package `sglang`.
        package: the package that borrows, and `root` its directory.
    """

    def __init__(self, sglang: Path, package: str = "sglang_helix", root: Path = HERE) -> None:
        self.sources = Sources({"sglang": sglang, package: root})
        self.package = package
        self.modules = {
            ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(
                ".__init__"
            ): path
            for path in sorted(root.rglob("*.py"))
        }
        self.trees = {name: self.sources.tree(name) for name in self.modules}
        self.classes = [
            cls
            for module in self.modules
            for node in self.sources.names(module).values()
            if isinstance(node, ast.ClassDef)
            and (cls := self.sources.class_of(Symbol(module, node.name, node)))
        ]
        # What the series keeps on objects of SGLang's is its own.
        self.kept = {
            node.attr
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }

    def heirs(self, cls: Class) -> list[Class]:
        """A class of the series and those that derive from it."""
        return [heir for heir in self.classes if cls in heir.order]

    @cache  # noqa: B019 lives as long as the command
    def uses(self) -> list[Use]:
        """Every use of SGLang in the package, without the targets of hooks."""
        found = {
            use
            for module, tree in self.trees.items()
            if module != f"{self.package}.series"
            for use in _Reader(self, module).read(tree)
        }
        return sorted(found | {use for _, use in self.overrides()})

    def overrides(self) -> Iterator[tuple[Symbol, Use]]:
        """Methods of SGLang's classes that classes of the series define anew."""
        for cls in self.classes:
            for name, own in cls.members.items():
                if not isinstance(own, _FUNCTIONS):
                    continue
                for heir in self.heirs(cls):
                    theirs = self.sources.member(heir, name, after=cls)
                    if isinstance(theirs, Symbol) and theirs.module.startswith("sglang."):
                        problem = ""
                        if isinstance(theirs.node, _FUNCTIONS) and name != "__init__":
                            problem = _narrower(own, theirs.node)
                        where = f"{self._file(cls.symbol.module)}:{own.lineno}"
                        yield theirs, Use(theirs.dotted, where, problem)

    def bodies(self) -> dict[str, str]:
        """Hashes of the source of what the series hooks or overrides, by dotted name."""
        symbols: list[Symbol | External | None] = [symbol for symbol, _ in self.overrides()]
        for hook in hooks():
            module, _, key = hook.target.rstrip("]").partition("[")
            if key:
                symbols += self._entries(module.rpartition(".")[0], key)
            else:
                symbols.append(self.sources.find(hook.target))
        return {
            symbol.dotted: hashlib.sha256(self.sources.body(symbol).encode()).hexdigest()[:16]
            for symbol in symbols
            if isinstance(symbol, Symbol) and symbol.node is not None
        }

    @cache  # noqa: B019
    def arguments(self) -> frozenset[str]:
        """Names of the fields of SGLang's server arguments."""
        folder = self.sources.packages["sglang"] / "srt/arg_groups/fields"
        names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        modules = [f"sglang.srt.arg_groups.fields.{name}" for name in sorted(names)]
        return frozenset(
            name
            for module in (*modules, "sglang.srt.server_args")
            for node in self.sources.names(module).values()
            if isinstance(node, ast.ClassDef) and (module in modules or node.name == "ServerArgs")
            for name in _fields(node)
        )

    def environment(self) -> set[str]:
        """Names of SGLang's environment variables."""
        cls = self.sources.class_of(self.sources.find("sglang.srt.environ.Envs"))
        return {name for name in cls.members if name.isupper()} if cls else set()

    def unlisted(self) -> tuple[list[str], list[str]]:
        """Arguments and environment variables that nobody has listed: new, most likely."""
        met = self._met()
        arguments = self.arguments() - met - set(listed(ARGUMENTS, ARGUMENTS_NOT_SEEN))
        variables = self.variables() - met - set(listed(VARIABLES, VARIABLES_NOT_SEEN))
        return sorted(arguments), sorted(variables)

    def not_seen(self) -> list[str]:
        """Arguments and variables that are listed as looked at by nobody, and that it has."""
        names = f"{ARGUMENTS_NOT_SEEN} {VARIABLES_NOT_SEEN}".split()
        return sorted(set(names) & (self.arguments() | self.variables()) - self._met())

    def variables(self) -> set[str]:
        """Environment variables that SGLang reads in modules which the series touches."""
        touched = {
            path
            for name in {use.symbol for use in self.uses()} | {hook.target for hook in hooks()}
            if isinstance(symbol := self.sources.find(name.partition("[")[0]), Symbol)
            and (path := self.sources.path(symbol.module))
            and symbol.module != "sglang.srt.environ"
        }
        texts = (path.read_text() for path in touched)
        return {name for text in texts for name in _VARIABLE.findall(text)} & self.environment()

    @cache  # noqa: B019
    def _met(self) -> set[str]:
        """Arguments and variables that the series' own code asks about."""
        met: set[str] = set()
        for module, tree in self.trees.items():
            near = module.removeprefix(f"{self.package}.").startswith(_ASK)
            if module.endswith(".looked_at"):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    of = node.value.func if isinstance(node.value, ast.Call) else node.value
                    named = (dotted_of(of) or "").rpartition(".")[2]
                    if near or named in ("server_args", "args", "envs") or named.startswith("get_"):
                        met.add(node.attr)
                elif near and isinstance(node, ast.Constant) and isinstance(node.value, str):
                    flags = (flag.replace("-", "_") for flag in _FLAG.findall(node.value))
                    met.update((node.value, *flags))
        return met

    def hook_problem(self, hook: Hook) -> str:
        """What `Hook.check` says, without importing the target; empty where it fits."""
        module, _, key = hook.target.rstrip("]").partition("[")
        if key:
            entry = next(iter(self._entries(module.rpartition(".")[0], key)), None)
            found: Symbol | External | None = entry
        else:
            found = self.sources.find(hook.target)
        if found is None:
            return "does not exist"
        node = found.node if isinstance(found, Symbol) else None
        takes = signature(node) if isinstance(node, _FUNCTIONS) else ""
        if takes != hook.signature:
            return f"takes ({takes}), expected ({hook.signature})"
        return ""

    def _entries(self, module: str, key: str) -> Iterator[Symbol]:
        """Functions that a decorator enters into a table of their module by this key."""
        for name, node in self.sources.names(module).items():
            for decorator in getattr(node, "decorator_list", ()):
                given = decorator.args if isinstance(decorator, ast.Call) else []
                if any(isinstance(a, ast.Constant) and a.value == key for a in given):
                    yield Symbol(module, name, node)

    def _file(self, module: str) -> str:
        return str(self.modules[module].relative_to(self.modules[self.package].parent))


class _Reader:
    """Reads one module of the series, scope by scope."""

    def __init__(self, contract: Contract, module: str) -> None:
        self.contract, self.module, self.sources = contract, module, contract.sources

    def read(self, tree: ast.Module) -> Iterator[Use]:
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
        return f"{self.contract._file(self.module)}:{getattr(node, 'lineno', 0)}"

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
        reader: _Reader,
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


def _narrower(own: Function, theirs: Function) -> str:
    """Which parameters of a method its override would not take."""
    if own.args.kwarg:
        return ""
    names = {a.arg for a in parameters(own)}
    lacking = [a.arg for a in parameters(theirs)[1:] if a.arg not in names]
    if own.args.vararg:
        lacking = [name for name in lacking if name in {a.arg for a in theirs.args.kwonlyargs}]
    return f"takes {', '.join(lacking)} too, which the override does not" if lacking else ""


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and "ClassVar" not in ast.unparse(statement.annotation)
        ):
            yield statement.target.id


@cache
def installed() -> Contract:
    """The series beside the SGLang of this environment."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise SeriesError("sglang is not installed")
    return Contract(Path(next(iter(spec.submodule_search_locations))))


def recorded() -> dict[str, str]:
    """Hashes of the bodies that the series was written against."""
    found: dict[str, str] = json.loads(RECORD.read_text())
    return found


def changed(now: dict[str, str]) -> list[str]:
    """What became of the recorded bodies; a line each."""
    was = recorded()
    return [
        f"{name} is not there"
        if name not in now
        else f"{name} has not been read"
        if name not in was
        else f"{name} is not as it was read"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]


def record(now: dict[str, str]) -> None:
    """Write down the bodies as they stand: they have been read."""
    RECORD.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
