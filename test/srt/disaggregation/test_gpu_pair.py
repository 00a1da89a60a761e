"""A prefill server and a decode server by `symm`, on CUDA; asked both, as a router asks them."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sglang_cpu_reference
import torch
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.oracle import Oracle
from sglang_cpu_reference.server import Client, Server, free_port
from srt.expected import prompt
from srt.test_gpu_servers import CHUNK, NEW_TOKENS, compared, gpu_server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PAGE, RANKS = 64, 2
#: The edges of a page and of two ranks' widened one, and three chunks.
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, *(RANKS * PAGE + d for d in (-1, 0, 1)), 2 * CHUNK + 3)
FLAGS = (
    *("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK)),
    *("--max-total-tokens", "16384", "--disaggregation-transfer-backend", "mooncake_tcp"),
)
#: Sizes that the kernels of a GPU are written for, as in `test_gpu_servers`.
SIZES = {
    "llama": {"head_dim": 64},
    "deepseek_v2": {"qk_nope_head_dim": 128, "v_head_dim": 128, "num_experts_per_tok": 8},
}


class Pair(Client):
    """Two servers, of which each request goes to both, with a room of its own for each prompt."""

    def __init__(self, prefill: Client, decode: Client, bootstrap: int) -> None:
        super().__init__(decode.port)
        self.prefill, self.decode, self.bootstrap, self.rooms = prefill, decode, bootstrap, 1

    def post(self, path: str, body: Any, timeout: float = 600) -> Any:
        prompts = len(body["input_ids"])
        body |= {
            "bootstrap_host": ["127.0.0.1"] * prompts,
            "bootstrap_port": [self.bootstrap] * prompts,
            "bootstrap_room": [self.rooms + number for number in range(prompts)],
        }
        self.rooms += prompts
        with ThreadPoolExecutor(1) as beside:
            prefilled = beside.submit(self.prefill.post, path, body, timeout)
            answer = self.decode.post(path, body, timeout)
            prefilled.result()
        return answer


@contextmanager
def started(*servers: Server) -> Iterator[None]:
    """All at the same time; a server lives as long as the thread that started it."""
    with ThreadPoolExecutor(len(servers)) as threads, ExitStack() as stack:
        list(threads.map(stack.enter_context, servers))
        yield


def with_stand_in(server: Server, folder: Path) -> Server:
    """The server, to whose processes the stand-in for Mooncake's engine is Mooncake's."""
    package = folder / "mooncake"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    engine = "from sglang_cpu_reference.transfer_engine import TransferEngine as TransferEngine\n"
    (package / "engine.py").write_text(engine)
    paths = (folder, Path(sglang_cpu_reference.__file__).parents[1], server.env.get("PYTHONPATH"))
    server.env["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    return server


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("engine", ["stand-in", "mooncake"])
def test_symm_decodes_what_another_server_prefilled(
    tmp_path: Path, engine: str, family: str
) -> None:
    """The cache is carried by a stand-in for Mooncake's engine, and by the engine, by TCP."""
    if engine == "mooncake":
        pytest.importorskip("mooncake.engine", reason="needs mooncake-transfer-engine")
    model = make_checkpoint(family, tmp_path / family, **SIZES[family])
    oracle, clear, bootstrap = Oracle(model), 0, free_port()
    prompts = [prompt(length) for length in LENGTHS]
    meet = ("--disaggregation-bootstrap-port", str(bootstrap))
    prefill = gpu_server(model, "tp 1", *FLAGS, *meet, "--disaggregation-mode", "prefill")
    decode = gpu_server(model, "symm", *FLAGS, "--disaggregation-mode", "decode")
    if engine == "stand-in":
        prefill, decode = (with_stand_in(server, tmp_path) for server in (prefill, decode))
    with started(prefill, decode):
        pair = Pair(prefill, decode, bootstrap)
        answers = [pair.generate(tokens, NEW_TOKENS) for tokens in prompts]
        answers += pair.generate_batch(prompts, NEW_TOKENS)
        for tokens, answer in zip(2 * prompts, answers, strict=True):
            clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        assert clear > 50  # of the oracle's alone: 52 of llama, 68 of deepseek_v2
        assert "cuda graph: True" in decode.log()
        for server in (prefill, decode):
            server.flush_cache()  # which they do once nothing is held
