"""A client that asks SGLang's router, which asks a prefill server and a sharded decode server.

All three are those of `examples/one_machine.sh`.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Client, ServerError
from srt.disaggregation.pair import IMPATIENT
from srt.expected import check, expected, prompt
from srt.underway import scheduler_pid, wait_until
from srt.warm_python import environment
from transformers import AutoTokenizer

ONE_MACHINE = Path(__file__).parents[3] / "examples" / "one_machine.sh"
NEW_TOKENS = 6
PAGE, RANKS, CHUNK = 64, 2, 128
#: The edges of a page and of two ranks' widened one, and three chunks.
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, *(RANKS * PAGE + d for d in (-1, 0, 1)), 2 * CHUNK + 9)
#: How long a prefill server waits for a decode server that has not said where its rows are.
PATIENCE = {"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "25"}
FLAGS = (
    f"--page-size {PAGE} --chunked-prefill-size {CHUNK} --disaggregation-decode-enable-radix-cache"
)


class Machine(NamedTuple):
    """What the script has started, and the completion that it has shown."""

    shown: dict[str, Any]
    router: Client
    prefill: Client
    decode: Client
    model: Path


@contextmanager
def one_machine(example: str, model: Path | None) -> Iterator[Machine]:
    """The script as it runs a command, which waits until this is left.

    model: None for the one that it makes.
    """
    # Seconds that only what hangs meets.
    command = ["timeout", "900", ONE_MACHINE, example]
    command += ["bash", "-c", "echo $ROUTER $PREFILL $DECODE $MODEL; read"]
    given = {"FLAGS": FLAGS} | ({"MODEL": str(model)} if model else {})
    with environment() as env:
        script = subprocess.Popen(
            command,
            env={**env, **IMPATIENT, **PATIENCE, **given},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with script:  # closes its input, and waits
            assert script.stdout is not None
            shown = script.stdout.readline()
            assert shown, "the script ended"
            *addresses, used = script.stdout.readline().split()
            clients = [Client(int(address.split(":")[1])) for address in addresses]
            yield Machine(json.loads(shown), *clients, Path(used))


def session_of(server: Client) -> int:
    """The session, and launcher, of a server of this machine, by the port at which it listens."""
    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    return os.getsid(next(c.pid for c in listening if c.laddr.port == server.port))


def loads(server: Client) -> dict[str, Any]:
    """What the one scheduler of a server has to do."""
    (load,) = server.get("/v1/loads")["loads"]
    return dict(load)


def held_by(server: Client) -> int:
    """Requests that have come to a server and are not answered."""
    load = loads(server)
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


def kill_prefill(machine: Machine, clients: ThreadPoolExecutor) -> list[Future[Any]]:
    """As it serves eight requests."""
    launcher = session_of(machine.prefill)
    os.kill(scheduler_pid(launcher, 0), signal.SIGSTOP)  # none is answered before
    others = [prompt(4 * CHUNK, seed=1 + number) for number in range(len(LENGTHS))]
    asked = [clients.submit(machine.router.generate, tokens, NEW_TOKENS) for tokens in others]
    wait_until(lambda: held_by(machine.decode) == len(others))
    os.killpg(launcher, signal.SIGKILL)
    return asked


def kill_decode(machine: Machine, clients: ThreadPoolExecutor) -> list[Future[Any]]:
    """As it generates tokens of eight requests, which the router then tries once more."""
    others = [prompt(CHUNK, seed=1 + number) for number in range(len(LENGTHS))]
    asked = [clients.submit(machine.router.generate, tokens, 1500) for tokens in others]
    wait_until(lambda: loads(machine.decode)["num_running_reqs"] == len(others))
    os.killpg(session_of(machine.decode), signal.SIGKILL)
    return asked


@pytest.mark.server
@pytest.mark.parametrize(
    ("example", "family", "kill", "left"),
    [
        ("pd_gqa", None, kill_prefill, "decode"),
        ("pd_mla", "deepseek_v2", kill_decode, "prefill"),
    ],
)
def test_answers_through_the_router(
    tmp_path: Path,
    example: str,
    family: str | None,
    kill: Callable[[Machine, ThreadPoolExecutor], list[Future[Any]]],
    left: str,
) -> None:
    """Eight at once, twice; then one server is killed as it serves eight more.

    Their clients hear of it, as does one that comes later, and the other server holds nothing for
    them.
    """
    pytest.importorskip("sglang_router", reason="needs sglang-router")
    prompts = [prompt(length) for length in LENGTHS]
    given = make_checkpoint(family, tmp_path / family, num_hidden_layers=2) if family else None
    with one_machine(example, given) as machine, ThreadPoolExecutor(len(prompts)) as clients:
        model, client = machine.model, machine.router
        text = AutoTokenizer.from_pretrained(model)("Sequence-sharded caches").input_ids
        assert machine.shown["output_ids"] == expected(model, tuple(text), 8).token_ids
        info = machine.decode.server_info()
        assert (info["attn_tp_size"], info["kvp_size"]) == (1, RANKS)
        for _ in range(2):  # the second time from the prefix caches of both servers
            answers = list(clients.map(lambda p: client.generate(p, NEW_TOKENS), prompts))
            for tokens, answer in zip(prompts, answers, strict=True):
                check(model, tokens, answer, NEW_TOKENS)
        assert sum(answer.cached_tokens for answer in answers) > 0
        batch = client.generate_batch(prompts, NEW_TOKENS)
        for tokens, answer in zip(prompts, batch, strict=True):
            check(model, tokens, answer, NEW_TOKENS)

        asked = kill(machine, clients)
        began = time.monotonic()
        assert all(isinstance(answer.exception(120), ServerError) for answer in asked)
        with pytest.raises(ServerError):
            client.generate(prompts[0], NEW_TOKENS)
        other = getattr(machine, left)
        other.post("/flush_cache?timeout=60", None)  # which it does once nothing is held
        assert time.monotonic() - began < 120
        assert other.get("/health") == ""
