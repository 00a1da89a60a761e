"""The helper has to notice every way in which a rank can fail."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from srt.distributed.ranks import RankError, World, collective_backend, run_ranks


def sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, int]:
    values = [None] * world_size
    dist.all_gather_object(values, rank + offset)
    return rank, sum(values)


def test_results_come_by_rank() -> None:
    assert run_ranks(sum_of_ranks, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def test_a_world_serves_several_runs_until_one_fails() -> None:
    with World(2) as world:
        assert world.run(sum_of_ranks, 0) == world.run(sum_of_ranks, 0) == [(0, 1), (1, 1)]
        with pytest.raises(RankError):
            world.run(raise_on_one)
        assert world.closed


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def return_the_unpicklable(rank: int, world_size: int) -> object:
    return lambda: None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raise_on_one, "rank 1 of 2: .*the reason"),
        (die_on_one, "rank 1 of 2: died"),
        (return_the_unpicklable, "rank 0 of 2: .*[Pp]ickl"),
    ],
)
def test_failures_are_told_at_once(function: object, reason: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=f"(?s){reason}"):
        run_ranks(function, 2, timeout=480.0)
    assert time.monotonic() - start < 240


def report_pid_and_hang(rank: int, world_size: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()))
    time.sleep(1000)


def test_hanging_ranks_are_killed_and_say_where(tmp_path: Path) -> None:
    with World(2) as world:
        world.run(sum_of_ranks, 0)  # they are up, however long that took
        with pytest.raises(RankError, match=r"(?s)did not finish;.*report_pid_and_hang"):
            world.run(report_pid_and_hang, str(tmp_path), timeout=5.0)
    for rank in range(2):
        pid = int((tmp_path / str(rank)).read_text())
        assert not os.path.exists(f"/proc/{pid}")


def read_environment(rank: int, world_size: int) -> str | None:
    return os.environ.get("HELIX_TEST_VARIABLE")


def test_environment_reaches_the_ranks() -> None:
    assert run_ranks(read_environment, 1, env={"HELIX_TEST_VARIABLE": "set"}) == ["set"]
    assert "HELIX_TEST_VARIABLE" not in os.environ


@pytest.mark.parametrize(
    ("gpus", "world_size", "share", "nccl", "outcome"),
    [
        (0, 8, "0", (2, 30, 7), "gloo"),
        (4, 4, "0", (2, 27, 0), "nccl"),
        (1, 2, "0", (2, 30, 7), "2 ranks need 2 GPUs, there are 1"),
        (1, 2, "1", (2, 29, 0), "from NCCL 2.30"),
        (1, 2, "1", (2, 30, 7), "nccl"),
    ],
)
def test_backend_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    world_size: int,
    share: str,
    nccl: tuple[int, ...],
    outcome: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: nccl)
    monkeypatch.setenv("HELIX_TEST_SHARE_GPUS", share)
    if outcome in ("gloo", "nccl"):
        assert collective_backend(world_size) == outcome
    else:
        with pytest.raises(pytest.skip.Exception, match=outcome):
            collective_backend(world_size)
