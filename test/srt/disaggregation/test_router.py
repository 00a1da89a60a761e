"""A client that asks SGLang's router, which asks a prefill server and a sharded decode server."""

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Client, Server, ServerError, free_port
from srt.disaggregation.pair import IMPATIENT
from srt.expected import check, prompt

EXAMPLES = Path(__file__).parents[3] / "examples"
#: The example of a family's attention; they differ in sizes alone, which are given.
EXAMPLE = {"llama": "pd_gqa.sh", "deepseek_v2": "pd_mla.sh"}
NEW_TOKENS = 6
PAGE, RANKS, CHUNK = 64, 2, 128
#: The edges of a page and of two ranks' widened one, and three chunks.
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, *(RANKS * PAGE + d for d in (-1, 0, 1)), 2 * CHUNK + 9)


@contextmanager
def router(
    family: str, prefill: Server, decode: Server, bootstrap: str, log: Path
) -> Iterator[Client]:
    """The router of `examples/`, once it knows both servers."""
    client = Client(free_port())
    ports = {"PREFILL": prefill.port, "DECODE": decode.port}
    env = {name: f"127.0.0.1:{port}" for name, port in ports.items()} | {"BOOTSTRAP": bootstrap}
    example = EXAMPLES / EXAMPLE[family]
    command = [example, "router", "--host", "127.0.0.1", "--port", str(client.port)]
    # Its own has one number for every router of a machine, and ends the second one.
    command += ["--prometheus-port", str(free_port())]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=os.environ | env, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 300
        while True:
            try:
                client.get("/readiness")
                break
            except ServerError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield client
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.server
@pytest.mark.parametrize("family", EXAMPLE)
def test_answers_through_the_router(tmp_path: Path, family: str) -> None:
    """Eight at once, twice; then the prefill server is killed as it serves eight more.

    Its clients hear of it, and so do later ones; the decode server holds nothing for them.
    """
    pytest.importorskip("sglang_router", reason="needs sglang-router")
    model = make_checkpoint(family, tmp_path / family, num_hidden_layers=2)
    bootstrap = str(free_port())
    sizes = ("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
    prompts = [prompt(length) for length in LENGTHS]
    with (
        Server(
            model,
            *("--disaggregation-mode", "prefill", *sizes),
            *("--disaggregation-bootstrap-port", bootstrap),
        ) as prefill,
        Server(
            model,
            *("--disaggregation-mode", "decode", *sizes),
            *("--tp", str(RANKS), "--dcp-size", str(RANKS), "--dcp-comm-backend", "a2a"),
            "--disaggregation-decode-enable-radix-cache",
            late_env=IMPATIENT,
        ) as decode,
        router(family, prefill, decode, bootstrap, tmp_path / "router.log") as client,
        ThreadPoolExecutor(len(prompts)) as clients,
    ):
        for _ in range(2):  # the second time from the prefix caches of both servers
            answers = list(clients.map(lambda p: client.generate(p, NEW_TOKENS), prompts))
            for tokens, answer in zip(prompts, answers, strict=True):
                check(model, tokens, answer, NEW_TOKENS)
        assert sum(answer.cached_tokens for answer in answers) > 0
        batch = client.generate_batch(prompts, NEW_TOKENS)
        for tokens, answer in zip(prompts, batch, strict=True):
            check(model, tokens, answer, NEW_TOKENS)

        began = time.monotonic()
        others = [prompt(4 * CHUNK, seed=1 + number) for number in range(len(prompts))]
        asked = [clients.submit(client.generate, tokens, NEW_TOKENS) for tokens in others]
        prefill.kill_node(0)
        asked.append(clients.submit(client.generate, prompts[0], NEW_TOKENS))
        refused = [answer.exception(120) for answer in asked]
        assert all(isinstance(error, ServerError | None) for error in refused)
        assert isinstance(refused[-1], ServerError)
        decode.post("/flush_cache?timeout=60", None)  # which it does once nothing is held
        assert time.monotonic() - began < 120
        assert decode.get("/health") == ""
