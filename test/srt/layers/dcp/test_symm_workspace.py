"""Where symmetric memory is refused, and what the watchdog takes for stuck; no GPU is asked."""

from __future__ import annotations

import itertools
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang_helix.srt.layers.dcp import symm_workspace
from sglang_helix.srt.layers.dcp.symm_layout import Layout
from sglang_helix.srt.layers.dcp.symm_workspace import (
    Stall,
    SymmExchange,
    Watchdog,
    _Probe,
    abort,
    is_available,
)

pytestmark = pytest.mark.quick


@pytest.fixture
def group(tmp_path: Path) -> Iterator[torch.distributed.ProcessGroup]:
    if torch.distributed.is_initialized():
        pytest.skip("another test left a process group behind")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_without_gpus_the_error_names_what_to_use(group: torch.distributed.ProcessGroup) -> None:
    assert "needs CUDA devices" in str(is_available(group))
    with pytest.raises(RuntimeError, match="use --dcp-comm-backend a2a instead of symm"):
        SymmExchange(group, 8, 8, 128, torch.bfloat16, torch.device("cpu"))


def test_memory_that_one_rank_cannot_have_is_an_error_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def empty(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    def make() -> None:
        with pytest.raises(RuntimeError, match="use --dcp-comm-backend a2a instead of symm") as no:
            SymmExchange(Group(), 8, 8, 128, torch.bfloat16, torch.device("cpu"))
        said.append(str(no.value))

    said: list[str] = []
    monkeypatch.setattr(symm_workspace, "is_available", lambda group: None)
    monkeypatch.setattr(symm_workspace, "_gather", gathered([..., None]))
    with monkeypatch.context() as broken:
        broken.setattr(symm_workspace.symm_mem, "empty", empty)
        make()
    assert "no symmetric memory on rank 0 of the KVP group (CUDA out of memory)" in said[0]
    # The other rank has its own, and learns of it.
    monkeypatch.setattr(symm_workspace, "_gather", gathered([said[0], ...]))
    monkeypatch.setattr(symm_workspace.symm_mem, "empty", torch.empty)
    make()
    assert "CUDA out of memory" in said[1]


def gathered(values: list[Any]) -> Callable[[Any, Any], list[Any]]:
    """A `_gather` of problems: `...` stands for this rank's; all ranks have the same layout."""

    def gather(group: Any, value: Any) -> list[Any]:
        if isinstance(value, Layout):
            return [value] * len(values)
        return [value if other is ... else other for other in values]

    return gather


def test_layouts_that_differ_are_refused_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = [Layout(2, 8, 128, torch.bfloat16, tokens) for tokens in (8, 16)]
    monkeypatch.setattr(symm_workspace, "is_available", lambda group: None)
    monkeypatch.setattr(symm_workspace, "_gather", lambda group, value: layouts)
    for layout in layouts:
        with pytest.raises(RuntimeError, match="lay out symm's memory differently") as refused:
            symm_workspace.between_ranks(Group(), layout, torch.device("cpu"))
        assert "max_tokens=8" in str(refused.value)
        assert "max_tokens=16" in str(refused.value)


class Group:
    """As much of a process group as is_available asks for."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def test_a_host_is_known_by_its_boot_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    boots = set()
    for name in ("one", "two"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        probe = _Probe.local()
        assert probe.name == name
        boots.add(probe.boot)
    assert boots == {Path("/proc/sys/kernel/random/boot_id").read_text().strip()}


@pytest.mark.parametrize(
    ("peer", "access", "reason"),
    [
        (_Probe("a1", "one", "GPU-b"), True, None),
        (_Probe("a1", "one", "GPU-b"), False, "GPU GPU-a has no peer access to that of rank 1"),
        (
            _Probe("a1", "one", "GPU-elsewhere"),
            False,
            None,
        ),  # not visible here: rendezvous will tell
        (_Probe("a1", "one", "GPU-a"), True, "share GPU GPU-a"),
        # Containers of one host are called differently, copies of one image the same.
        (_Probe("a1", "two", "GPU-b"), True, None),
        (
            _Probe("b2", "one", "GPU-b"),
            True,
            r"spans hosts \(one, boot a1, one, boot b2\)",
        ),
    ],
)
def test_peer_access(
    monkeypatch: pytest.MonkeyPatch, peer: _Probe, access: bool, reason: str | None
) -> None:
    mine = _Probe("a1", "one", "GPU-a")

    def gather(group: Any, value: Any) -> list[Any]:
        return [mine, peer] if isinstance(value, _Probe) else [value, None]

    class Properties:
        def __init__(self, index: int):
            self.uuid = ("GPU-a", "GPU-b")[index]

    monkeypatch.setattr(symm_workspace, "_gather", gather)
    monkeypatch.setattr(_Probe, "local", classmethod(lambda cls: mine))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: access)
    found = is_available(Group())
    if reason is None:
        assert found is None
    else:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(found)


def word(stall: Stall) -> int:
    """What the kernel writes for it."""
    return stall.epoch << 32 | stall.layer << 16 | stall.peer + 1


def said_of(monkeypatch: pytest.MonkeyPatch, epochs: Iterable[int]) -> list[Stall]:
    """Stalls by a watchdog of 0.4 s, of a program that reports these epochs 0.05 s apart."""
    now, coming, stalls = 0.0, iter(epochs), list[Stall]()

    def reported(_watchdog: Watchdog) -> torch.Tensor | None:
        nonlocal now
        now += 0.05
        epoch = next(coming, None)
        if epoch is None:
            return None
        return torch.tensor([0, 0, word(Stall(rank=3, peer=1, layer=60, epoch=epoch)), 0])

    monkeypatch.setattr(symm_workspace, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Watchdog, "_reported", reported)
    watchdog = Watchdog(torch.zeros(4, dtype=torch.int64), 3, 0.4, stalls.append)
    watchdog._thread.join(60)
    return stalls


def test_a_program_that_waits_for_ever_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stall = Stall(rank=3, peer=1, layer=60, epoch=2**31 - 1)
    assert said_of(monkeypatch, itertools.repeat(stall.epoch)) == [stall]
    assert str(stall) == (
        "symm exchange is stuck: rank 3 of the KVP group waits in layer 60, epoch 2147483647, "
        "for rank 1"
    )
    assert "for what is missing of rows that came in part" in str(stall._replace(peer=-1))


def test_seconds_of_waiting_are_counted_by_peer() -> None:
    """In twentieths: a wait of some milliseconds does not count as a second."""
    status = torch.zeros(4, dtype=torch.int64)
    watchdog = Watchdog(status, 0, 100.0, pytest.fail)
    for epoch in range(1, 4):
        status[1] = word(Stall(rank=0, peer=2, layer=5, epoch=epoch))
        status[3] = word(Stall(rank=0, peer=2, layer=5, epoch=epoch))
        while status.any():
            time.sleep(0.001)
    watchdog.stop()
    assert watchdog.slow_seconds == {2: pytest.approx(3 * 0.05)}


def test_slow_progress_is_not_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said_of(monkeypatch, (1 + i // 3 for i in range(30))) == []
    assert said_of(monkeypatch, (1 + i // 12 for i in range(30)))


def test_by_default_a_stall_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed = []
    monkeypatch.setattr("os.kill", lambda pid, with_signal: killed.append(with_signal))
    with caplog.at_level(logging.CRITICAL):
        abort(Stall(rank=0, peer=1, layer=2, epoch=3))
    assert killed == [signal.SIGABRT]
    assert "rank 0 of the KVP group waits in layer 2, epoch 3, for rank 1" in caplog.text
