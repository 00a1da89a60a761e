"""The declaration of the series against the installed SGLang: the contract it rests on."""

import inspect
import itertools
import pkgutil
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import pytest
from sglang_helix import hook, series
from sglang_helix.__main__ import main
from sglang_helix.hook import HOOK_TYPES, SUPPORTED_SGLANG, Hook, Patch, Stage, signature_of
from srt.fresh import Fresh

pytestmark = pytest.mark.quick

HOOKS = list(series.hooks())


def name_of(declared: Hook) -> str:
    return f"{declared.target.removeprefix('sglang.srt.')}-{declared.impl.rpartition(':')[2]}"


# Renames parameters on purpose: upstream calls it by position, and so does nobody else.
CALLED_BY_POSITION = "PyNcclCommunicator.all_to_all_single"

each_hook = pytest.mark.parametrize("declared", HOOKS, ids=name_of)


def a_hook(name: str) -> Hook:
    return next(declared for declared in HOOKS if declared.target.endswith(name))


def with_hook(monkeypatch: pytest.MonkeyPatch, declared: Hook) -> None:
    monkeypatch.setattr(series, "SERIES", (Patch("broken", "on purpose", (declared,)),))


@each_hook
def test_target_is_as_declared(declared: Hook) -> None:
    assert declared.check() is None


def test_command_lists_the_series(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["series", "--why"]) == 0
    out = capsys.readouterr().out
    assert f"sglang {SUPPORTED_SGLANG[-1]}" in out
    for patch in series.SERIES:
        assert f"\n{patch.name}: {patch.summary}" in out
    for declared in HOOKS:
        assert f"{declared.kind:10}  {declared.target}  ok" in out
    words = " ".join(out.split())
    for declared in HOOKS:
        assert f"why: {declared.why}" in words
        assert f"until: {declared.until}" in words


def run_command_with_a_renamed_target() -> None:
    from sglang.srt.models import utils

    del utils.enable_fused_set_kv_buffer
    sys.argv = ["sglang_helix", "series"]
    runpy.run_module("sglang_helix", run_name="__main__")


