"""``python -m sglang_helix export``: commits that only add, from a package to a git repository."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn
from sglang.test.ci.ci_register import collect_tests
from sglang_helix import export, series
from sglang_helix.__main__ import main
from sglang_helix.export import in_tree
from sglang_helix.export.modules import lands_in_tree
from sglang_helix.export.tree import Tree, git
from sglang_helix.hook import Hook, SeriesError
from srt.export.exported import Exported, exported_once

_SRT = Path(export.__file__).parents[1] / "srt"
_NAMES = re.compile(r"(?<!torch\.ops\.)\bsglang_helix\.\w+")
# What the plugin is hooked in by, and needs no more in the tree.
_MACHINERY = re.compile(r"entry_points|SUPPORTED_SGLANG|HookRegistry|_patched")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_once(tmp_path_factory.getbasetemp())


@pytest.fixture
def checkout(exported: Exported, tmp_path: Path) -> Path:
    """A clean copy of the checkout without the series."""
    copy = tmp_path / "sglang"
    subprocess.run(["git", "clone", "-q", str(exported.checkout), str(copy)], check=True)
    for name in ("user.name", "user.email"):
        git(copy, "config", name, "nobody@example.org")
    return copy


def state(checkout: Path) -> tuple[str, ...]:
    """All that an export that was refused must leave as it is."""
    return (
        git(checkout, "for-each-ref"),
        git(checkout, "status", "--porcelain"),
        git(checkout, "rev-parse", "HEAD"),
        git(checkout, "worktree", "list"),
    )


def test_one_commit_a_patch_with_the_catalogue_for_a_message(exported: Exported) -> None:
    assert len(exported.commits) == len(series.SERIES)
    for patch, commit in zip(series.SERIES, exported.commits, strict=True):
        message = git(exported.checkout, "log", "-1", "--format=%B", commit)
        subject = message.splitlines()[0]
        assert subject.startswith(f"[dcp] {patch.name}: {patch.summary.split()[0]}")
        assert len(subject) <= 72
        words = " ".join(message.split())
        assert f"{patch.summary}." in words
        for hook in filter(lands_in_tree, patch.hooks):
            assert hook.target.removeprefix("sglang.srt.") in words
            for name in ("why", "how", "upstream", "until"):
                assert f"{name}: {getattr(hook, name)}" in words


def test_no_line_of_upstream_is_changed_or_removed(exported: Exported) -> None:
    counted = git(exported.checkout, "diff", "--numstat", "HEAD", "helix").splitlines()
    assert counted
    assert [line for line in counted if line.split()[1] != "0"] == []
    for before, after in zip(["HEAD", *exported.commits], exported.commits, strict=False):
        kinds = git(exported.checkout, "diff", "--name-status", before, after)
        assert {line[0] for line in kinds.splitlines()} <= {"A", "M"}


def added(exported: Exported, commit: str, path: str) -> str:
    """Lines that a commit adds to a file."""
    shown = git(exported.checkout, "show", "--format=", "-U0", commit, "--", path)
    lines = [line[1:] for line in shown.splitlines() if line.startswith("+")]
    return "\n".join(line for line in lines if not line.startswith("++"))


def test_each_hook_has_its_lines_in_the_file_of_its_symbol(exported: Exported) -> None:
    for patch, commit in zip(series.SERIES, exported.commits, strict=True):
        hooks = [hook for hook in patch.hooks if lands_in_tree(hook)]
        changed = git(exported.checkout, "diff", "--name-status", f"{commit}^", commit)
        files = [line[2:] for line in changed.splitlines() if line.startswith("M")]
        lines = "\n".join(added(exported, commit, file) for file in files)
        assert len(re.findall(r"\bhelix\.[a-z]+\(", lines)) == len(hooks)
        for hook in hooks:
            module = hook.target.partition("[")[0].removeprefix("sglang.").split(".")
            mine = [f for f in files if f.removesuffix(".py").split("/")[2:] == module[:-1]] or [
                f for f in files if f.removesuffix(".py").split("/")[2:] == module[:-2]
            ]
            (file,) = mine
            text = added(exported, commit, file)
            assert f"helix.{hook.kind}(" in text
            assert f":{hook.impl.partition(':')[2]}" in text
            assert (hook.stage == "launch") <= ("stage=" not in text or len(hooks) > 1)
        for field in patch.fields:
            text = added(exported, commit, "python/sglang/srt/arg_groups/fields/parallel.py")
            assert f"    {field.name}: A[" in text
            assert all(flag in text for flag in field.flags[1:])


def sources(exported: Exported, commit: str) -> Iterator[tuple[str, str]]:
    """New modules of the tree at a commit: path and text."""
    listed = git(exported.checkout, "diff", "--diff-filter=A", "--name-only", "HEAD", commit)
    for path in listed.split():
        if path.endswith(".py"):
            yield path, git(exported.checkout, "cat-file", "blob", f"{commit}:{path}")


def test_tests_are_registered_for_the_runners(exported: Exported, tmp_path: Path) -> None:
    """By upstream's own reader of registrations, which wants one in every file that it finds."""
    files, imports = [], set()
    for path, text in sources(exported, "helix"):
        if path.startswith("test/"):
            assert path.startswith("test/registered/dcp/")
            files.append(tmp_path / path)
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_text(text)
            imports |= set(re.findall(r"^from (\S+) import", text, re.MULTILINE))
    found = {Path(one.filename).name: one for one in collect_tests(list(map(str, files)))}
    assert len(found) == len(files) > 12
    assert found["test_topology.py"].effective_suite == "base-a-test-cpu"
    assert found["test_symm_gpu.py"].effective_suite == "base-b-test-1-gpu-large"
    assert found["test_all_to_all.py"].effective_suite == "base-c-test-4-gpu-h100"
    assert not {name for name in imports if name.startswith(("srt", "sglang_"))}


