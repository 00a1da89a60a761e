"""The real server, ``python -m sglang.launch_server``, as a context manager with a small client.

with Server(checkpoint, "--tp", "2") as server:
    server.generate([1, 2, 3], max_new_tokens=8)
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from sglang_cpu_reference import PLATFORM_NAME, warm
from sglang_cpu_reference.forkserver import die_with_parent
from sglang_cpu_reference.oracle import Completion


class ServerError(RuntimeError):
    """The server did not start, died, or refused; the message ends with the tail of its log."""


class Generation(NamedTuple):
    """One answer: the completion, its text, and SGLang's own account of the request."""

    completion: Completion
    text: str
    meta_info: dict[str, Any]

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came out of the prefix cache."""
        return int(self.meta_info["cached_tokens"])


class Client:
    """What asks a server, or a router, that listens at a port of the loopback interface."""

    def __init__(self, port: int) -> None:
        self.port = port

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        *,
        top_logprobs: int = 5,
        **sampling_params: Any,
    ) -> Generation:
        """Complete one prompt, text or token ids; greedily and to the full length by default."""
        return self.generate_batch(
            [prompt], max_new_tokens, top_logprobs=top_logprobs, **sampling_params
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        *,
        top_logprobs: int = 5,
        **sampling_params: Any,
    ) -> list[Generation]:
        """Complete prompts sent in one request; all of them text, or all of them token ids."""
        key = "text" if isinstance(prompts[0], str) else "input_ids"
        answers = self.post(
            "/generate",
            {
                key: list(prompts),
                "sampling_params": {
                    "temperature": 0,
                    "ignore_eos": True,
                    "max_new_tokens": max_new_tokens,
                    **sampling_params,
                },
                "return_logprob": True,
                "top_logprobs_num": top_logprobs,
            },
        )
        return [_generation(answer) for answer in answers]

    def server_info(self) -> dict[str, Any]:
        """SGLang's resolved arguments and internal state."""
        return self.get("/server_info")

    def flush_cache(self) -> None:
        """Empty the prefix cache, once the server is idle."""
        self.post("/flush_cache?timeout=120", None)

    def get(self, path: str, timeout: float = 60) -> Any:
        """The JSON (or, where it is not JSON, the text) that a GET of the path answers."""
        return self._request(urllib.request.Request(self._url(path)), timeout)

    def post(self, path: str, body: Any, timeout: float = 600) -> Any:
        """The JSON (or text) that a POST of the body, as JSON, answers."""
        request = urllib.request.Request(
            self._url(path),
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return self._request(request, timeout)

    def log(self, lines: int | None = None) -> str:
        """What is shown of the server where it does not answer: nothing is known here."""
        return ""

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _request(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise ServerError(
                f"{request.full_url} answered {error.code}: {error.read().decode()}"
            ) from error
        except OSError as error:
            raise ServerError(
                f"{request.full_url} did not answer ({error})\n{self.log(40)}"
            ) from error
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text


class Server(Client):
    """A server process on a free loopback port, and nothing left of it afterwards.

    checkpoint: model directory. flags: command line flags as one would type them. platform: value
    of SGLANG_PLATFORM (None: SGLang chooses, e.g. CUDA). env: further environment variables.
    late_env: those that nothing reads at import. start_timeout: seconds until health before
    ServerError; held_until: what it waits for is a file, and they count from when that is there.
    progress: report while starting, on stderr or to a function. cold: start the command itself even
    where servers are forked. prelude: Python code that a forked launcher runs before anything else.
    nodes: launchers that share the ranks, as on so many hosts; requests go to the first.
    node_flags: what single nodes are given besides, by their number. A server lives at most as long
    as the thread that started it.
    """

    #: Whether this process forks its servers on the CPU platform instead (see `warm`); those with
    #: further environment variables that may be read at import are never forked.
    forks: ClassVar[bool] = False

    def __init__(
        self,
        checkpoint: Path | str,
        *flags: str,
        platform: str | None = PLATFORM_NAME,
        env: Mapping[str, str] | None = None,
        late_env: Mapping[str, str] | None = None,
        start_timeout: float = 300,
        held_until: Path | None = None,
        progress: bool | Callable[[str], None] = True,
        cold: bool = False,
        prelude: str = "",
        nodes: int = 1,
        node_flags: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(free_port())
        self.command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint)),
            *("--host", "127.0.0.1", "--port", str(self.port), *flags),
        ]
        self.nodes, self._node_flags = nodes, node_flags or {}
        self._meet_at = f"127.0.0.1:{free_port()}"
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {}), **(late_env or {})}
        if platform is not None:
            self.env["SGLANG_PLATFORM"] = platform
        self.start_timeout, self._held_until = start_timeout, held_until
        self.progress = progress
        self.start_seconds: float | None = None
        self.warm = self.forks and platform == PLATFORM_NAME and not env and not cold
        self._prelude = prelude
        if prelude and not self.warm:
            raise ValueError("prelude: this server is not forked")
        self._processes: list[subprocess.Popen[bytes] | warm.Forked] = []
        self._log_paths: list[Path] = []

    def __enter__(self) -> Self:
        for node in range(self.nodes):
            self._launch(node)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        for process in self._processes:
            process.terminate()
        for node, process in enumerate(self._processes):
            if node == 0:  # the others wait for it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=15)
            self.kill_node(node)
        for path in self._log_paths:
            path.unlink(missing_ok=True)

    def kill_node(self, node: int) -> None:
        """Kill the launcher and all ranks of a node, as if its host were gone."""
        process = self._processes[node]
        with contextlib.suppress(ProcessLookupError):  # raised when nobody is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _launch(self, node: int) -> None:
        command = self.command
        if self.nodes > 1:
            place = ("--nnodes", str(self.nodes), "--node-rank", str(node))
            port = ("--port", str(free_port())) if node else ()
            meet = ("--dist-init-addr", self._meet_at)
            command = [*command, *place, *meet, *port, *self._node_flags.get(node, ())]
        log, name = tempfile.mkstemp(prefix="sglang-server-", suffix=".log")
        self._log_paths.append(Path(name))
        process: subprocess.Popen[bytes] | warm.Forked
        if self.warm:
            process = warm.source().start(command[3:], self.env, Path(name), self._prelude)
        else:
            # A session of its own, so that the whole family can be signalled at once.
            process = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A test runner that is killed must not leave a server behind.
                preexec_fn=die_with_parent,  # noqa: PLW1509 one system call, no lock taken
            )
        os.close(log)
        self._processes.append(process)

    @property
    def session(self) -> int:
        """Session of all of the first node's processes, and its launcher's process."""
        return self._processes[0].pid

    def wait_until_gone(self, timeout: float, node: int = 0) -> bool:
        """Whether a node's launcher ends by itself within so many seconds."""
        try:
            self._processes[node].wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def log(self, lines: int | None = None, node: int = 0) -> str:
        """A node's log so far, or its last lines."""
        text = self._log_paths[node].read_text(errors="replace")
        return text if lines is None else "\n".join(text.splitlines()[-lines:])

    def _wait_until_healthy(self) -> None:
        start = reported = time.monotonic()
        while True:
            if self._held_until and not self._held_until.exists():
                start = time.monotonic()
            elapsed = time.monotonic() - start
            if any(process.poll() is not None for process in self._processes):
                raise ServerError(self._ended(elapsed))
            if elapsed > self.start_timeout:
                raise ServerError(
                    f"the server was not healthy after {self.start_timeout:.0f} s\n{self.log(60)}"
                )
            if self._healthy():
                self.start_seconds = elapsed
                self._report(f"up after {elapsed:.0f} s")
                return
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                last = self.log(1).strip()[:100]
                self._report(
                    f"starting, {elapsed:.0f} s of at most {self.start_timeout:.0f}: {last}"
                )
            time.sleep(0.2)

    def _ended(self, elapsed: float) -> str:
        """How a start has failed. One node's end has the others end soon."""
        for node in range(self.nodes):
            self.wait_until_gone(60, node)
        stories = []
        for node, process in enumerate(self._processes):
            named = f"node {node} of the server" if self.nodes > 1 else "the server"
            outcome = f"{named} exited with status {process.returncode} after {elapsed:.0f} s"
            if process.returncode is None:
                outcome = f"{named} is still there"
            stories.append(f"{outcome}\n{self.log(60, node)}")
        return "\n".join(stories)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self._url("/health"), timeout=20) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _report(self, what: str) -> None:
        if callable(self.progress):
            self.progress(what)
        elif self.progress:
            print(f"[server :{self.port}] {what}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago.

    Servers bind it many seconds later, so it is none of those that systems hand out meanwhile, to
    outgoing connections for example: these begin at 32768.
    """
    for port in random.SystemRandom().sample(range(20_000, 31_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports between 20000 and 31000 is free")


def _generation(answer: Mapping[str, Any]) -> Generation:
    meta = answer["meta_info"]
    chosen = meta["output_token_logprobs"]
    return Generation(
        Completion(
            token_ids=[token for _, token, _ in chosen],
            logprobs=[logprob for logprob, _, _ in chosen],
            top=[
                [(token, logprob) for logprob, token, _ in position]
                for position in meta.get("output_top_logprobs") or []
            ],
        ),
        answer["text"],
        meta,
    )
