"""What users do with a server, over a sharded cache and over a whole one: the same answers.

Each feature is a function of a server that returns what must be equal. One server runs plain TP,
one decoupled attention with mixed chunks allowed; more servers run pipeline stages and the faults.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Server, ServerError
from srt.expected import LOGPROB_TOLERANCE, check, prompt
from srt.underway import prompts_are_taken, scheduler_pid, wait_until

TOKENS = 12


def generate(server: Server, tokens: list[int], **params: Any) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, **params}
    return server.post("/generate", {"input_ids": tokens, "sampling_params": sampling})


def penalties(server: Server) -> Any:
    params = {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2}
    return [generate(server, prompt(n), **params)["output_ids"] for n in (3, 70)]


def seeded_sampling(server: Server) -> Any:
    params = {"temperature": 0.8, "top_k": 1, "min_new_tokens": 3}
    return generate(server, prompt(11), **params)["output_ids"]


def structured_output(server: Server) -> Any:
    text = generate(server, prompt(30), regex="(ab|cd){3}", ignore_eos=False)["text"]
    assert re.fullmatch("(ab|cd){3}", text)
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}})
    generate(server, prompt(30), json_schema=schema, ignore_eos=False)
    return text


def input_logprobs(server: Server) -> Any:
    body = {
        "input_ids": prompt(90),
        "sampling_params": {"temperature": 0, "max_new_tokens": 2},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    entries = server.post("/generate", body)["meta_info"]["input_token_logprobs"]
    return [(value or 0.0, token) for value, token, *_ in entries]


def streaming(server: Server) -> Any:
    body = {
        "input_ids": prompt(40),
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
        "stream": True,
    }
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in server.post("/generate", body).splitlines()
        if line.startswith("data: ") and "[DONE]" not in line
    ]
    assert len(chunks) > 1
    return chunks[-1]["text"]


def openai_completions(server: Server) -> Any:
    body = {"model": "m", "prompt": "the quick brown fox", "max_tokens": TOKENS, "temperature": 0}
    return server.post("/v1/completions", body)["choices"][0]["text"]


def openai_chat(server: Server) -> Any:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    return server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]


def several_samples(server: Server) -> Any:
    return [answer["output_ids"] for answer in generate(server, prompt(70), n=3)]


def health_and_metrics(server: Server) -> Any:
    server.get("/health_generate")
    metrics = server.get("/metrics")
    assert "sglang" in metrics
    return True


def sessions(server: Server) -> Any:
    """Two turns and a branch: a session continues from the request that is named."""
    session = server.post("/open_session", {"capacity_of_str_len": 1000})
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}

    def turn(tokens: list[int], rid: str | None = None) -> Any:
        params = {"id": session, "rid": rid}
        body = {"input_ids": tokens, "session_params": params, "sampling_params": sampling}
        return server.post("/generate", body)

    first = turn(prompt(20))
    rid = first["meta_info"]["id"]
    answers = [first, turn(prompt(5, seed=1), rid), turn(prompt(6, seed=2), rid)]
    assert answers[1]["meta_info"]["prompt_tokens"] == 20 + TOKENS + 5
    server.post("/close_session", {"session_id": session})
    return [answer["output_ids"] for answer in answers]


def memory_released_and_resumed(server: Server) -> Any:
    for step in ("release", "resume"):
        server.post(f"/{step}_memory_occupation", {})
    return [generate(server, prompt(n))["output_ids"] for n in (4, 61)]


def paused_and_continued(server: Server) -> Any:
    """Midway through one request, and before another, which is not answered meanwhile."""
    answers: dict[int, Any] = {}

    def ask(length: int, new_tokens: int) -> None:
        answers[length] = generate(server, prompt(length), max_new_tokens=new_tokens)["output_ids"]

    midway, behind = (threading.Thread(target=ask, args=given) for given in ((33, 100), (5, 1)))
    with prompts_are_taken(server):
        midway.start()
    server.post("/pause_generation", {"mode": "in_place"})
    behind.start()
    behind.join(0.3)
    assert 5 not in answers
    server.post("/continue_generation", {})
    for request in (midway, behind):
        request.join(120)
    return [answers[33], answers[5]]


FEATURES: dict[str, Callable[[Server], Any]] = {
    function.__name__: function
    for function in (
        penalties,
        seeded_sampling,
        structured_output,
        streaming,
        openai_completions,
        openai_chat,
        several_samples,
        health_and_metrics,
        sessions,
        memory_released_and_resumed,
        paused_and_continued,
    )
}


@pytest.fixture(scope="module", params=["llama", "deepseek_v2"])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    checkpoint = make_checkpoint(request.param, tmp_path_factory.mktemp("m") / request.param)
    common = ("--tp", "2", "--page-size", "1", "--enable-metrics", "--chunked-prefill-size", "48")
    common += ("--chat-template", "chatml")
    decoupled = ("--attn-tp-size", "1", "--dcp-comm-backend", "a2a")
    # Mixed chunks of MLA are refused; the MLA model has experts.
    decoupled += ("--enable-mixed-chunk",) if request.param == "llama" else ("--ep-size", "2")
    with Server(checkpoint, *common) as plain, Server(checkpoint, *common, *decoupled) as sharded:
        yield plain, sharded


@pytest.mark.server
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_answers_the_same(servers: tuple[Server, Server], feature: str) -> None:
    plain, sharded = servers
    assert FEATURES[feature](sharded) == FEATURES[feature](plain)


@pytest.mark.server
def test_log_probabilities_of_prompts_are_the_same(servers: tuple[Server, Server]) -> None:
    # Not rounded: a value between two round ones may fall to either side by the order of a sum.
    for (ours, token), (theirs, other) in zip(*map(input_logprobs, servers), strict=True):
        assert token == other
        assert abs(ours - theirs) < LOGPROB_TOLERANCE


@pytest.mark.server
def test_mixed_chunks_answer_the_same(servers: tuple[Server, Server]) -> None:
    """Long prompts arrive while short requests decode, so batches mix chunks and single tokens."""
    answers: list[list[Any]] = []
    for server in servers:
        results: list[Any] = [None] * 6
        threads = []
        for number in range(6):

            def ask(number: int = number, server: Server = server, results: Any = results) -> None:
                tokens = prompt(150 if number % 2 else 7, seed=number)
                results[number] = generate(server, tokens, max_new_tokens=24)["output_ids"]

            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(120)
        answers.append(results)
    assert None not in answers[0]
    assert answers[0] == answers[1]


@pytest.mark.server
def test_beams_are_refused(servers: tuple[Server, Server]) -> None:
    """By request, since nothing at the start says that they will come."""
    plain, sharded = servers
    assert generate(plain, prompt(9), beam_width=2)["output_ids"]
    with pytest.raises(ServerError, match="beam_width 2 is not supported with --attn-tp-size 1: "):
        generate(sharded, prompt(9), beam_width=2)
    assert generate(sharded, prompt(9), beam_width=1)["output_ids"]


@pytest.mark.server
def test_server_info_reports_the_layout(servers: tuple[Server, Server]) -> None:
    plain, sharded = (server.server_info() for server in servers)
    assert (plain["attn_tp_size"], plain["kvp_size"]) == (2, 1)
    assert (sharded["attn_tp_size"], sharded["kvp_size"]) == (1, 2)
    assert sharded["sglang_helix"]["series"]["dcp_replicate_q_proj"] is True


@pytest.mark.server
def test_metrics_of_every_rank(servers: tuple[Server, Server]) -> None:
    """Of a sharded server alone; its rows add up to its pool, and its batches have exchanged."""
    plain, sharded = servers
    assert "sglang_helix:" not in plain.get("/metrics")
    generate(sharded, prompt(40, seed=9), max_new_tokens=5)
    line = r"sglang_helix:(\w+){(.*)} ([\d.e+]+)"

    def idle() -> bool:
        """Whether both ranks have said that the prompt is cached, and nothing runs any more."""
        rows: dict[str, list[float]] = {"used": [], "cached": []}
        for _, labels, value in re.findall(line, sharded.get("/metrics")):
            if state := re.search(r'state="(used|cached)"', labels):
                rows[state[1]].append(float(value))
        return rows["used"] == [0, 0] and min(rows["cached"]) >= 20

    wait_until(idle)
    found: dict[str, dict[str, dict[str, float]]] = {"0": {}, "1": {}}
    for name, labels, value in re.findall(line, sharded.get("/metrics")):
        said = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        what = next((said[key] for key in ("state", "exchange", "peer") if key in said), "")
        found[said["tp_rank"]].setdefault(name, {})[what] = float(value)
        if name == "layout":
            assert (said["attn_tp_size"], said["dcp_size"]) == ("1", "2")
            assert (said["dcp_rank"], said["dcp_comm_backend"]) == (said["tp_rank"], "a2a")
    tokens = sharded.server_info()["sglang_helix"]["kv_tokens"]
    for of_rank in found.values():
        assert of_rank["layout"] == {"": 1}
        rows = of_rank["kv_rows"]
        assert rows["used"] == 0
        assert rows["cached"] >= 20
        assert rows["cached"] + rows["free"] == tokens // 2
        assert of_rank["exchanged_batches_total"]["a2a"] >= 4
        assert of_rank["exchanged_batches_total"]["none"] >= 1
        assert of_rank["exchange_slow_seconds"] == {"0": 0, "1": 0}


# The last to ask these servers.
@pytest.mark.server
def test_a_killed_rank_ends_the_server(
    servers: tuple[Server, Server], request: pytest.FixtureRequest
) -> None:
    """Under load: within a minute the server is gone, and no answer came after the kill."""
    server = servers[1]
    victim = ["llama", "deepseek_v2"].index(request.node.callspec.params["servers"])
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(generate(server, prompt(5), max_new_tokens=3000))
        except ServerError as refused:
            outcome.append(refused)

    asking = threading.Thread(target=ask)
    with prompts_are_taken(server):
        asking.start()
    os.kill(scheduler_pid(server.session, victim), signal.SIGKILL)
    assert server.wait_until_gone(60)
    asking.join(120)
    assert not asking.is_alive()
    assert isinstance(outcome[0], ServerError), outcome[0]


@pytest.mark.server
def test_pipeline_stages(tmp_path: Path) -> None:
    """Two stages of two ranks: KVP groups lie inside a stage."""
    checkpoint = make_checkpoint("llama", tmp_path / "llama")
    flags = ("--tp", "2", "--pp-size", "2", "--attn-tp-size", "1", "--dcp-comm-backend", "a2a")
    with Server(checkpoint, *flags, "--page-size", "1", "--chunked-prefill-size", "48") as server:
        for length in (1, 66, 130):
            check(checkpoint, prompt(length), server.generate(prompt(length), 5), 5)


@pytest.mark.server
def test_a_terminated_server_answers_first(tmp_path: Path) -> None:
    """SIGTERM under load: what runs is answered whole, then every process is gone."""
    checkpoint = make_checkpoint("llama", tmp_path / "llama")
    flags = ("--tp", "2", "--attn-tp-size", "1", "--dcp-comm-backend", "a2a")
    with Server(checkpoint, *flags) as server:
        answers: list[Any] = []
        requests = [
            threading.Thread(target=lambda n=n: answers.append((n, server.generate(prompt(n), 60))))
            for n in (5, 70)
        ]
        with prompts_are_taken(server, len(requests)):
            for request in requests:
                request.start()
        assert not answers, "too late: nothing runs any more"
        family = psutil.Process(server.session).children(recursive=True)
        os.kill(server.session, signal.SIGTERM)
        for request in requests:
            request.join(120)
        assert server.wait_until_gone(120)
        for length, answer in answers:
            check(checkpoint, prompt(length), answer, 60)
        assert len(answers) == len(requests)
        assert not psutil.wait_procs(family, timeout=60)[1]
