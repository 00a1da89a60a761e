"""What the series takes for granted of SGLang beside its hooks, and where an SGLang differs.

Three things: that what the series borrows is there and fits how it is used; that the bodies of what
it hooks, overrides or rests on are those that it was written against (`contract.json`, made by
``python -m sglang_helix series --record`` once every difference was read); and that somebody has
looked at every argument of a server and every environment variable
(`srt/compatibility/looked_at.py`).
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
from typing import Any

from sglang_helix.borrowed import Reader, Use, narrower
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
    Sources,
    Symbol,
    dotted_of,
    signature,
)

HERE = Path(__file__).parent
RECORD = HERE / "contract.json"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_FLAG = re.compile(r"--([\w-]+)")
_VARIABLE = re.compile(r"\bSGLANG_\w+")
_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
# What a captured decode graph prepares for itself rests on these: slots and requests of padding are
# zero where it reads them, in every replay, and it prepares before the model runs.
_RESTS_ON = (
    "sglang.srt.model_executor.cuda_graph_buffer_registry.build_decode_registry",
    f"{_RUNNER}.capture_one_shape",
    f"{_RUNNER}.load_batch",
)
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
            for use in Reader(self, module).read(tree)
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
                            problem = narrower(own, theirs.node)
                        where = f"{self.file(cls.symbol.module)}:{own.lineno}"
                        yield theirs, Use(theirs.dotted, where, problem)

    def bodies(self) -> dict[str, str]:
        """Hashes of the source of what the series hooks, overrides or rests on, by dotted name."""
        symbols: list[Symbol | External | None] = [symbol for symbol, _ in self.overrides()]
        for hook in hooks():
            module, _, key = hook.target.rstrip("]").partition("[")
            if key:
                symbols += self._entries(module.rpartition(".")[0], key)
            else:
                symbols.append(self.sources.find(hook.target))
        symbols += [self.sources.find(name) for name in _RESTS_ON]
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
        met = self.met()
        arguments = self.arguments() - met - set(listed(ARGUMENTS, ARGUMENTS_NOT_SEEN))
        variables = self.variables() - met - set(listed(VARIABLES, VARIABLES_NOT_SEEN))
        return sorted(arguments), sorted(variables)

    def not_seen(self) -> list[str]:
        """Arguments and variables that are listed as looked at by nobody, and that it has."""
        names = f"{ARGUMENTS_NOT_SEEN} {VARIABLES_NOT_SEEN}".split()
        return sorted(set(names) & (self.arguments() | self.variables()) - self.met())

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
    def met(self) -> set[str]:
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

    def file(self, module: str) -> str:
        """Where a module of the series is."""
        return str(self.modules[module].relative_to(self.modules[self.package].parent))


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


def reference(contract: Contract) -> Contract | None:
    """The CPU reference platform beside the same SGLang, where it is installed."""
    name = "sglang_cpu_reference"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    return Contract(contract.sources.packages["sglang"], name, Path(spec.origin).parent)


def recorded() -> dict[str, Any]:
    """`bodies`: hashes by name; `settings`: arguments and variables; of SGLang as it was read."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def changed(contract: Contract) -> list[str]:
    """What became of the recorded bodies, and settings that the series asks for; a line each."""
    was, now = recorded()["bodies"], contract.bodies()
    lines = [
        f"{name} is not there"
        if name not in now
        else f"{name} has not been read"
        if name not in was
        else f"{name} is not as it was read"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    asked = set(recorded()["settings"]) & contract.met()
    gone = asked - contract.arguments() - contract.environment()
    return lines + [f"{name} is no argument or variable any more" for name in sorted(gone)]


def record(contract: Contract) -> None:
    """Write down SGLang as it stands: it has been read."""
    settings = sorted(contract.arguments() | contract.environment())
    found = {"bodies": contract.bodies(), "settings": settings}
    RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
