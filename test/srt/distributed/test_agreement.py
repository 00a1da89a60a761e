"""Ranks say what they run over a real store, and go on only when it is the same.

Most of it is a store and a few threads; processes are ranks that build SGLang's groups, without a
model. test_nodes.py has whole servers.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import free_port
from sglang_helix.hook import SeriesError
from sglang_helix.srt.distributed import agreement
from sglang_helix.srt.distributed.agreement import Agreement
from srt.fresh import Fresh, Outcome
from srt.rank import published
from torch.distributed import TCPStore

HOST = socket.gethostname()
NODE_0 = f"ranks 0, 1 (node 0, {HOST})"
NODE_1 = f"ranks 2, 3 (node 1, {HOST})"
FACTS = {
    "version": "0.1.0",
    "stages": ["launch", "serve"],
    "dcp_size": 4,
    "dcp_comm_backend": "a2a",
    "page_size": 1,
    "chunked_prefill_size": 8192,
}


@pytest.fixture
def ranks() -> list[Agreement]:
    """Four ranks on two nodes, each with a connection of its own to the store of rank 0."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [store, *(TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(3))]
    return [Agreement(store, rank, 4, nodes=2) for rank, store in enumerate(stores)]


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, each made in a thread."""
    results: list[Any] = [None] * len(calls)

    def call(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def verdicts(ranks: list[Agreement], *said: dict[str, Any], patience: float = 10) -> list[Any]:
    """What each rank hears after the first ranks have said what they run."""

    def turn(rank: Agreement, facts: dict[str, Any] | None) -> str | None:
        if facts is not None:
            rank.publish(facts)
        return rank.verdict(patience)

    facts = [*said, *[None] * (len(ranks) - len(said))]
    return together(
        [lambda pair=pair: turn(*pair) for pair in zip(ranks, facts, strict=True) if pair[1]]
    )


def test_ranks_that_say_the_same_go_on(ranks: list[Agreement]) -> None:
    assert verdicts(ranks, *[FACTS] * 4) == [None] * 4


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("version", "0.2.0"),
        ("stages", ["launch"]),
        ("dcp_size", 2),
        ("dcp_comm_backend", "ag_rs"),
        ("page_size", 16),
        ("chunked_prefill_size", None),
    ],
)
def test_a_difference_is_said_on_every_rank(
    ranks: list[Agreement], name: str, other: object
) -> None:
    changed = {**FACTS, name: other}
    for verdict in verdicts(ranks, FACTS, FACTS, changed, changed):
        assert verdict == (
            f"the ranks do not run the same: {name} is {FACTS[name]!r} on {NODE_0}, {other!r} on "
            f"{NODE_1}. Start every node with the same flags, the same model and the same "
            "installation, or leave them to their defaults."
        )


def test_every_difference_is_said_and_of_one_rank_too(ranks: list[Agreement]) -> None:
    one = {**FACTS, "page_size": 16, "dcp_size": 2, "new in its version": 1}
    (verdict,) = set(verdicts(ranks, FACTS, FACTS, FACTS, one))
    assert f"page_size is 1 on ranks 0, 1, 2 (nodes 0, 1, {HOST}), 16 on rank 3" in verdict
    assert f"16 on rank 3 (node 1, {HOST})" in verdict
    assert "dcp_size is 4 on ranks 0, 1, 2" in verdict
    assert "new in its version is None on ranks 0, 1, 2" in verdict
    assert "version is" in verdict
    assert "chunked_prefill_size" not in verdict


def test_a_silent_node_is_named(ranks: list[Agreement]) -> None:
    (verdict,) = set(verdicts(ranks, FACTS, FACTS, patience=1))
    assert verdict == (
        "ranks 2, 3 (node 1) have not said within 1 s what they run, and without the series their "
        "answers would be wrong: see the log of that node, install the same sglang-helix "
        "everywhere and leave it in SGLANG_PLUGINS."
    )
    # Who comes too late ends too.
    ranks[2].publish(FACTS)
    ranks[3].publish(FACTS)
    assert "ranks 2, 3 (node 1) have not said" in ranks[2].verdict(0.3)


def test_all_of_it_takes_less_than_45_seconds() -> None:
    assert agreement.PATIENCE == 30
    assert agreement.PATIENCE + agreement.STAY < 45


def test_rank_0_stays_until_the_others_have_read(ranks: list[Agreement]) -> None:
    order: list[int] = []

    def end(rank: int) -> None:
        time.sleep(0.3 if rank else 0)
        if rank:
            order.append(rank)
        ranks[rank].leave(60)
        if not rank:
            order.append(rank)

    for rank in ranks[:3]:
        rank.publish(FACTS)  # the last one never came
    together([lambda rank=rank: end(rank) for rank in range(3)])
    assert order[-1] == 0
    began = time.monotonic()
    Agreement(ranks[0]._store, 0, 4, 2).leave(0.2)
    assert time.monotonic() - began < 5


def test_ranks_of_other_layouts_hear_of_it(ranks: list[Agreement]) -> None:
    """They go on at once, and end only over a verdict."""
    assert ranks[0].overhear(0.2) is None
    plain = {**FACTS, "stages": ["launch"], "dcp_size": 1}
    ranks[0].publish(plain)
    ranks[1].publish(plain)
    ranks[2].publish(FACTS)
    ranks[3].publish(FACTS)
    heard, found = together([lambda: ranks[0].overhear(20), lambda: ranks[2].verdict(10)])
    assert heard == found
    assert f"dcp_size is 1 on {NODE_0}, 4 on {NODE_1}; stages is ['launch'] on" in heard


def test_rank_0_gathers_reports(ranks: list[Agreement]) -> None:
    calls = [lambda rank=rank: ranks[rank].gather({"rank": rank}, 20) for rank in range(4)]
    assert together(calls) == [[{"rank": rank} for rank in range(4)], None, None, None]


def test_rank_0_says_whose_report_is_missing(
    ranks: list[Agreement], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agreement, "_MINUTE", 0.1)
    for rank in (1, 2):
        ranks[rank].gather({}, 1)
    with pytest.raises(SeriesError, match=r"rank 3 \(node 1\) has not been ready for 1 s: see"):
        ranks[0].gather({}, 1)
    assert 5 <= caplog.text.count("rank 3 (node 1) has not been ready for") <= 9


# SGLang's own start-up of a rank, up to its process groups.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("m") / "llama")


def start(rank: int, argv: list[str], changes: dict[str, Any], plugins: str) -> dict[str, Any]:
    """A rank's start; returns what it said. `changes` are attributes of the series' modules."""
    os.environ["SGLANG_PLUGINS"] = plugins
    for name, value in changes.items():
        module, _, attribute = name.partition(":")
        setattr(resolve_name(module), attribute, value)
    agreement.PATIENCE, agreement.STAY = 3.0, 1.0
    server_args = published(rank, argv)
    from sglang.srt.distributed import bootstrap

    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=0)
    torch.distributed.barrier()  # the store goes with rank 0
    return agreement.what_runs()


def start_nodes(
    processes: Fresh,
    model: Path,
    *flags: str,
    second: tuple[str, ...] = (),
    plugins: str = "helix,cpu_reference",
    **changes: Any,
) -> list[Outcome]:
    """Start two nodes of a rank each; `second`, `plugins` and `changes` are the second one's."""
    common = ("--model-path", str(model), "--tp-size", "2", "--nnodes", "2", *flags)
    meet = ("--dist-init-addr", f"127.0.0.1:{free_port()}")
    first = [*common, *meet, "--node-rank", "0"]
    other = [*common, *meet, "--node-rank", "1", *second]
    return processes.outcomes(
        [(start, 0, first, {}, "helix,cpu_reference"), (start, 1, other, changes, plugins)]
    )