def test_exit_status(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sglang_helix", "series"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("sglang_helix", run_name="__main__")
    renamed = fresh.outcome(run_command_with_a_renamed_target)
    assert renamed.status == 1
    assert "models.utils.enable_fused_set_kv_buffer  DIFFERS: " in renamed.output
    assert renamed.output.count("DIFFERS") == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target": "sglang.srt.models.utils.renamed"}, "models.utils.renamed does not exist"),
        ({"target": "sglang.srt.moved.enable"}, "sglang.srt.moved.enable does not exist"),
        ({"signature": "forward_batch, layer="}, "takes (forward_batch), expected (forward_batch,"),
        ({"signature": "forward_batch="}, "takes (forward_batch), expected (forward_batch=)"),
    ],
)
def test_difference_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    complaint: str,
) -> None:
    with_hook(monkeypatch, replace(a_hook("enable_fused_set_kv_buffer"), **change))
    assert main(["series"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    assert complaint in out


def test_table_entry_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(
        a_hook("[triton]"), target=a_hook("[triton]").target.replace("triton", "triton9")
    )
    with_hook(monkeypatch, gone)
    assert main(["series"]) == 1


@pytest.mark.parametrize("found", ["0.5.24", "0.5.22", None])
def test_another_sglang_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: str | None
) -> None:
    def pretended(distribution: str) -> str:
        if distribution != "sglang":
            return version(distribution)
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(hook.importlib.metadata, "version", pretended)
    assert main(["series"]) == 1
    out = capsys.readouterr().out
    assert (f"supports sglang {SUPPORTED_SGLANG[0]}" if found else "not installed") in out
    assert found is None or f"{found} is installed" in out


def receivers(declared: Hook) -> list[str]:
    """What SGLang passes before the parameters that `inspect` sees."""
    owner, _, name = declared.target.rpartition(".")
    if declared.kind not in HOOK_TYPES:
        return []
    found = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    return ["cls"] if isinstance(found, classmethod) else []


def calls(parameters: list[inspect.Parameter]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Ways to call a target: by position all, or only what has no default; all by name."""
    placed = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    needed = [p.name for p in parameters if p.default is p.empty]
    own = placed[:1] if placed[:1] == ["self"] else []
    yield placed, dict.fromkeys(named)
    yield [n for n in needed if n in placed], dict.fromkeys(n for n in needed if n in named)
    yield own, dict.fromkeys(name for name in placed + named if name not in own)


@each_hook
def test_implementation_takes_what_the_target_takes(declared: Hook) -> None:
    implementation = inspect.signature(declared.implementation())
    if declared.kind == "append":
        implementation.bind()
    elif declared.kind == "attribute":  # in the place of a class that takes fields by name
        implementation.bind(model_path="", tp_size=2)
    elif declared.kind == "resolution":
        implementation.bind("server_args", "previous")
    else:
        first = {
            "after": ["result"],
            "around": ["original"],
            "backend": ["name", "original"],
        }.get(declared.kind, [])
        first += receivers(declared)
        parameters = list(inspect.signature(declared.resolve()).parameters.values())
        ways = list(calls(parameters))
        if declared.target.endswith(CALLED_BY_POSITION):
            ways.pop()
        for args, kwargs in ways:
            implementation.bind(*first, *args, **kwargs)


@each_hook
def test_catalogue_entry(declared: Hook) -> None:
    for text in (declared.why, declared.how, declared.until):
        assert len(text.split()) > 1
    issues = r"sgl-project/sglang#\d+(, #\d+)*"
    assert declared.upstream == "none" or re.fullmatch(issues, declared.upstream)


def test_targets_are_disjoint() -> None:
    """SGLang patches a target once: hooks that come later, in another stage, would be lost.

    Those of one stage come together; only such as run after the target cannot stand in each
    other's way.
    """
    by_stage = {
        stage: [h for h in series.hooks(stage) if h.kind in HOOK_TYPES] for stage in get_args(Stage)
    }
    for hooks in by_stage.values():
        alone = [h.target for h in hooks if h.kind != "after"]
        assert len(alone) == len(set(alone))
        assert not set(alone) & {h.target for h in hooks if h.kind == "after"}
    targets = [{h.target for h in hooks} for hooks in by_stage.values()]
    assert not any(one & another for one, another in itertools.combinations(targets, 2))


def test_launch_stage_imports_nothing_heavy() -> None:
    program = (
        "import sys; from sglang_helix import plugin, series; "
        "[hook.implementation() for hook in series.hooks('launch')]; "
        "print(sorted({'torch', 'sglang', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def install(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Load the named patches as SGLang does: targets that lack their hook, or have it too early."""
    series.SERIES = tuple(patch for patch in series.SERIES if patch.name in names)
    from sglang.srt.plugins import load_plugins
    from sglang_helix import plugin

    load_plugins()
    early = [h.target for h in series.hooks("serve") if in_effect(h)]
    lacking = [h.target for h in series.hooks("launch") if not in_effect(h)]
    for stage in get_args(Stage)[1:]:
        plugin.install(stage)
    lacking += [h.target for h in series.hooks() if not in_effect(h)]
    return lacking, early


APPENDED: dict[str, list[str]] = {}  # what each list lacked before the serve stage


def in_effect(declared: Hook) -> bool:
    """Whether SGLang reaches the implementation by the target."""
    implementation = declared.implementation()
    if declared.kind == "resolution":
        from sglang.srt.arg_groups.resolution_hooks import _HOOKS

        return implementation in _HOOKS.get(declared.target.rpartition(".")[2], [])
    target = declared.resolve()
    if declared.kind == "append":
        return set(APPENDED.setdefault(declared.target, implementation())) <= set(target)
    if declared.kind == "backend":
        return getattr(target, "func", None) is implementation and target.args[0] == declared.key
    while target is not implementation:
        cells = getattr(target, "__closure__", None) or ()
        if any(cell.cell_contents is implementation for cell in cells):
            return True
        target = getattr(target, "__wrapped__", None)
        if target is None:
            return False
    return True


@pytest.mark.parametrize(
    "count",
    [
        *(pytest.param(count, marks=pytest.mark.slow) for count in range(1, len(series.SERIES))),
        len(series.SERIES),
    ],
)
def test_each_patch_loads_without_the_later_ones(fresh: Fresh, count: int) -> None:
    names = tuple(patch.name for patch in series.SERIES[:count])
    lacking, early = fresh.value(install, names)
    assert not lacking
    assert not early, "serve-stage hooks in a process that serves nothing"


def test_signature_of() -> None:
    def target(self, a, *rest, b=1, c, **more):  # type: ignore[no-untyped-def]
        return None

    assert signature_of(target) == "self, a, *rest, b=, c, **more"
    assert signature_of(["a table"]) == ""
