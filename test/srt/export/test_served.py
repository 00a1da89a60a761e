"""SGLang's tree with the commits of `export`, the plugin uninstalled: tokens of transformers.

Each commit answers without the later ones, in a process that imports SGLang as it is there.
"""

import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sglang_cpu_reference import drafts
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.series import SERIES
from sglang_helix.srt.observability.metrics_collector import BATCHES as BATCHES_BY_EXCHANGE
from sglang_helix.srt.observability.metrics_collector import LAYOUT
from srt.disaggregation import pair
from srt.disaggregation.pair import Side
from srt.expected import check_all, prompt
from srt.export.exported import called_in, environment, exported_once, plugin_alone, tree_at
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


class Case(NamedTuple):
    """What is served: a model of that name, on so many ranks.

    prefill: ranks of a prefill server in front, which makes this one its decode server.
    """

    model: str
    ranks: int
    flags: tuple[str, ...] = A2A
    nodes: int = 1
    prefill: int = 0


# By patch, that of its own commit first.
CASES: dict[str, tuple[Case, ...]] = {
    "a2a": (
        Case("llama", 2),
        Case("llama", 4),
        Case("deepseek_v2", 2),
        Case("llama", 2, nodes=2),
    ),
    "qproj": (Case("deepseek_v2", 2, (*A2A, "--dcp-replicate-q-proj")),),
    "attn_tp": (
        Case("llama", 2, ("--attn-tp-size", "1")),
        Case("llama", 4, ("--attn-tp-size", "2")),
        Case("deepseek_v2", 2, ("--attn-tp-size", "1")),
    ),
    "symm": (),  # a kernel for NVIDIA GPUs: what a CPU says is below
    "drafts": (Case("eagle", 2, (*A2A, *DRAFTS)),),
    "disaggregation": (Case("llama", 2, prefill=1),),
    "metrics": (Case("llama", 2, (*A2A, "--enable-metrics")),),
}
EVERY = [(patch, case) for patch, cases in CASES.items() for case in cases]
EVERY += [("none of them", Case("llama", 2, ()))]
# Without a flag of the series: what both trees must resolve alike.
PLAIN = (("llama", ()), ("deepseek_v2", ()), ("llama", ("--dp-size", "2")), ("eagle", DRAFTS))
SYMM = ("--dcp-size", "2", "--dcp-comm-backend", "symm")
# Some of the tests that land, those that are quick.
TESTS = (
    "distributed/test_topology.py",
    "layers/dcp/test_ownership.py",
    "layers/dcp/test_symm_workspace.py",
    "mem_cache/test_moves.py",
    "test_metrics.py",
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


def served(models: dict[str, Path], draft: Path, case: Case) -> tuple[Any, ...]:
    """The call of a case; see `srt.export.calls`."""
    model, flags = models[case.model], (*case.flags, *SIZES)
    if case.prefill:
        decode = Side(case.ranks, flags)
        ranks = pair.ranks(model, Side(case.prefill, SIZES), decode)
        ended = Path(tempfile.mkdtemp(dir=model.parent))
        args = (BATCHES, NEW_TOKENS, ended, decode, math.inf)
        return ("srt.disaggregation.pair:_serve", ranks, *args)
    argv = command_line(model, case.ranks, *flags)
    if DRAFTS[0] in flags:
        argv += ["--speculative-draft-model-path", str(draft)]
    if case.nodes > 1:
        port = argv[argv.index("--nccl-port") + 1]
        argv += ["--nnodes", str(case.nodes), "--dist-init-addr", f"127.0.0.1:{port}"]
    function = f"{IN_A_TREE}:served"
    return (function, case.ranks, argv, case.ranks // case.nodes, BATCHES, NEW_TOKENS)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("served")
    models = {name: make_checkpoint(name, root / name) for name in ("llama", "deepseek_v2")}
    models["eagle"], draft = drafts.make_eagle(root / "eagle")
    checkout, commits, _ = exported_once(tmp_path_factory.getbasetemp())

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


def check_answers(ran: Ran, case: Case, outcomes: list[Any]) -> None:
    for status, _, output in outcomes:
        assert status == 0, output
    answers = [value if case.prefill else value[0].answers for _, value, _ in outcomes]
    for found in answers[case.prefill :]:
        check_all(ran.models[case.model], BATCHES, found, NEW_TOKENS)
    for found in answers[: case.prefill or None]:
        assert found[-1][0].cached_tokens > 20
    if DRAFTS[0] in case.flags:
        assert all(answer.drafts[0] for found in answers for batch in found for answer in batch)


@pytest.mark.parametrize(("patch", "case"), EVERY)
def test_tokens_of_transformers(ran: Ran, patch: str, case: Case) -> None:
    check_answers(ran, case, ran.last[case])


@pytest.mark.parametrize("patch", [patch.name for patch in SERIES[:-1] if CASES[patch.name]])
def test_each_commit_serves_without_the_later_ones(ran: Ran, patch: str) -> None:
    case = CASES[patch][0]
    check_answers(ran, case, ran.commits[patch][case])


def test_metrics_of_every_rank(ran: Ran) -> None:
    """Of chunks, four have a prefix: of two batches all but the first, of the last its only one."""
    (case,) = CASES["metrics"]
    for rank, (_, (_, metrics), _) in enumerate(ran.last[case]):
        counted = {
            dict(labels)["exchange"]: value
            for (name, *labels), value in metrics.items()
            if name == f"{BATCHES_BY_EXCHANGE}_total"
        }
        steps = len(BATCHES) * (NEW_TOKENS - 1)
        assert counted == {"none": 2, "a2a": 4 + steps}
        (layout,) = (dict(labels) for name, *labels in metrics if name == LAYOUT)
        assert (layout["dcp_size"], layout["dcp_rank"]) == ("2", str(rank))


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
    fields = {field.name: repr(field.default) for patch in SERIES for field in patch.fields}
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