@pytest.mark.parametrize("flags", [("--dcp-size", "2"), ()], ids=str)
def test_nodes_that_run_the_same_start(
    request: pytest.FixtureRequest, model: Path, flags: tuple[str, ...]
) -> None:
    processes = request.getfixturevalue("ready" if flags else "fresh")
    one, two = start_nodes(processes, model, *flags)
    assert (one.status, two.status) == (0, 0), one.output + two.output
    assert one.value == two.value
    assert one.value["dcp_size"] == (2 if flags else 1)
    assert one.value["attention_backends"] == ["torch_native"] * 2
    assert one.value["page_size"] == 1


@pytest.mark.parametrize(
    ("processes", "case", "said"),
    [
        pytest.param(
            "ready",
            {"second": ("--page-size", "16")},
            "page_size is 1 on rank 0 (node 0, {host}), 16 on rank 1 (node 1, {host})",
            id="page size",
        ),
        pytest.param(
            "ready",
            {"sglang_helix.helix:__version__": "0.2.0"},
            "version is '0.1.0' on rank 0 (node 0, {host}), '0.2.0' on rank 1 (node 1, {host})",
            id="version",
        ),
        pytest.param(
            "fresh",
            {"second": ("--dcp-size", "1")},
            "dcp_size is 2 on rank 0 (node 0, {host}), 1 on rank 1 (node 1, {host})",
            id="only one is sharded",
        ),
    ],
)
def test_nodes_that_differ_end(
    request: pytest.FixtureRequest, model: Path, processes: str, case: Any, said: str
) -> None:
    for rank in start_nodes(request.getfixturevalue(processes), model, "--dcp-size", "2", **case):
        assert rank.status == 1
        assert "sglang-helix: the ranks do not run the same: " in rank.output
        assert said.format(host=HOST) in rank.output


def test_a_node_without_the_series_is_named(fresh: Fresh, model: Path) -> None:
    one, two = start_nodes(fresh, model, "--dcp-size", "2", plugins="cpu_reference")
    assert (one.status, two.status) == (1, 1)
    assert "sglang-helix: rank 1 (node 1) has not said within 3 s what they run" in one.output
