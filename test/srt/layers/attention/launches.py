"""What a GPU would be given to do, counted on a CPU."""

from collections import defaultdict
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """What the device would be given to do, in order: operations that touch memory, by name."""

    # Of no device's work: views, and memory that nobody fills.
    FREE = (
        "view",
        "detach",
        "reshape",
        "slice",
        "select",
        "transpose",
        "permute",
        "unsqueeze",
        "alias",
    )
    FREE += ("empty", "empty_like", "new_empty", "_unsafe_view", "as_strided", "split", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def kernel(self, name: str) -> Any:
        """In the place of a kernel: notes that it was launched."""
        return defaultdict(lambda: lambda *args, **options: self.names.append(name))
