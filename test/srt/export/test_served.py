"""SGLang's tree with the commits of `export`, the plugin uninstalled: tokens of transformers.

Each commit answers without the later ones, in a process that imports SGLang as it is there.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sglang_cpu_reference import drafts
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.export import export
from sglang_helix.series import SERIES
from srt.expected import check_all, prompt
from srt.export.exported import called_in, environment, plugin_alone, repository, tree_at
from srt.models.serving import command_line

NEW_TOKENS = 6
# Chunks of a prompt, short ones beside a long one, and a prefix that the cache has.
BATCHES = (
    (prompt(45, seed=30),),
    (prompt(1, seed=31), prompt(21, seed=32)),
    (prompt(45, seed=30) + prompt(3, seed=33),),
)
SIZES = ("--page-size", "1", "--chunked-prefill-size", "20", "--max-total-tokens", "1024")
A2A = ("--dcp-size", "2", "--dcp-comm-backend", "a2a")
DRAFTS = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
)
# By patch, that of its own commit first: model, ranks, nodes and flags.
CASES: dict[str, tuple[tuple[str, int, int, tuple[str, ...]], ...]] = {
    "a2a": (
        ("llama", 2, 1, A2A),
        ("llama", 4, 1, A2A),
        ("deepseek_v2", 2, 1, A2A),
        ("llama", 2, 2, A2A),
    ),
    "qproj": (("deepseek_v2", 2, 1, (*A2A, "--dcp-replicate-q-proj")),),
    "attn_tp": (
        ("llama", 2, 1, ("--attn-tp-size", "1")),
        ("llama", 4, 1, ("--attn-tp-size", "2")),
        ("deepseek_v2", 2, 1, ("--attn-tp-size", "1")),
    ),
    "symm": (),  # a kernel for NVIDIA GPUs: what a CPU says is below
    "drafts": (("eagle", 2, 1, (*A2A, *DRAFTS)),),
}
EVERY = [(patch, case) for patch, cases in CASES.items() for case in cases]
# Without a flag of the series: what both trees must resolve alike.
PLAIN = (("llama", ()), ("deepseek_v2", ()), ("llama", ("--dp-size", "2")), ("eagle", DRAFTS))
SYMM = ("--dcp-size", "2", "--dcp-comm-backend", "symm")
# Some of the tests that land, those that are quick.
TESTS = (
    "layers/dcp/test_ownership.py",
    "mem_cache/test_moves.py",
    "layers/attention/test_sharded.py",
)
IN_A_TREE, PLUGINS_LOADED = "srt.export.in_a_tree", "srt.models.plugins_loaded"


class Ran(NamedTuple):
    """Outcomes on every rank, by what was called: in the last commit's tree, and in others."""

    models: dict[str, Path]
    base: dict[Any, list[Any]]
    commits: dict[str, dict[Any, list[Any]]]

    @property
    def last(self) -> dict[Any, list[Any]]:
        return self.commits[SERIES[-1].name]