def test_tests_land_with_what_they_test(exported: Exported) -> None:
    by_patch = {
        patch.name: set(git(exported.checkout, "diff", "--name-only", f"{commit}^", commit).split())
        for patch, commit in zip(series.SERIES, exported.commits, strict=True)
    }
    assert "test/registered/dcp/distributed/test_topology.py" in by_patch["a2a"]
    assert "python/sglang/test/dcp/threads.py" in by_patch["a2a"]
    assert "test/registered/dcp/layers/dcp/test_symm_gpu.py" in by_patch["symm"]
    assert "benchmark/dcp/kernels.py" in by_patch["symm"]


def test_modules_name_what_is_in_the_tree(exported: Exported) -> None:
    """Of each commit; but what a later patch declares as its own, nothing asks for before."""
    for number, commit in enumerate(exported.commits):
        listed = set(git(exported.checkout, "ls-tree", "-r", "--name-only", commit).split())
        later = {
            module.removeprefix("sglang_helix.")
            for patch in series.SERIES[number + 1 :]
            for module in patch.modules
        }
        for path, text in sources(exported, commit):
            if path.startswith("benchmark/"):  # names the CPU platform, where there is no GPU
                continue
            assert not _NAMES.search(text), path
            if path.startswith("python/sglang/srt/"):
                assert not _MACHINERY.search(text), path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                    module = f"python/{(node.module or '').replace('.', '/')}"
                    found = {f"{module}.py", f"{module}/__init__.py"} & listed or all(
                        f"{module}/{alias.name}.py" in listed for alias in node.names
                    )
                    assert found or (node.module or "").removeprefix("sglang.") in later, path


def test_every_module_lands(exported: Exported) -> None:
    landed = {
        Path(path).name.replace("_helix.py", ".py")
        for path, _ in sources(exported, "helix")
        if path.startswith("python/sglang/srt/")
    }
    modules = {file.name for file in _SRT.rglob("*.py") if file.stat().st_size}
    assert modules - landed == {"looked_at.py"}  # what `series` compares SGLang with
    assert landed - modules == {"helix.py", "advice.py", "cost.py", "layout.py"}


def test_git_am_makes_the_same_tree(exported: Exported, checkout: Path) -> None:
    files = sorted(map(str, exported.patches.iterdir()))
    assert len(files) == len(series.SERIES)
    git(checkout, "am", "-q", *files)
    trees = [
        git(where, "rev-parse", f"{commit}^{{tree}}")
        for where, commit in ((checkout, "HEAD"), (exported.checkout, "helix"))
    ]
    assert trees[0] == trees[1]
    assert export.differences(checkout / "python" / "sglang") == []


def test_checkout_stays_as_it_is(exported: Exported) -> None:
    assert not git(exported.checkout, "status", "--porcelain")
    assert git(exported.checkout, "rev-parse", "HEAD") != git(
        exported.checkout, "rev-parse", "helix"
    )


