"""SGLang's tree with the series in it, in an environment where the plugin is not installed.

A checkout is a git repository made of the installed package. An environment is all that is
installed but SGLang, the plugin and the CPU platform; SGLang is a tree's, and the platform is the
project's, told where modules are in that tree.
"""

import fcntl
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

from sglang_helix.__main__ import main
from sglang_helix.export.modules import Modules
from sglang_helix.export.tree import Tree, git

_TEST = Path(__file__).parents[2]
_PROJECT = _TEST.parent
_LEFT_OUT = ("sglang-", "sglang_helix", "sglang_cpu_reference", "__editable__")


class Exported(NamedTuple):
    """A checkout with the branch `helix`, its commits, files for ``git am``; to be read only."""

    checkout: Path
    commits: list[str]
    patches: Path


def exported_once(base: Path) -> Exported:
    """The export of a run of the tests: the first of its processes to ask makes it.

    base: this process's folder of temporary files.
    """
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    root.mkdir(exist_ok=True)
    checkout, patches, done = root / "sglang", root / "patches", root / "done"
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            repository(checkout)
            assert main(["export", str(checkout), "--format-patch", str(patches)]) == 0
            done.touch()
    commits = git(checkout, "rev-list", "--reverse", "HEAD..helix").split()
    return Exported(checkout, commits, patches)


@cache
def installed() -> Path:
    """Where distributions are installed; SGLang's is, under its own name."""
    return Path(str(distribution("sglang").locate_file("")))


def linked(source: Path, target: Path) -> None:
    """Copy a folder; by links, where both are on one file system: compiled modules stay valid."""

    def link(original: str, copy: str) -> None:
        try:
            os.link(original, copy)
        except OSError:
            shutil.copy2(original, copy)

    shutil.copytree(source, target, copy_function=link)


def repository(directory: Path) -> Path:
    """A git repository with the installed package where SGLang's own has it."""
    linked(installed() / "sglang", directory / "python" / "sglang")
    (directory / ".gitignore").write_text("__pycache__/\n_version.py\n*.so\n")
    git(directory, "init", "-q")
    for name in ("user.name", "user.email"):
        git(directory, "config", name, "nobody@example.org")
    git(directory, "add", "-A")
    git(directory, "commit", "-q", "-m", "The released package")
    return directory


def tree_at(checkout: Path, commit: str, directory: Path) -> Path:
    """The checkout as it is at a commit, in another folder; where to import SGLang from."""
    linked(installed() / "sglang", directory / "python" / "sglang")
    for name in git(checkout, "diff", "--name-only", "HEAD", commit).split():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(git(checkout, "cat-file", "blob", f"{commit}:{name}"))
    return directory / "python"


def environment(checkout: Path, directory: Path) -> Path:
    """A folder to import all else from."""
    directory.mkdir()
    for entry in installed().iterdir():
        if entry.name != "sglang" and not entry.name.startswith(_LEFT_OUT):
            (directory / entry.name).symlink_to(entry)
    metadata = f"sglang-{distribution('sglang').version}.dist-info"
    (directory / metadata).symlink_to(installed() / metadata)
    modules = Modules(Tree(checkout))
    platform = directory / "sglang_cpu_reference"
    source = _PROJECT / "python" / "sglang_cpu_reference"
    for file in source.rglob("*.py"):
        path = platform / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(modules.translated(file.read_text()))
    _metadata("sglang-cpu-reference", directory)
    return directory


def plugin_alone(directory: Path) -> Path:
    """A folder with the plugin as it is installed beside the released SGLang."""
    directory.mkdir()
    (directory / "sglang_helix").symlink_to(_PROJECT / "python" / "sglang_helix")
    _metadata("sglang-helix", directory)
    return directory


def _metadata(name: str, directory: Path) -> None:
    """What says that a distribution is installed in a folder, and its entry points."""
    found = distribution(name)
    folder = directory / f"{name.replace('-', '_')}-{found.version}.dist-info"
    folder.mkdir()
    for file in ("METADATA", "entry_points.txt"):
        (folder / file).write_text(found.read_text(file) or "")


def called_in(
    environment: Path, trees: Sequence[tuple[Path, list[tuple[Any, ...]]]], timeout: float = 900
) -> list[list[Any]]:
    """Outcomes of calls in SGLang processes of trees, a list a tree; see `srt.export.calls`."""
    run = subprocess.run(
        [sys.executable, "-S", "-m", "srt.export.calls"],
        input=pickle.dumps(trees),
        stdout=subprocess.PIPE,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PYTHONPATH": f"{environment}{os.pathsep}{_TEST}",
            "SGLANG_PLATFORM": "cpu_reference",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        timeout=timeout,
        check=True,
    )
    outcomes: list[list[Any]] = pickle.loads(run.stdout)
    return outcomes
