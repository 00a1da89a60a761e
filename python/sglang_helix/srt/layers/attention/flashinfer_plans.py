"""Plans of FlashInfer's kernels, of lengths that the host knows: none waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.speculative.spec_info import SpecInputType
from torch import Tensor

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def lens_on_host(forward_batch: ForwardBatch) -> Tensor:
    """Cached tokens of each request [B], where a plan is made: waits for none that it can have.

    The host's own lengths count the drafts for n-grams, whose step waits for the device anyway.
    """
    batch, drafted = forward_batch.batch_size, forward_batch.spec_info
    if drafted is not None and drafted.spec_input_type != SpecInputType.EAGLE_VERIFY:
        return forward_batch.seq_lens[:batch].cpu()
    if forward_batch.seq_lens_cpu is None:
        raise RuntimeError("the backend plans by lengths on the host, and this batch has none")
    return forward_batch.seq_lens_cpu[:batch]


_copied: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@contextmanager
def planned(wrapper: Any, device: str) -> Iterator[None]:
    """Around a plan of a wrapper of FlashInfer, made of lengths on the host.

    A wrapper writes its plan to pinned memory of its own and has it copied from there, and waits
    for neither copy nor kernels; only a plan of lengths on the device waits for these. The
    scheduler plans a batch while the one before may not have begun, so what that one is yet to copy
    would be overwritten. Here a plan waits for the copy of the wrapper's last one.
    """
    if wrapper in _copied:
        _copied[wrapper].synchronize()
    else:
        _copied[wrapper] = torch.get_device_module(device).Event()
    yield
    _copied[wrapper].record()
