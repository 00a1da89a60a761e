"""All ranks of all nodes run the same, or none serves. Extends `distributed/bootstrap.py`.

Each node has a launcher of its own, which hears from its own ranks (`entrypoints/engine.py`).
Between nodes nobody compares: a rank with another exchange, page or chunk would leave its peers in
a collective for good, or read what they send by another layout. So every rank says what it runs in
the store that `init_process_group` met at, before any group of the layout is built, and ranks
whose cache is sharded by the series go on only when all have said the same.

Ranks of upstream's layouts owe one another nothing here: they say what they run and go on. They
end only if a rank of the series has found that it cannot work with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sglang_helix import helix
from sglang_helix.srt.managers.scheduler import series_of

logger = logging.getLogger(__name__)

#: Seconds for which a rank may be silent: all have just met in `init_process_group`.
PATIENCE = 30.0
#: Seconds that rank 0, whose process is the store, stays for the others to read its verdict.
STAY = 5.0
_POLL = 0.02
_MINUTE = 60.0
_KEY = "sglang_helix"
_VERDICT = f"{_KEY}/verdict"
_READERS = f"{_KEY}/readers"
_REPORT = f"{_KEY}/report"

# Resolved arguments by which a rank admits, chunks, batches and computes. Each goes by its own.
_ARGUMENTS = (
    *("pp_size", "dp_size", "ep_size", "attn_dp_size"),
    *("page_size", "context_length", "max_total_tokens", "max_running_requests"),
    *("chunked_prefill_size", "max_prefill_tokens", "prefill_max_requests"),
    *("enable_mixed_chunk", "enable_dynamic_chunking", "disable_overlap_schedule"),
    *("num_continuous_decode_steps", "schedule_policy", "schedule_conservativeness"),
    *("enable_priority_scheduling", "retraction_policy"),
    *("disable_radix_cache", "radix_eviction_policy", "enable_hierarchical_cache"),
    *("dtype", "kv_cache_dtype", "quantization", "cuda_graph_config", "enable_lora"),
    *("speculative_algorithm", "speculative_num_steps", "speculative_num_draft_tokens"),
)


class Agreement:
    """What the ranks of one world say in its store.

    Args:
        store: `torch.distributed` store that all ranks share; rank 0's process holds it.
        rank, world_size: this rank and how many there are.
        nodes: nodes that they are on, in equal shares of consecutive ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int, nodes: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._nodes = nodes

    @classmethod
    def of_process(cls) -> Agreement:
        """This process's end, once SGLang has initialised its world."""
        import torch.distributed as dist
        from sglang.srt.runtime_context import get_parallel

        store = dist.distributed_c10d._get_default_store()
        return cls(store, dist.get_rank(), dist.get_world_size(), get_parallel().nnodes)

    def another(self) -> Agreement:
        """The same over a connection of its own, for a thread: a store serves one call a time."""
        return Agreement(self._store.clone(), self._rank, self._world_size, self._nodes)

    def publish(self, facts: Mapping[str, Any]) -> None:
        """Say what this rank runs: JSON values by name."""
        said = {"host": socket.gethostname(), "runs": dict(facts)}
        self._store.set(f"{_KEY}/{self._rank}", json.dumps(said))

    def verdict(self, patience: float) -> str | None:
        """Wait until all ranks have said what they run; None where it is the same, else why not.

        The first rank that finds a difference, or loses its patience, speaks for all.
        """
        deadline = time.monotonic() + patience
        while not (self._has(_VERDICT) or self._has(*self._keys())):
            if time.monotonic() > deadline:
                self._store.set(_VERDICT, self._silence(patience))
            else:
                time.sleep(_POLL)
        if not self._has(_VERDICT):
            said = [json.loads(self._store.get(key)) for key in self._keys()]
            if problem := self._differences(said):
                self._store.set(_VERDICT, problem)
        return self._store.get(_VERDICT).decode() if self._has(_VERDICT) else None

    def overhear(self, seconds: float = PATIENCE + STAY) -> str | None:
        """Wait for a verdict of others for so long; None where there is none."""
        deadline = time.monotonic() + seconds
        while not self._has(_VERDICT):
            if time.monotonic() > deadline:
                return None
            time.sleep(10 * _POLL)
        return self._store.get(_VERDICT).decode()

    def leave(self, stay: float = STAY) -> None:
        """Before ending over a verdict: rank 0 goes last, or the others would lose the store."""
        self._store.add(_READERS, 1)
        if self._rank == 0:
            speakers = sum(self._has(key) for key in self._keys())
            deadline = time.monotonic() + stay
            while self._store.add(_READERS, 0) < speakers and time.monotonic() < deadline:
                time.sleep(_POLL)

    def gather(self, report: Any, limit: float) -> list[Any] | None:
        """The reports of all ranks, JSON values by rank, on rank 0; None on the others.

        Raises SeriesError where one is missing after so many seconds, and says every minute who.
        """
        self._store.set(f"{_REPORT}/{self._rank}", json.dumps(report))
        if self._rank:
            return None
        keys = [f"{_REPORT}/{rank}" for rank in range(self._world_size)]
        began, due = time.monotonic(), _MINUTE
        while not self._has(*keys):
            time.sleep(_POLL)
            waited = time.monotonic() - began
            if waited < min(due, limit):
                continue
            silent = [rank for rank, key in enumerate(keys) if not self._has(key)]
            missing = f"{self._named(silent)} {_have(silent)} not been ready for {waited:.0f} s"
            if waited >= limit:
                raise helix.SeriesError(f"{missing}: see the log of that node")
            logger.warning("%s; waiting", missing)
            due += _MINUTE
        return [json.loads(self._store.get(key)) for key in keys]

    def _keys(self) -> list[str]:
        return [f"{_KEY}/{rank}" for rank in range(self._world_size)]

    def _has(self, *keys: str) -> bool:
        return bool(self._store.check(list(keys)))

    def _silence(self, patience: float) -> str:
        silent = [rank for rank, key in enumerate(self._keys()) if not self._has(key)]
        return (
            f"{self._named(silent)} {_have(silent)} not said within {patience:.0f} s what "
            "they run, and without the series their answers would be wrong: see the log of that "
            f"node, {helix.RUN_THE_SAME}."
        )

    def _differences(self, said: list[dict[str, Any]]) -> str | None:
        problems = []
        for name in sorted({name for one in said for name in one["runs"]}):
            values: dict[str, list[int]] = {}
            for rank, one in enumerate(said):
                values.setdefault(repr(one["runs"].get(name)), []).append(rank)
            if len(values) > 1:
                named = (
                    f"{value} on {self._named(ranks, said)}" for value, ranks in values.items()
                )
                problems.append(f"{name} is {', '.join(named)}")
        if not problems:
            return None
        return (
            f"the ranks do not run the same: {'; '.join(problems)}. Start every node with the "
            "same flags, the same model and the same installation, or leave them to their defaults."
        )

    def _named(self, ranks: list[int], said: list[dict[str, Any]] | None = None) -> str:
        """The ranks in words, with their nodes, and with their hosts where they have said them."""
        nodes = sorted({rank * self._nodes // self._world_size for rank in ranks})
        where = f"{'node' if len(nodes) == 1 else 'nodes'} {_listed(nodes)}"
        if said:
            where += f", {_listed(sorted({said[rank]['host'] for rank in ranks}))}"
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {_listed(ranks)} ({where})"


def agree(result: None, *args: Any, **kwargs: Any) -> None:
    """After `init_distributed_environment`: this rank's part, once in its process.

    Ends the process with the reason where the ranks do not run the same. Ranks that join a running
    world (elastic EP) find nobody to compare with, and have nothing to shard.
    """
    from sglang.srt.runtime_context import get_exec, get_parallel, publish_role

    if publish_role() != "scheduler" or get_exec().moe.is_ep_joiner:
        return
    sharded = "serve" in helix.installed_stages()
    if get_parallel().nnodes == 1 and not sharded:
        return
    agreement = Agreement.of_process()
    agreement.publish(what_runs())
    if not sharded:
        # SGLang's next step may wait in the store for long.
        other = agreement.another()
        threading.Thread(target=_end_with_the_others, args=(other,), daemon=True).start()
    elif problem := agreement.verdict(PATIENCE):
        agreement.leave()
        raise SystemExit(_said(problem))


def _end_with_the_others(agreement: Agreement) -> None:
    """On a rank of upstream's layout, which would wait for ranks of the series that have ended."""
    if problem := agreement.overhear():
        _said(problem)
        agreement.leave()
        os._exit(1)


def _said(problem: str) -> str:
    message = f"sglang-helix: {problem}"
    logger.error(message)
    print(message, file=sys.stderr, flush=True)
    return message


def what_runs() -> dict[str, Any]:
    """What must be the same on every rank, as JSON values: software, flags as resolved, model."""
    import torch
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.runtime_context import (
        attention_backends,
        get_server_args,
        process_model_config,
    )

    from sglang_helix.srt.layers.dcp.exchange import GATHER_VARIABLE, gathers_by_kernel

    args = resolved_view(get_server_args())
    config = _plain(process_model_config().hf_config.to_dict())
    config.pop("_name_or_path", None)  # nodes may keep the model at different places
    return {
        **series_of(helix.installed_stages()),
        "sources": _digest(_sources()),
        "sglang": helix.installed_sglang(),
        "torch": torch.__version__,
        "nccl": list(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "attention_backends": list(attention_backends()),
        GATHER_VARIABLE: gathers_by_kernel(),
        "model": _digest([json.dumps(config, sort_keys=True).encode()]),
        **{name: _plain(getattr(args, name)) for name in _ARGUMENTS},
    }


def _sources() -> Iterable[bytes]:
    """The package as it is on this node: a checkout may differ at the same version."""
    root = Path(__file__).parents[2]
    for path in sorted(root.rglob("*.py")):
        yield f"{path.relative_to(root)}\n".encode()
        yield path.read_bytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def _plain(value: Any) -> Any:
    """A JSON value that is the same in every process: of other objects, their type."""
    if value is None or isinstance(value, str | int | float):
        return value
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=repr)
    return type(value).__name__


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _have(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
