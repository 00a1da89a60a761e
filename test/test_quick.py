"""What `./dev check` runs: whole files that say so in one line, and that start nothing.

They import nothing that starts a server or ranks, themselves or through a helper of the tests.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

TESTS = Path(__file__).parent
LINE = re.compile(r"^pytestmark = pytest\.mark\.quick$", re.MULTILINE)
#: What starts servers and ranks: names to import, and a method of `srt.fresh.Fresh`.
STARTS = {"Server", "run_ranks", "World", "serve", "scheduler_of", "launch_server"}
METHODS = {"ranks"}


def quick() -> list[Path]:
    return [path for path in sorted(TESTS.rglob("test_*.py")) if LINE.search(path.read_text())]


@cache
def starts(path: Path) -> frozenset[str]:
    """What a file of the tests uses to start servers or ranks, also through files it imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found |= names & STARTS
            for helper in helpers(node.module or "", names):
                found |= starts(helper)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found |= {node.func.attr} & METHODS
    return frozenset(found)


def helpers(module: str, names: set[str]) -> Iterator[Path]:
    """Files of the tests that ``from module import names`` reads."""
    for name in (module, *(f"{module}.{name}" for name in names)):
        path = TESTS.joinpath(*name.split(".")).with_suffix(".py")
        if path.exists():
            yield path


@pytest.mark.parametrize("path", quick(), ids=lambda path: path.stem)
def test_starts_nothing(path: Path) -> None:
    assert not starts(path)


def test_what_starts_something_is_seen() -> None:
    for name, use in {
        "srt/test_end_to_end.py": "Server",
        "srt/disaggregation/test_mooncake.py": "scheduler_of",  # by a helper
        "srt/distributed/test_all_to_all.py": "run_ranks",
        "srt/models/test_replicas.py": "ranks",
    }.items():
        assert use in starts(TESTS / name)


def test_command_finds_every_file() -> None:
    """`./dev check` looks for the line with grep."""
    script = (TESTS.parent / "dev").read_text()
    command = next(line for line in script.splitlines() if "grep -rl" in line)
    grep = command[command.index("grep") : command.rindex(")")]
    found = subprocess.check_output(grep, shell=True, cwd=TESTS.parent, text=True)
    assert {TESTS.parent / name for name in found.split()} == set(quick())
    assert len(quick()) > 15


@pytest.mark.slow
def test_the_tests_of_a_file_share_a_process(tmp_path: Path) -> None:
    """So that a module's servers are started once, whatever pytest-xdist makes of its options."""
    script = (TESTS.parent / "dev").read_text()
    options = re.findall(r"-m pytest -n auto (--dist .*) \"\$@\"", script)
    assert len(options) == 1
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(
            "import os, pathlib, pytest\n"
            "@pytest.mark.parametrize('number', range(6))\n"
            "def test(number):\n"
            f"    with pathlib.Path('{name}').open('a') as said:\n"
            "        said.write(os.environ['PYTEST_XDIST_WORKER'] + '\\n')\n"
        )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *options[0].split()]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    said = [(tmp_path / name).read_text().split() for name in "ab"]
    assert [len(workers) for workers in said] == [6, 6]
    assert [len(set(workers)) for workers in said] == [1, 1]
