"""The series as commits on SGLang's own tree, made at the user's place from series.py and hooks/.

One commit a patch, in order. Each adds the modules of `srt` that its hooks import, under the paths
that they mirror, and at every hooked symbol added lines: no line of upstream is changed or removed.
Nothing is checked out and no file of the user is touched: commits are made of objects, and the
branch appears when the last of them stands.
"""

from __future__ import annotations

import shutil
import tempfile
import textwrap
from pathlib import Path

from sglang_helix.contract import Contract
from sglang_helix.export.hooked import add_field, add_hook
from sglang_helix.export.modules import IN_TREE, Modules, lands_in_tree
from sglang_helix.export.tests import Tests
from sglang_helix.export.tree import PACKAGE, Tree, git
from sglang_helix.hook import SUPPORTED_SGLANG, Hook, Patch, SeriesError
from sglang_helix.series import SERIES


def export(checkout: Path, branch: str, patches: Path | None = None) -> list[str]:
    """Make the commits on what is checked out; their ids, in order.

    Args:
        checkout: a clean git checkout of SGLang. It stays as it is, on its own branch.
        branch: the branch to make.
        patches: a directory for `git am` files, which must have none yet; None: none are written.

    Raises:
        SeriesError: nothing was made, and why.
    """
    refuse(checkout, branch, patches)
    tree = Tree(checkout)
    if problems := differences(checkout / PACKAGE):
        raise SeriesError(
            f"{checkout} ({tree.described()}) is not a SGLang that the series fits, which was made "
            f"for {' or '.join(SUPPORTED_SGLANG)}: {'; '.join(problems)}"
        )
    modules = Modules(tree)
    tests = Tests(modules)
    commits = []
    for number, patch in enumerate(SERIES, 1):
        add(tree, modules, patch)
        for path, text in tests.landing().items():
            tree.write(path, text)
        commits.append(tree.commit(message(patch, number)))
    with tempfile.TemporaryDirectory() as scratch:
        if patches is not None:
            git(checkout, "format-patch", "-q", "-o", scratch, f"{tree.base}..{commits[-1]}")
        # The old value of nothing: only a branch that does not exist yet.
        git(checkout, "update-ref", f"refs/heads/{branch}", commits[-1], "0" * 40)
        if patches is not None:
            patches.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(scratch).iterdir()):
                shutil.copy(file, patches)
    return commits


def refuse(checkout: Path, branch: str, patches: Path | None) -> None:
    """Raise SeriesError where the export must not begin."""
    if not checkout.is_dir():
        raise SeriesError(f"{checkout} is not a directory: give a git checkout of SGLang")
    top = Path(git(checkout, "rev-parse", "--show-toplevel").strip())
    if top != checkout.resolve():
        raise SeriesError(f"{checkout} is inside the checkout {top}: give that")
    git(checkout, "check-ref-format", "--branch", branch)
    tree = Tree(checkout)
    if IN_TREE in tree:
        raise SeriesError(
            f"{checkout} has the series already ({IN_TREE}): check out what it was made on"
        )
    if f"{PACKAGE}/srt/server_args.py" not in tree:
        raise SeriesError(f"{checkout} is not a checkout of SGLang: it has no {PACKAGE}")
    if git(checkout, "for-each-ref", f"refs/heads/{branch}"):
        raise SeriesError(
            f"{checkout} has a branch {branch} already, of an earlier run: delete it, or name "
            "another with --branch"
        )
    if changed := git(checkout, "status", "--porcelain").splitlines():
        raise SeriesError(
            f"{checkout} is not clean ({len(changed)} paths, {changed[0][3:]} first): commit or "
            "remove what has changed"
        )
    if patches is not None and (patches.is_file() or any(patches.glob("*.patch"))):
        raise SeriesError(f"--format-patch {patches} has patches already: give an empty directory")


def differences(sglang: Path) -> list[str]:
    """What hooked symbols of a package are not as the series declares them; empty where it fits."""
    contract = Contract(sglang)
    hooks = (hook for patch in SERIES for hook in patch.hooks if lands_in_tree(hook))
    return [
        f"{hook.target} {problem}" for hook in hooks if (problem := contract.hook_problem(hook))
    ]


def add(tree: Tree, modules: Modules, patch: Patch) -> None:
    """Add a patch to the tree: its modules, its fields and a line or two for each hook."""
    for path, text in modules.of(patch).items():
        tree.write(path, text)
    for field in patch.fields:
        add_field(tree, field)
    for hook in patch.hooks:
        if lands_in_tree(hook):
            add_hook(tree, hook, modules.in_tree(hook.impl))


def message(patch: Patch, number: int) -> str:
    """The commit's message: what the patch is, and the catalogue entry of every hook."""
    subject = patch.summary.partition(":")[0].partition(",")[0]
    subject = textwrap.shorten(f"[dcp] {patch.name}: {subject}", 72, placeholder=" ...")
    parts = [subject, _wrapped(f"{patch.summary}.")]
    if len(SERIES) > 1:
        parts.append(f"Patch {number} of {len(SERIES)} of sglang-helix.")
    parts += [_wrapped(f"{field.flags[-1]}: {field.help}") for field in patch.fields]
    parts += [_entry(hook) for hook in patch.hooks if lands_in_tree(hook)]
    return "\n\n".join(parts) + "\n"


def _entry(hook: Hook) -> str:
    lines = [f"{hook.target.removeprefix('sglang.srt.')} ({hook.kind})"]
    lines += [
        _wrapped(f"{name}: {getattr(hook, name)}", "  ")
        for name in ("why", "how", "upstream", "until")
    ]
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        72,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
