"""What the series borrows of SGLang beside its hooks: found, and missed where it is not there."""

import ast
from pathlib import Path

import pytest
from sglang_helix import contract, series
from sglang_helix.__main__ import main
from sglang_helix.contract import Contract
from sglang_helix.srt.compatibility.looked_at import (
    ARGUMENTS,
    ARGUMENTS_NOT_SEEN,
    VARIABLES,
    VARIABLES_NOT_SEEN,
    listed,
)

pytestmark = pytest.mark.quick

INSTALLED = contract.installed()

UPSTREAM = {
    "lib.py": """
        import torch
        class Base:
            size: int
            def __init__(self, size, *, name): self.size = size
            def attend(self, q, k, scale=1.0): self.seen = q
            @staticmethod
            def shared(a): ...
            @property
            def cache(self) -> "Cache": ...
        class Cache:
            def rows(self, of): ...
        class Kind:
            A = 1
        class Deeper(Base):
            def only_here(self): ...
        table = Base(1, name="x")
        if torch.cuda.is_available():
            def kernel(x, y, BLOCK): ...
        def of(x) -> Cache: ...
        def _private(x, *, y=1): ...
    """,
    "again.py": "from sglang.lib import _private as renamed\nfrom sglang.lib import *",
}

FITS = """
    from sglang.again import renamed, Kind
    from sglang.lib import Base, of, kernel, table
    from sglang import lib
    NAME = "sglang.lib"
    PLACE = f"{NAME}:Base.attend"
    class Mine(Base):
        def __init__(self): super().__init__(1, name="x")
        def attend(self, q, k, scale=1.0):
            self.own = super().attend(q, k, scale=2.0)
            return self.own, self.size, self.shared(1), self.cache.rows(of=1)
    def use(base: Base, cache: "lib.Cache | None") -> None:
        renamed(1, y=2), Kind.A, lib._private(1), of(1).rows(1), cache.rows(1)
        kernel[(1,)](1, 2, BLOCK=3, num_warps=4)
        base.only_here(), table.attend(1, 2), base.mark
        base.mark = 1
"""


def borrowed(tmp_path: Path, source: str, upstream: dict[str, str] = UPSTREAM) -> Contract:
    """A contract of one module with a little SGLang."""
    for package, files in (("sglang", upstream), ("mine", {"module.py": source})):
        (tmp_path / package).mkdir(exist_ok=True)
        for name, text in {"__init__.py": "", **files}.items():
            lines = text.strip("\n").split("\n")
            indent = len(lines[0]) - len(lines[0].lstrip())
            (tmp_path / package / name).write_text("\n".join(line[indent:] for line in lines))
    return Contract(tmp_path / "sglang", "mine", tmp_path / "mine")


def problems(found: Contract) -> list[str]:
    return [
        f"{use.symbol.removeprefix('sglang.')} {use.problem}" for use in found.uses() if use.problem
    ]


