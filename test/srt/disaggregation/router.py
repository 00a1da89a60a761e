"""SGLang's router before two servers that a test has started itself."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_cpu_reference.server import Client, Server, ServerError, free_port

EXAMPLES = Path(__file__).parents[3] / "examples"
#: The example of a family's attention; they differ in sizes alone, which are given.
EXAMPLE = {"llama": "pd_gqa.sh", "deepseek_v2": "pd_mla.sh"}


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
