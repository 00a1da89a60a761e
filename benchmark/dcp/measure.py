"""Timing of short device work: graph replay over rotating buffers, in alternating order.

A single call is too short to time alone, and its inputs would stay in the L2. So a sample is one
replay of a CUDA graph that holds the call once per set of buffers, divided by the number of sets;
together the sets exceed the L2. Candidates take turns, forwards and then backwards, so that a
drifting clock favours none. On a CPU a sample is a loop over the sets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median, quantiles

import torch

Call = Callable[[], torch.Tensor]

_ROTATE = 2  # sets of buffers together, in units of the L2
_MIN_SETS = 4
_ALONE = 32  # a call of so many L2s finds next to nothing there of the call before


@dataclass
class Timing:
    """Microseconds per call."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def p10(self) -> float:
        return quantiles(self.samples, n=10, method="inclusive")[0]

    @property
    def p90(self) -> float:
        return quantiles(self.samples, n=10, method="inclusive")[-1]


def sets_to_rotate(device: torch.device, bytes_per_call: int) -> int:
    """How many sets of buffers a timing needs so that they do not stay in the cache."""
    if device.type != "cuda":
        return _MIN_SETS
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if bytes_per_call >= _ALONE * cache:
        return 1
    return max(_MIN_SETS, -(-_ROTATE * cache // bytes_per_call))


class Rotation:
    """One candidate's calls, one per set of buffers, ready to be run as a whole.

    Args:
        calls: at least one.
        device: of the buffers; on a CPU nothing is captured.
        capture: whether a run is one replay of a CUDA graph, or the calls one by one.
        stream: to capture on; None: one of torch's.

    Attributes:
        outputs: what the calls return; every run writes there anew.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        device: torch.device,
        *,
        capture: bool = True,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.device = device
        self.calls = calls
        self.graph: torch.cuda.CUDAGraph | None = None
        calls[0]()  # compiles
        if device.type != "cuda" or not capture:
            self.outputs = [call() for call in calls]
            return
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.outputs = [call() for call in calls]
        self.graph = graph

    def run(self) -> None:
        if self.graph:
            self.graph.replay()
        else:
            self.outputs = [call() for call in self.calls]

    def checked_outputs(self) -> list[torch.Tensor]:
        """Outputs of the first and the last set after a run that found them poisoned."""
        for out in (self.outputs[0], self.outputs[-1]):
            out.view(torch.uint8).fill_(0xFF)  # NaN in every float format
        self.run()
        return [self.outputs[0], self.outputs[-1]]

    def sample(self, count: int) -> list[float]:
        """Microseconds per call of each of ``count`` runs."""
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(count):
                self.run()
                marks.append(time.perf_counter())
            spans = [1e6 * (b - a) for a, b in pairwise(marks)]
        else:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            events[0].record()
            for event in events[1:]:
                self.run()
                event.record()
            torch.cuda.synchronize()
            spans = [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]
        return [span / len(self.calls) for span in spans]


def take_turns(rotations: dict[str, Rotation], samples: int) -> dict[str, Timing]:
    """Time candidates in alternating order, A B ... B A, with ``samples`` each per turn."""
    timings = {name: Timing() for name in rotations}
    for name in rotations:
        rotations[name].sample(2)
    for turn in (list(rotations), list(reversed(rotations))):
        for name in turn:
            timings[name].samples += rotations[name].sample(samples)
    return timings


def launches(call: Call) -> int | None:
    """Kernels and copies that one call puts on the device, as torch.profiler counts them."""
    if not torch.cuda.is_available():
        return None
    # Beyond its last level: else every trace says on stderr that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in trace.events())
