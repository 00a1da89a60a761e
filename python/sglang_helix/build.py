"""Models built without weights or GPUs, as rank 0 of all their ranks, for the loader's checks.

A model is built on PyTorch's meta device, in process groups that talk to nobody. That takes SGLang
as it is in a rank, and, on a machine without a GPU, a platform that model files can be imported on:
the CPU reference platform, where it is installed. So it happens in a process of its own, which
forks for each model.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


class Builder:
    """A process that builds models; it starts with the first one.

    Use as a context manager.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def build(self, argv: Sequence[str]) -> tuple[str, str]:
        """Build the model of a server's flags: the loader's refusal, what else stood in its way."""
        if self._process is None:
            environment = dict(os.environ)
            # As given on this machine; without a GPU no model file of SGLang's would be imported.
            if not has_gpu() and find_spec("sglang_cpu_reference"):
                environment["SGLANG_PLATFORM"] = "cpu_reference"
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        asked.write(json.dumps(list(argv)) + "\n")
        asked.flush()
        answer = answers.readline()
        if not answer:
            return "", f"the process that builds models ended ({self._process.wait()})"
        refused, problem = json.loads(answer)
        return refused, problem


def has_gpu() -> bool:
    """Whether SGLang sees an accelerator on this machine."""
    from sglang.srt.runtime_context import get_platform

    here = get_platform()
    return bool(here.is_cuda or here.is_hip or here.is_npu or here.is_xpu)


def first_line(text: str) -> str:
    """What a line of a table has room for."""
    return text.strip().splitlines()[0] if text.strip() else ""


def in_a_fork(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, JSON, in a process that says nothing besides; None: it ended.

    SGLang keeps what it resolved and built for its process.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # a collection would copy the pages of all that is imported
        try:
            os.close(read)
            _mute()
            said = json.dumps(function(*args))
            with os.fdopen(write, "w") as pipe:
                pipe.write(said)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


def _mute() -> None:
    """The log of a start is not the answer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def main() -> None:
    """Answer lines of flags by lines of [refusal, problem], until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    _mute()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if not has_gpu():
        # Every model file, once for all forks. Some ask the GPU as they are imported, and a fork of
        # a process that did can use it no more.
        import sglang.srt.models.registry  # noqa: F401
    for line in sys.stdin:
        answer = in_a_fork(_attempt, json.loads(line)) or ("", "its process ended")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _attempt(argv: list[str]) -> tuple[str, str]:
    from sglang_helix.srt.model_loader.loader import ModelRefusedError

    try:
        _build(argv)
    except ModelRefusedError as refused:
        return str(refused), ""
    except BaseException as problem:  # whatever a class meets on a machine that lacks its GPU
        return "", f"{type(problem).__name__}: {first_line(str(problem))}"
    return "", ""


def _build(argv: list[str]) -> None:
    # Quantization is left out: it decides the tensors of projections, which have no values here.
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(argv)
    args.resolve_once()
    with _ranks_that_are_not_there(args.tp_size):
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        model_config = join_groups(args, port=0)
        model_config.quantization = None
        with torch.device("meta"):
            loader._initialize_model(model_config, LoadConfig())


def join_groups(server_args: Any, port: int) -> Any:
    """What follows where a rank's arguments are published, on the CPU; the model's configuration.

    Process groups, which meet at a port, and what layers ask as they are built.
    """
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.distributed import bootstrap

    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port)
    model_config = model_config_of(server_args)
    bootstrap.init_layer_runtime(model_config=model_config)
    return model_config


@contextmanager
def _ranks_that_are_not_there(tp_size: int) -> Iterator[None]:
    """Within it every process group is PyTorch's "fake" one, whose collectives do nothing."""
    from unittest import mock

    import torch.distributed as dist
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 registers it

    from sglang_helix.srt.distributed.agreement import Agreement

    world, group, coordinator = dist.init_process_group, dist.new_group, GroupCoordinator.__init__

    def fake_world(*args: Any, rank: int = 0, world_size: int = 1, **kwargs: Any) -> None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        world(backend="fake", store=store, rank=rank, world_size=world_size)

    def fake_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return group(ranks, backend="fake")

    def alone(self: Any, *args: Any, **kwargs: Any) -> None:
        # No communicator beside the group: of NCCL, of peer access, of shared memory.
        coordinator(
            self, *args, **{k: False if k.startswith("use_") else v for k, v in kwargs.items()}
        )

    with (
        # SGLang would bind the ranks of a CPU to its cores.
        mock.patch.dict(os.environ, SGLANG_CPU_OMP_THREADS_BIND="|".join(["0"] * tp_size)),
        mock.patch.object(dist, "init_process_group", fake_world),
        mock.patch.object(dist, "new_group", fake_group),
        mock.patch.object(GroupCoordinator, "__init__", alone),
        # Nobody else speaks.
        mock.patch.object(Agreement, "verdict", return_value=None),
        mock.patch.object(Agreement, "overhear", return_value=None),
    ):
        yield


if __name__ == "__main__":
    main()
