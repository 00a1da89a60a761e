"""Weight updates that every rank agrees on, and MLA's replicas renewed by them, or given up.

Extends `model_executor/model_runner_components/weight_updater.py`. Upstream's ranks update each on
its own: where one of them fails, the others go on, and what rank 0 says is the answer. Here every
rank learns of every failure over the CPU group before anything else is done, so that the request
fails on all of them, and no rank waits in a collective that another one never enters.

A whole update then renews the replicas in place. Those of a failed one stay where no rank's weights
changed, and are given up otherwise: such a layer gathers its queries, or projects its values behind
the exchange. In a session of updates the replicas keep the weights of before it until its end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.managers.io_struct import EndWeightUpdateReqOutput
from sglang.srt.runtime_context import get_parallel

from sglang_helix.srt.model_executor import replicas
from sglang_helix.srt.model_executor.replicas import Replica

logger = logging.getLogger(__name__)


class WeightUpdateFailedError(RuntimeError):
    """The update failed on some rank; the same message is raised on every one."""


def receive(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Tensors of a bucket, received by every rank; raises WeightUpdateFailedError otherwise."""
    received, problem = _attempt(original, *args, **kwargs)
    if told := _agree(problem):
        raise WeightUpdateFailedError(told)
    return received


def load_bucket(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """One bucket of a session of updates: (whether every rank loaded it, message)."""
    result, problem = _attempt(original, *args, **kwargs)
    told = _agree(problem)
    return (False, told) if told else result


def update(
    original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """A whole update: (whether every rank has the new weights and replicas of them, message)."""
    result, problem = _attempt(original, updater, *args, **kwargs)
    told = _renewed(updater, _agree(problem))
    return (False, told) if told else result


def end(original: Callable[..., Any], updater: Any, **kwargs: Any) -> None:
    """End of a session of updates; raises WeightUpdateFailedError where `update` returns False."""
    _, problem = _attempt(original, updater, **kwargs)
    if told := _renewed(updater, _agree(problem)):
        raise WeightUpdateFailedError(told)


def end_session(original: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
    """The scheduler's answer to the end of a session: a failure is an answer, not its end."""
    try:
        return original(manager, recv_req)
    except WeightUpdateFailedError as failed:
        manager._session = None
        return EndWeightUpdateReqOutput(success=False, message=str(failed))


def _attempt(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str | None]:
    """(what was returned, why it failed on this rank or None)."""
    try:
        result = original(*args, **kwargs)
    except Exception as failure:
        logger.exception("weight update failed")
        return None, f"{type(failure).__name__}: {failure}"
    match result:
        case (False, message):
            return result, str(message)
    return result, None


def _agree(problem: str | None) -> str | None:
    """What failed on any rank, the same on all of them; None where nothing did. Collective."""
    problems = get_parallel().tp_group.all_gather_object(problem)
    if len(set(problems)) == 1:
        return problem
    return "; ".join(f"rank {rank}: {told}" for rank, told in enumerate(problems) if told)


def _renewed(updater: Any, failed: str | None) -> str | None:
    """Renew the replicas, or give up those that are stale; what failed, with what this adds."""
    runner = updater.get_model_runner()
    layers = dict(replicas.layers(updater.get_model()))
    problems, changed = [failed] if failed else [], False
    for replica, required in replicas.wanted(runner):
        replicated = {name for name, layer in layers.items() if replica.parts(layer)}
        reasons = {name: _reason(replica, layer, failed) for name, layer in layers.items()}
        lost = _of_any_rank(reasons)
        for name in lost:
            replica.drop(layers[name])
        if not failed:
            for name, layer in layers.items():
                if name not in lost:
                    replica.renew(layer)
                elif required or name in replicated:
                    problems.append(replica.refusal(name, lost[name]))
        changed |= replicated != {name for name, layer in layers.items() if replica.parts(layer)}
    if changed:
        _recapture(runner)
    return "; ".join(problems) or None


def _reason(replica: Replica, layer: Any, failed: str | None) -> str | None:
    """Why this rank cannot give a layer a new replica; after a failure, leave it the old one."""
    if not failed:
        return replica.obstacle(layer)
    # A rank that failed may not be able to take part in a gather. (None is current.)
    if replica.is_current(layer, get_parallel().dcp_group):
        return None
    return "the update that failed changed its weights"


def _of_any_rank(reasons: Mapping[str, str | None]) -> dict[str, str]:
    """By layer, the first reason of any rank, the same on all of them. Collective."""
    found: dict[str, str] = {}
    for of_rank in reversed(get_parallel().tp_group.all_gather_object(dict(reasons))):
        found |= {name: reason for name, reason in of_rank.items() if reason}
    return found


def _recapture(runner: Any) -> None:
    """Captured graphs hold the way in which each layer gets its queries, and projects values."""
    if runner.decode_cuda_graph_runner not in (None, runner.eager_runner):
        runner.recapture_decode_cuda_graph()