def test_what_fits(tmp_path: Path) -> None:
    found = borrowed(tmp_path, FITS)
    assert problems(found) == []
    symbols = {use.symbol.removeprefix("sglang.") for use in found.uses()}
    assert symbols >= {
        "again.renamed",
        "lib._private",
        "lib.Base.attend",
        "lib.Base.size",
        "lib.Base.cache",
        "lib.Base.only_here",
        "lib.Cache.rows",
        "lib.kernel",
        "again.Kind.A",
    }
    assert [symbol.dotted for symbol, _ in found.overrides()] == [
        "sglang.lib.Base.__init__",
        "sglang.lib.Base.attend",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("def _private", "def _renamed", "again.renamed does not exist"),
        ("def _private", "def _renamed", "lib._private does not exist"),
        ("A = 1", "B = 1", "again.Kind.A does not exist"),
        ("*, y=1", "*, z=1", "lib._private takes no y"),
        ("_private(x,", "_private(x, more,", "lib._private needs more"),
        ("size, *, name", "size, *, name, more", "lib.Base.__init__ needs more"),
        ("q, k, scale=1.0", "q, k, factor=1.0", "lib.Base.attend takes no scale"),
        (
            "q, k, scale=1.0",
            "q, k, scale=1.0, mask=None",
            "lib.Base.attend takes mask too, which the override does not",
        ),
        ("self.size = size", "self._size = size", ""),  # it is declared still
        ("rows(self, of)", "rows(self)", "lib.Cache.rows takes no of"),
        ("def rows", "def lines", "lib.Cache.rows does not exist"),
        ("x, y, BLOCK", "x, y, WIDTH", "lib.kernel takes no BLOCK"),
        ("def only_here", "def elsewhere", "lib.Base.only_here does not exist"),
        ("def attend", "def attention", "lib.Base.attend does not exist"),
    ],
)
def test_what_does_not(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in UPSTREAM["lib.py"]
    changed = {**UPSTREAM, "lib.py": UPSTREAM["lib.py"].replace(old, new)}
    found = problems(borrowed(tmp_path, FITS, changed))
    assert said in found if said else found == []


def test_every_import_of_sglang_is_among_the_uses() -> None:
    """Found again, by the plainest reading of the source."""
    imported = {
        f"{node.module}.{alias.name}"
        for path in contract.HERE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang"
        for alias in node.names
    }
    assert len(imported) > 100
    assert imported <= {use.symbol for use in INSTALLED.uses()}


def test_installed_sglang_has_what_is_borrowed() -> None:
    assert [use for use in INSTALLED.uses() if use.problem] == []
    platform = contract.reference(INSTALLED)
    assert platform is not None
    assert [use for use in platform.uses() if use.problem] == []
    assert len(platform.uses()) > 50


def test_bodies_are_as_they_were_read() -> None:
    said = "once they are read: python -m sglang_helix series --record"
    assert contract.changed(INSTALLED) == [], said


def test_bodies_of_hooks_and_overrides_are_read() -> None:
    bodies = INSTALLED.bodies()
    found = [INSTALLED.sources.find(h.target) for h in series.hooks() if "[" not in h.target]
    assert {symbol.dotted for symbol in found if symbol} <= set(bodies)
    factories = {name for name in bodies if ".attention_registry.create_" in name}
    assert len(factories) == len([h for h in series.hooks() if h.kind == "backend"])
    assert any("FlashAttentionBackend.forward_extend" in name for name in bodies)


def test_reading_says_what_importing_says() -> None:
    """`--sglang DIR` judges hooks by their source."""
    assert {h.target: INSTALLED.hook_problem(h) for h in series.hooks()} == {
        h.target: "" for h in series.hooks()
    }


def test_somebody_has_listed_every_argument_and_variable() -> None:
    assert INSTALLED.unlisted() == ([], []), "a row, or looked_at.py"


@pytest.mark.parametrize(
    ("reasons", "not_seen", "there"),
    [
        (ARGUMENTS, ARGUMENTS_NOT_SEEN, INSTALLED.arguments()),
        (VARIABLES, VARIABLES_NOT_SEEN, INSTALLED.environment()),
    ],
)
def test_listed_once_and_there(
    reasons: dict[str, str], not_seen: str, there: frozenset[str]
) -> None:
    names = listed(reasons, not_seen)
    assert len(names) == len(set(names))
    assert set(names) <= there


def test_an_argument_that_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "ARGUMENTS_NOT_SEEN", "language_only")
    arguments, _ = INSTALLED.unlisted()
    assert "kv_events_config" in arguments
    assert "language_only" not in arguments
    assert "tp_size" not in arguments  # the series asks


def test_an_argument_that_the_table_asks_for_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by running on 0.5.22, which lacks it: rows name arguments in strings."""
    present = INSTALLED.arguments() - {"enable_nvidia_megakernel"}
    monkeypatch.setattr(INSTALLED, "arguments", lambda: present)
    said = "enable_nvidia_megakernel is no argument or variable any more"
    assert contract.changed(INSTALLED) == [said]


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    was = contract.recorded()
    name = "sglang.srt.models.utils.enable_fused_set_kv_buffer"
    bodies = {**was["bodies"], name: "0", "sglang.gone": "1"}
    settings = [*was["settings"], "SGLANG_GONE"]  # asked by nobody here
    monkeypatch.setattr(contract, "recorded", lambda: {"bodies": bodies, "settings": settings})
    monkeypatch.setattr(series, "SERIES", series.SERIES[1:2])
    monkeypatch.setattr(contract, "installed", lambda: INSTALLED)
    assert main(["series"]) == 1
    out = capsys.readouterr().out
    assert f"DIFFERS: {name}" in out
    assert "DIFFERS: sglang.gone is not there" in out
    assert main(["series", "--sglang", str(INSTALLED.sources.packages["sglang"])]) == 1
