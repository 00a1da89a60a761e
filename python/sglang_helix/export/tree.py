"""A commit of a git checkout, its files in memory, and commits made on it without checking out."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sglang_helix.hook import SeriesError

#: Where SGLang's package is in its repository.
PACKAGE = "python/sglang"


def git(
    checkout: Path, *arguments: str, text: str | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run git in a checkout; what it prints. Raises SeriesError with its reason where it fails."""
    run = subprocess.run(
        ["git", "-C", str(checkout), *arguments],
        input=text,
        capture_output=True,
        check=False,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
    )
    if run.returncode:
        raise SeriesError(f"git {arguments[0]}: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


class Tree:
    """The files of HEAD, with what is written over them since the last commit.

    base: id of the commit that the first of ours is made on.
    """

    def __init__(self, checkout: Path) -> None:
        self._checkout = checkout
        self.base = self._parent = git(checkout, "rev-parse", "HEAD").strip()
        listed = git(checkout, "ls-tree", "-r", "--name-only", "-z", self.base)
        self._paths = set(listed.split("\0"))
        self._texts: dict[str, str] = {}
        self._written: set[str] = set()

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def described(self) -> str:
        """The commit in words: its tag, where it has one."""
        return git(self._checkout, "describe", "--tags", "--always", self.base).strip()

    def read(self, path: str) -> str:
        """Text of a file; raises SeriesError where it is not in the tree."""
        if path not in self._texts:
            self._texts[path] = git(self._checkout, "cat-file", "blob", f"{self.base}:{path}")
        return self._texts[path]

    def write(self, path: str, text: str) -> None:
        """Add a file, or put another text in its place, with the next commit."""
        self._texts[path] = text
        self._paths.add(path)
        self._written.add(path)

    def commit(self, message: str) -> str:
        """Commit what has been written, on the last commit; its id. No branch moves."""
        with tempfile.TemporaryDirectory() as scratch:
            env = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
            git(self._checkout, "read-tree", self._parent, env=env)
            entries = [
                f"100644 {self._blob(self._texts[path])}\t{path}\n"
                for path in sorted(self._written)
            ]
            git(self._checkout, "update-index", "--index-info", text="".join(entries), env=env)
            tree = git(self._checkout, "write-tree", env=env).strip()
        made = git(self._checkout, "commit-tree", tree, "-p", self._parent, text=message)
        self._written.clear()
        self._parent = made.strip()
        return self._parent

    def _blob(self, text: str) -> str:
        return git(self._checkout, "hash-object", "-w", "--stdin", text=text).strip()