def refused(checkout: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    before = state(checkout)
    assert main(["export", str(checkout), *flags]) == 1
    assert state(checkout) == before
    out = capsys.readouterr()
    assert not out.out
    return out.err


def test_refuses_a_second_run(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    again = refused(exported.checkout, capsys)
    assert "has a branch helix already" in again
    assert "--branch" in again
    files = refused(
        exported.checkout, capsys, "--branch", "other", "--format-patch", str(exported.patches)
    )
    assert "has patches already" in files


def test_refuses_a_tree_that_has_the_series(
    exported: Exported, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    git(checkout, "checkout", "-q", "-b", "mine", "origin/helix")
    assert "has the series already (python/sglang/srt/helix.py)" in refused(checkout, capsys)


@pytest.mark.parametrize("path", ["python/sglang/version.py", "python/sglang/new.py"])
def test_refuses_a_dirty_tree(
    checkout: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (checkout / path).write_text("")
    reason = refused(checkout, capsys)
    assert f"is not clean (1 paths, {path} first)" in reason


def test_refuses_another_sglang(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One with a symbol that is gone, one that takes other arguments, and a backend less."""
    changes = {
        "models/utils.py": ("def enable_fused_set_kv_buffer(", "def renamed("),
        "speculative/spec_utils.py": ("def draft_tp_context(", "def draft_tp_context(more, "),
        "layers/attention/attention_registry.py": ('backend("fa4")', 'backend("fa5")'),
    }
    for name, (old, new) in changes.items():
        file = checkout / "python" / "sglang" / "srt" / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
    git(checkout, "commit", "-q", "-a", "-m", "Another")
    git(checkout, "tag", "v9.9")
    reason = refused(checkout, capsys)
    assert "(v9.9) is not a SGLang that the series fits, which was made for 0.5.23" in reason
    assert "sglang.srt.models.utils.enable_fused_set_kv_buffer does not exist" in reason
    assert "draft_tp_context takes (more, layout), expected (layout)" in reason
    assert "ATTENTION_BACKENDS[fa4] does not exist" in reason
    assert reason.count(";") == 2


@pytest.mark.parametrize(
    ("where", "flags", "reason"),
    [
        ("nowhere", (), "is not a directory"),
        (".", (), "not a git repository"),
        ("sglang/python", (), "is inside the checkout"),
        ("sglang", ("--branch", "a..b"), "check-ref-format"),
    ],
)
def test_refuses_what_is_no_checkout(
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
    flags: tuple[str, ...],
    reason: str,
) -> None:
    assert main(["export", str(checkout.parent / where), *flags]) == 1
    assert reason in capsys.readouterr().err


def test_refuses_another_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(tmp_path, "init", "-q")
    for name in ("user.name", "user.email"):
        git(tmp_path, "config", name, "nobody@example.org")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "Nothing")
    assert "is not a checkout of SGLang" in refused(tmp_path, capsys)


def test_nothing_is_left_half_done(
    checkout: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = Tree.commit
    left = iter((True, True))

    def fails_at_the_third(tree: Tree, message: str) -> str:
        if not next(left, False):
            raise SeriesError("the disk is full")
        return commit(tree, message)

    monkeypatch.setattr(Tree, "commit", fails_at_the_third)
    patches = tmp_path / "patches"
    assert "the disk is full" in refused(checkout, capsys, "--format-patch", str(patches))
    assert not patches.exists()


CALLS: list[tuple[Any, ...]] = []


def target(value: int, more: int = 1) -> int:
    """The function that is hooked below."""
    CALLS.append(("target", value, more))
    return value + more


def before(value: int, **more: int) -> Any:
    CALLS.append(("before", value, more))
    return None if more else ((value * 10,), {"more": 2})


def after(result: int, value: int, **more: int) -> int | None:
    CALLS.append(("after", result, value, more))
    return None if more else result * 10


def around(original: Any, value: int, **more: int) -> int:
    CALLS.append(("around", value, more))
    return original(value, **more) * 10 if more else 0


def replace(value: int, more: int = 3) -> int:
    CALLS.append(("replace", value, more))
    return value * more


@pytest.mark.parametrize("kind", [before, after, around, replace], ids=lambda kind: kind.__name__)
def test_decorators_do_what_the_registry_does(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    name = kind.__name__
    wrapped = _wrap_fn(target, kind, HookType(name))
    decorate = getattr(in_tree, name)
    decorated = decorate(f"{__name__}:{name}")(target)
    waiting = decorate(f"{__name__}:{name}", stage="serve")(target)
    assert decorated.__name__ == "target"
    for more in ({}, {"more": 5}):
        outcomes = []
        for function in (wrapped, decorated):
            CALLS.clear()
            outcomes.append((function(7, **more), list(CALLS)))
        assert outcomes[0] == outcomes[1]
        CALLS.clear()
        assert waiting(7, **more) == 7 + more.get("more", 1)
        assert [("target", 7, more.get("more", 1))] == CALLS
        with monkeypatch.context() as serving:
            serving.setattr(in_tree, "_stages", {"launch", "serve"})
            CALLS.clear()
            assert (waiting(7, **more), list(CALLS)) == outcomes[0]


def names() -> tuple[str, ...]:
    return ("a", "b")


def test_lists_grow_where_a_rank_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_tree, "_at_serving", acts := [])
    table = ["fa3"]
    in_tree.append(table, f"{__name__}:names")
    assert table == ["fa3"]
    for act in acts:
        act()
    assert table == ["fa3", "a", "b"]
    monkeypatch.setattr(in_tree, "_stages", {"launch", "serve"})
    in_tree.append(table, f"{__name__}:names")
    assert table == ["fa3", "a", "b", "a", "b"]


def test_every_kind_that_lands_is_known() -> None:
    hooks: list[Hook] = [hook for hook in series.hooks() if lands_in_tree(hook)]
    assert {hook.kind for hook in hooks} <= set(dir(in_tree))