def served(models: dict[str, Path], draft: Path, case: Any) -> tuple[Any, ...]:
    model, ranks, nodes, flags = case
    argv = command_line(models[model], ranks, *flags, *SIZES)
    if DRAFTS[0] in flags:
        argv += ["--speculative-draft-model-path", str(draft)]
    if nodes > 1:
        port = argv[argv.index("--nccl-port") + 1]
        argv += ["--nnodes", str(nodes), "--dist-init-addr", f"127.0.0.1:{port}"]
    return ("srt.models.serving:_serve", ranks, argv, ranks // nodes, BATCHES, NEW_TOKENS)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("served")
    models = {name: make_checkpoint(name, root / name) for name in ("llama", "deepseek_v2")}
    models["eagle"], draft = drafts.make_eagle(root / "eagle")
    checkout = repository(root / "sglang")
    commits = export(checkout, "helix")

    plain = {}
    for model, flags in PLAIN:
        argv = command_line(models[model], 2, *flags)
        if flags == DRAFTS:
            argv += ["--speculative-draft-model-path", str(draft)]
        plain[model, flags] = (f"{IN_A_TREE}:resolved", 1, argv)
    loaded: dict[Any, tuple[Any, ...]] = {"loaded": (PLUGINS_LOADED, 0)}
    symm = command_line(models["llama"], 2, *SYMM)
    tests = [str(root / SERIES[-1].name / "test" / "registered" / "dcp" / name) for name in TESTS]
    calls = [loaded | plain]
    calls += [
        loaded | {case: served(models, draft, case) for case in CASES.get(patch.name, ())[:1]}
        for patch in SERIES[:-1]
    ]
    calls[[patch.name for patch in SERIES].index("symm") + 1]["symm"] = (
        f"{IN_A_TREE}:resolved",
        1,
        symm,
    )
    calls.append(
        {
            "help": (f"{IN_A_TREE}:help_of_serve", 1),
            "installed": (f"{IN_A_TREE}:installed_plugins", 1),
            "beside": (f"{IN_A_TREE}:load_the_plugin_too", 1, str(plugin_alone(root / "plugin"))),
            "tests": (f"{IN_A_TREE}:run_tests", 1, tests),
            **loaded,
            **plain,
            **{case: served(models, draft, case) for _, case in EVERY},
        }
    )
    trees = [checkout / "python"]
    trees += [
        tree_at(checkout, commit, root / patch.name)
        for patch, commit in zip(SERIES, commits, strict=True)
    ]
    outcomes = called_in(
        environment(checkout, root / "environment"),
        [(tree, list(asked.values())) for tree, asked in zip(trees, calls, strict=True)],
    )
    base, *rest = (dict(zip(a, o, strict=True)) for a, o in zip(calls, outcomes, strict=True))
    names = (patch.name for patch in SERIES)
    return Ran(models, base, dict(zip(names, rest, strict=True)))


def test_the_plugin_is_not_installed(ran: Ran) -> None:
    ((status, found, output),) = ran.last["installed"]
    assert status == 0, output
    assert "cpu_reference" in found[0]
    assert "helix" not in found[0]
    assert not found[1]


def check_answers(ran: Ran, case: Any, outcomes: list[Any]) -> None:
    for status, report, output in outcomes:
        assert status == 0, output
        check_all(ran.models[case[0]], BATCHES, report.answers, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > 20
        if DRAFTS[0] in case[3]:
            assert all(answer.drafts[0] for answers in report.answers for answer in answers)


@pytest.mark.parametrize(("patch", "case"), EVERY)
def test_tokens_of_transformers(ran: Ran, patch: str, case: Any) -> None:
    check_answers(ran, case, ran.last[case])


@pytest.mark.parametrize("patch", ["a2a", "qproj", "attn_tp"])
def test_each_commit_serves_without_the_later_ones(ran: Ran, patch: str) -> None:
    case = CASES[patch][0]
    check_answers(ran, case, ran.commits[patch][case])


def test_symm_is_known_from_its_commit_on(ran: Ran) -> None:
    """Here there is no NVIDIA GPU: the table's refusal, not the parser's."""
    ((status, _, output),) = ran.commits["symm"]["symm"]
    assert status
    assert "--dcp-comm-backend symm" in output
    assert "needs CUDA devices that have peer access" in output


@pytest.mark.parametrize("what", PLAIN, ids=lambda what: " ".join((what[0], *what[1][:2])))
def test_without_a_flag_of_the_series_nothing_is_resolved_otherwise(ran: Ran, what: Any) -> None:
    before, after = (outcomes[what][0] for outcomes in (ran.base, ran.last))
    assert before[0] == after[0] == 0, after[2]
    fields = {field.name: repr(None) for patch in SERIES for field in patch.fields}
    assert after[1] == before[1] | fields
    assert len(before[1]) > 400


def test_help_of_sglang_serve_has_the_fields(ran: Ran) -> None:
    ((status, _, output),) = ran.last["help"]
    assert status == 0
    shown = "".join(output.split())  # lines are broken at hyphens, too
    for field in (field for patch in SERIES for field in patch.fields):
        assert all(flag in shown for flag in field.flags)
        assert "".join(field.help.split()) in shown
    assert "'symm'(onekerneloversymmetricmemory;" in shown


def test_the_plugin_beside_the_tree_does_not_start(ran: Ran) -> None:
    ((status, _, output),) = ran.last["beside"]
    assert status == 1
    assert "this SGLang has the series in its own tree (sglang/srt/helix.py)" in output
    assert "loaded" not in output.splitlines()


def test_tests_pass_in_the_tree(ran: Ran) -> None:
    ((status, found, output),) = ran.last["tests"]
    assert (status, found) == (0, 0), output
    assert " passed" in output
