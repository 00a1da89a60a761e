"""The stand-in for Mooncake's engine: what it writes, and what it refuses."""

import ctypes

import pytest
import torch
from sglang_cpu_reference import transfer_engine
from sglang_cpu_reference.transfer_engine import TransferEngine

pytestmark = pytest.mark.quick


@pytest.fixture
def engines() -> tuple[TransferEngine, TransferEngine, str]:
    """Two engines, and the session of the second."""
    ours, theirs = TransferEngine(), TransferEngine()
    for engine in (ours, theirs):
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    return ours, theirs, f"127.0.0.1:{theirs.get_rpc_port()}"


def on_another_device(address: int, length: int) -> torch.Tensor:
    """Stands in for what PyTorch says of memory that the host cannot reach."""
    return torch.frombuffer((ctypes.c_char * length).from_address(address), dtype=torch.uint8)


@pytest.mark.parametrize(
    "device",
    [
        *("cpu", "another"),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_writes_what_both_sides_have_registered(
    engines: tuple[TransferEngine, TransferEngine, str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    ours, theirs, session = engines
    if device == "another":
        device = "cpu"
        monkeypatch.setattr(transfer_engine, "on_gpu", on_another_device)
        monkeypatch.setattr(ctypes, "string_at", pytest.fail)
        monkeypatch.setattr(ctypes, "memmove", pytest.fail)
    source, target = torch.arange(100.0, device=device), torch.zeros(100, device=device)
    size = source.element_size()
    assert ours.register_memory(source.data_ptr(), 100 * size) == 0
    assert theirs.batch_register_memory([target.data_ptr()], [60 * size]) == 0

    def write(starts: list[int], to: list[int], counts: list[int]) -> int:
        return ours.batch_transfer_sync_write(
            session,
            [source.data_ptr() + start * size for start in starts],
            [target.data_ptr() + start * size for start in to],
            [count * size for count in counts],
        )

    assert write([10, 90], [0, 50], [5, 10]) == 0
    assert target[:5].tolist() == [10, 11, 12, 13, 14]
    assert target[50:60].tolist() == list(range(90, 100))
    before = target.clone()
    # One past the end of what they, then we, have registered; the first piece is not written.
    assert write([20, 90], [0, 51], [5, 10]) < 0
    assert write([91], [0], [10]) < 0
    assert theirs.batch_unregister_memory([target.data_ptr()]) == 0
    assert write([20], [0], [5]) < 0
    assert torch.equal(target, before)
    assert ours.unregister_memory(target.data_ptr()) < 0


def test_a_peer_that_is_gone_is_an_error(
    engines: tuple[TransferEngine, TransferEngine, str],
) -> None:
    ours, _, session = engines
    assert ours.send_probe(session) == 0
    assert ours.send_probe("127.0.0.1:1") < 0
