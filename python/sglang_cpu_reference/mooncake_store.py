"""A stand-in for ``mooncake.store``: a store that all ranks and servers share, in a folder.

SGLang's own path to the store runs above it. What hardware would do without a word is refused here:
pages are read and written in registered memory alone, and a page is as long as it was.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

_REFUSED = -1


def registered(regions: dict[int, int], address: int, length: int) -> bool:
    """Whether bytes of this process are inside a region, of which these are address and length."""
    return any(
        begin <= address and address + length <= begin + size
        for begin, size in list(regions.items())  # threads may register more
    )


class MooncakeDistributedStore:
    """Mooncake's class of this name, as far as SGLang calls it with whole pages.

    Its methods answer 0, or a negative number where they refuse.
    """

    def __init__(self) -> None:
        self._regions: dict[int, int] = {}

    def setup(
        self,
        hostname: str,
        metadata: str,
        segment: int,
        buffer: int,
        protocol: str,
        device: str,
        master: str,
        engine: object = None,
    ) -> int:
        """Join the store; the address of its master is the path of its folder here."""
        self._folder = Path(master)
        self._folder.mkdir(parents=True, exist_ok=True)
        return 0

    def register_buffer(self, address: int, length: int) -> int:
        """Allow pages to be read and written there."""
        self._regions[address] = length
        return 0

    def put(self, key: str, value: bytes) -> int:
        """Keep a value."""
        path = self._path(key)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(value)
        fresh.rename(path)
        with (self._folder / "keys").open("a") as keys:
            keys.write(f"{key}\n")
        return 0

    def get(self, key: str) -> bytes:
        """The value that was kept, or none."""
        return self._path(key).read_bytes() if self.is_exist(key) else b""

    def is_exist(self, key: str) -> int:
        """1 where the key has a value."""
        return int(self._path(key).exists())

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        """`is_exist` for each."""
        return [self.is_exist(key) for key in keys]

    def batch_put_from(
        self, keys: Sequence[str], addresses: Sequence[int], lengths: Sequence[int]
    ) -> list[int]:
        """Keep what stands at these addresses."""
        return self._each(self._put_from, keys, addresses, lengths)

    def batch_get_into(
        self, keys: Sequence[str], addresses: Sequence[int], lengths: Sequence[int]
    ) -> list[int]:
        """Write values to these addresses; for each how long it is."""
        return self._each(self._get_into, keys, addresses, lengths)

    def _each(
        self,
        call: Callable[[str, int, int], int],
        keys: Sequence[str],
        addresses: Sequence[int],
        lengths: Sequence[int],
    ) -> list[int]:
        asked = zip(keys, addresses, lengths, strict=True)
        return [call(*page) if registered(self._regions, *page[1:]) else _REFUSED for page in asked]

    def _put_from(self, key: str, address: int, length: int) -> int:
        return self.put(key, ctypes.string_at(address, length))

    def _get_into(self, key: str, address: int, length: int) -> int:
        value = self.get(key)
        if len(value) != length:
            return _REFUSED
        ctypes.memmove(address, value, length)
        return length

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()
