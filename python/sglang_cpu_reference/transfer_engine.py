"""A stand-in for ``mooncake.engine``: one-sided writes into another process's memory, over TCP.

All of SGLang's Mooncake path runs above it, so that prefill-decode disaggregation can be tried
without RDMA. It is stricter than hardware: both ends of a write must lie in registered memory, and
of a batch with one that does not, nothing is written. Memory of a GPU is written through copies on
the host.
"""

import ctypes
import logging
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from sglang_cpu_reference.mooncake_store import MooncakeDistributedStore, registered

logger = logging.getLogger(__name__)

_COUNT = struct.Struct("<Q")
_REGION = struct.Struct("<QQ")
_DONE, _REFUSED = 0, -1


def install() -> None:
    """Make ``mooncake.engine`` and ``mooncake.store`` mean these, in this process."""
    package, module = ModuleType("mooncake"), ModuleType("mooncake.engine")
    store = ModuleType("mooncake.store")
    package.__path__ = []
    for made in (package, module, store):
        made.__spec__ = ModuleSpec(made.__name__, None)
        sys.modules[made.__name__] = made
    module.TransferEngine = TransferEngine  # type: ignore[attr-defined]
    store.MooncakeDistributedStore = MooncakeDistributedStore  # type: ignore[attr-defined]


class TransferEngine:
    """Mooncake's class of this name, as far as SGLang calls it.

    Its methods answer 0, or a negative number where they refuse. A session is ``host:port``.
    """

    def __init__(self) -> None:
        self._regions: dict[int, int] = {}
        self._on_gpu: dict[int, torch.Tensor] = {}
        self._links: dict[str, _Link] = {}
        self._lock = threading.Lock()

    def initialize(self, hostname: str, metadata: str, protocol: str, device: str) -> int:
        """Begin to serve other engines' writes."""
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

        if not torch.cuda.is_initialized():
            # Otherwise page numbers come in pinned memory with a CUDA event behind them.
            MooncakeKVSender.supports_host_tensor_indices = False
        self._server = socket.create_server(("", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return _DONE

    def get_rpc_port(self) -> int:
        """The port that sessions of this engine name."""
        return int(self._server.getsockname()[1])

    def register_memory(self, address: int, length: int) -> int:
        """Allow transfers from and to these bytes of this process."""
        if (region := on_gpu(address, length)) is not None:
            self._on_gpu[address] = region
        self._regions[address] = length
        return _DONE

    def unregister_memory(self, address: int) -> int:
        """Take back what `register_memory` has allowed."""
        self._on_gpu.pop(address, None)
        return _DONE if self._regions.pop(address, None) is not None else _REFUSED

    def batch_register_memory(self, addresses: Sequence[int], lengths: Sequence[int]) -> int:
        """`register_memory` for each."""
        return min(map(self.register_memory, addresses, lengths), default=_DONE)

    def batch_unregister_memory(self, addresses: Sequence[int]) -> int:
        """`unregister_memory` for each."""
        return min(map(self.unregister_memory, addresses), default=_DONE)

    def send_probe(self, session: str) -> int:
        """Whether the engine of a session can be reached."""
        return self.batch_transfer_sync_write(session, [], [], [])

    def transfer_sync_write(self, session: str, source: int, target: int, length: int) -> int:
        """Copy `length` bytes at `source` here to `target` in the process of the session."""
        return self.batch_transfer_sync_write(session, [source], [target], [length])

    def batch_transfer_sync_write(
        self,
        session: str,
        sources: Sequence[int],
        targets: Sequence[int],
        lengths: Sequence[int],
    ) -> int:
        """`transfer_sync_write` for each; all have been written when this returns 0."""
        if not all(map(self._registered, sources, lengths)):
            logger.error("a transfer to %s reads memory that is not registered", session)
            return _REFUSED
        body = b"".join(map(_REGION.pack, targets, lengths))
        data = b"".join(map(self._read, sources, lengths))
        with self._lock:
            link = self._links.setdefault(session, _Link(session))
        try:
            return link.ask(_COUNT.pack(len(targets)) + body + data)
        except OSError as failure:
            logger.error("no transfer to %s: %s", session, failure)
            return _REFUSED

    def _registered(self, address: int, length: int) -> bool:
        return registered(self._regions, address, length)

    def _view(self, address: int, length: int) -> torch.Tensor | None:
        """Registered bytes of a GPU, uint8 [length]; None where they are the host's."""
        for begin, region in list(self._on_gpu.items()):  # threads may register more
            if begin <= address < begin + len(region):
                return region[address - begin :][:length]
        return None

    def _read(self, address: int, length: int) -> bytes:
        view = self._view(address, length)
        return ctypes.string_at(address, length) if view is None else view.cpu().numpy().tobytes()

    def _write(self, address: int, piece: bytes) -> None:
        view = self._view(address, len(piece))
        if view is None:
            ctypes.memmove(address, piece, len(piece))
        else:
            view.copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))

    def _accept(self) -> None:
        while True:
            peer, _ = self._server.accept()
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """Carry out the writes that come over one connection, until it ends."""
        with peer, peer.makefile("rb") as stream:
            while header := stream.read(_COUNT.size):
                (count,) = _COUNT.unpack(header)
                regions = [_REGION.unpack(stream.read(_REGION.size)) for _ in range(count)]
                pieces = [stream.read(length) for _, length in regions]
                answer = _DONE
                for target, length in regions:
                    if not self._registered(target, length):
                        logger.error("a write of %d bytes at %d is not registered", length, target)
                        answer = _REFUSED
                if answer == _DONE:
                    for (target, _), piece in zip(regions, pieces, strict=True):
                        self._write(target, piece)
                peer.sendall(struct.pack("<b", answer))


def on_gpu(address: int, length: int) -> torch.Tensor | None:
    """These bytes, uint8 [length], where PyTorch has allocated them on a GPU; else None."""
    if not torch.cuda.is_initialized():
        return None
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return torch.as_tensor(_Bytes(address, length), device=f"cuda:{segment['device']}")
    return None


class _Bytes:
    """Memory of a GPU as PyTorch takes it from other libraries."""

    def __init__(self, address: int, length: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (length,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class _Link:
    """A connection to another engine, made when first used and again after it broke."""

    def __init__(self, session: str) -> None:
        self._address = session
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def ask(self, message: bytes) -> int:
        """Send, and wait for the answer; raises OSError where there is none."""
        with self._lock:
            try:
                if self._socket is None:
                    host, _, port = self._address.rpartition(":")
                    self._socket = socket.create_connection((host.strip("[]"), int(port)), 10)
                self._socket.sendall(message)
                if not (answer := self._socket.recv(1)):
                    raise ConnectionResetError("the other engine is gone")
            except OSError:
                self._socket = None
                raise
        return int(struct.unpack("<b", answer)[0])
