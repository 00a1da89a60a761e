"""One server on two nodes: a launcher for each, their ranks in one tensor-parallel group."""

from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Server, ServerError
from srt.expected import check, expected, prompt
from srt.fresh import Fresh
from srt.models.serving import serve

LENGTHS = (1, 5, 40, 64, 200)
NEW_TOKENS = 6


@pytest.mark.server
def test_two_nodes_serve_and_end_together(tmp_path: Path) -> None:
    """The KVP group spans both nodes. One of them goes, and the other does not stay."""
    checkpoint = make_checkpoint("deepseek_v2", tmp_path / "deepseek_v2")
    layout = ("--tp", "4", "--dcp-size", "4", "--dcp-comm-backend", "a2a")
    with Server(checkpoint, *layout, nodes=2) as server:
        report = server.server_info()["sglang_helix"]
        others = report["other_nodes"]
        assert [one["series"] for one in others] == [report["series"]] * 2
        assert [one["kv_tokens"] for one in others] == [report["kv_tokens"]] * 2
        assert "Rank 3: head shard 0, place 3; KVP group [0, 1, 2, 3]" in server.log(node=1)
        prompts = [prompt(length) for length in LENGTHS]
        for _ in range(2):  # the second time from the prefix cache
            answers = server.generate_batch(prompts, NEW_TOKENS)
            for tokens, answer in zip(prompts, answers, strict=True):
                check(checkpoint, tokens, answer, NEW_TOKENS)
        assert sum(answer.cached_tokens for answer in answers) > 200

        server.kill_node(1)
        with pytest.raises(ServerError):
            server.generate(prompts[2], 200)
        assert server.wait_until_gone(60)


@pytest.mark.server
def test_two_nodes_that_differ_end(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "llama")
    layout = ("--tp", "2", "--dcp-size", "2", "--dcp-comm-backend", "a2a")
    other = {1: ("--dcp-comm-backend", "ag_rs")}
    with (
        pytest.raises(ServerError) as refused,
        Server(checkpoint, *layout, nodes=2, node_flags=other),
    ):
        pass
    nodes = str(refused.value).split("node 1 of the server ")
    assert len(nodes) == 2
    assert "node 0 of the server exited with status" in nodes[0]
    assert nodes[1].startswith("exited with status")
    for log in nodes:
        assert "dcp_comm_backend is 'a2a' on rank 0 (node 0, " in log
        assert "'ag_rs' on rank 1 (node 1, " in log


@pytest.mark.parametrize(
    "layout",
    [("--dcp-size", "4", "--dcp-comm-backend", "a2a"), ("--attn-tp-size", "2")],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_schedulers_of_two_nodes(ready: Fresh, tmp_path: Path, layout: tuple[str, ...]) -> None:
    """Without launchers: what each node's ranks resolve, build and answer."""
    checkpoint = make_checkpoint("llama", tmp_path / "llama")
    prompts = [prompt(length) for length in LENGTHS]
    flags = (*layout, "--max-total-tokens", "2048")
    reports = serve(ready, checkpoint, 4, flags, [prompts, prompts], NEW_TOKENS, nodes=2)
    assert len({report.kv_tokens for report in reports}) == 1
    for report in reports:
        for answers in report.answers:
            for tokens, answer in zip(prompts, answers, strict=True):
                want = expected(checkpoint, tuple(tokens), NEW_TOKENS)
                assert answer.completion.token_ids == want.token_ids
