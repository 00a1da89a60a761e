"""What an operator sees of a sharded cache, beside SGLang's metrics (`--enable-metrics`).

Extends `observability/metrics_collector.py`. Every rank exports its own, by label `tp_rank`: rows
are lost, and exchanges wait, on one rank and not on another.
"""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.runtime_context import get_observability, get_parallel, get_spec

from sglang_helix.srt.compatibility.situation import replicates_v_proj
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.attention.prefixes import with_prefixes
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.managers.invariant_checker import slots_of
from sglang_helix.srt.models.value_switch import switch

LAYOUT = "sglang_helix:layout"
ROWS = "sglang_helix:kv_rows"
BATCHES = "sglang_helix:exchanged_batches"
WAITS = "sglang_helix:exchange_slow_seconds"


class Metrics:
    """The series' metrics of one scheduler.

    Args:
        scheduler: its pool, prefix tree and labels.
    """

    def __init__(self, scheduler: Any) -> None:
        # After the launcher has said where processes meet: prometheus_client asks at its import.
        from prometheus_client import Counter, Gauge

        parallel = get_parallel()
        layout = Layout(parallel.attn_tp_size, parallel.attn_dcp_size)
        self._scheduler, self._size = scheduler, layout.kvp_size
        # None where upstream exchanges: fi_a2a.
        self._exchanger: Exchanger | None = getattr(parallel.dcp_group, "exchanger", None)
        labels = {name: str(value) for name, value in scheduler.metrics_collector.labels.items()}
        names = list(labels)
        shape = {
            "attn_tp_size": str(layout.attn_tp_size),
            "dcp_size": str(layout.kvp_size),
            "attn_shard": str(layout.attn_shard(parallel.attn_tp_rank)),
            "dcp_rank": str(layout.kvp_rank(parallel.attn_tp_rank)),
            "dcp_comm_backend": parallel.dcp_comm_backend,
        }
        info = Gauge(
            LAYOUT,
            "1: head shards (A), ranks that split a sequence (K), this rank's of both, exchange.",
            [*names, *shape],
            multiprocess_mode="mostrecent",
        )
        info.labels(**labels, **shape).set(1)
        rows = Gauge(
            ROWS,
            "Rows of this rank's KV cache: used by requests, cached behind none, or free.",
            [*names, "state"],
            multiprocess_mode="mostrecent",
        )
        batches = Counter(
            BATCHES,
            "Batches by what their attention exchanged: an exchange by its name, latents of MLA "
            "that were gathered, or none.",
            [*names, "exchange"],
        )
        waits = Gauge(
            WAITS,
            "Seconds in which this rank's symm exchange waited some milliseconds or longer for "
            "rows of that place of its KVP group (peer).",
            [*names, "peer"],
            multiprocess_mode="mostrecent",
        )
        # Every batch sets them, and to find one by its labels takes longer than to set it.
        self._rows = {s: rows.labels(**labels, state=s) for s in ("used", "cached", "free")}
        self._waits = [waits.labels(**labels, peer=str(p)) for p in range(layout.kvp_size)]
        self._batches = functools.cache(lambda kind: batches.labels(**labels, exchange=kind))
        self.refresh()

    def refresh(self) -> None:
        """Read the pool, and what the exchange's watchdog has seen."""
        slots = slots_of(self._scheduler)
        cached = slots["evictable"]
        used = slots["slots"] - slots["free"] - cached
        for state, count in (("used", used), ("cached", cached), ("free", slots["free"])):
            self._rows[state].set(count // self._size)
        if self._exchanger:
            for gauge, seconds in zip(self._waits, self._exchanger.slow_seconds, strict=True):
                gauge.set(seconds)

    def count(self, batch: Any) -> None:
        """Count a batch that was run: of requests, not what an idle replica keeps step by."""
        mode = batch.forward_mode
        if not (mode.is_idle() or mode.is_prebuilt()):
            self._batches(self._exchange_of(batch)).inc()
        self.refresh()

    def _exchange_of(self, batch: Any) -> str:
        """What the attention of a batch exchanged: the same on every rank, captured or not."""
        backend = str(get_parallel().dcp_comm_backend)
        mode = batch.forward_mode
        if mode.is_extend() and not mode.is_target_verify():
            prefix = with_prefixes(batch.prefix_lens or (), batch.extend_lens or ())
            if prefix is None:
                return "none"
            if self._scheduler.tp_worker.model_runner.use_mla_backend:
                return "gather"
            tokens = prefix.tokens.stop - prefix.tokens.start
        else:
            tokens = batch.batch_size() * (get_spec().speculative_num_draft_tokens or 1)
        ours = self._exchanger
        if ours and ours.backend.kernel and tokens > ours.largest_prepared(self._width(tokens)):
            return "a2a"
        return backend

    def _width(self, tokens: int) -> int | None:
        """Of heads that such a batch exchanges, where another batch's have another."""
        if not (replicates_v_proj(self._scheduler.server_args) and switch().pays(tokens)):
            return None
        width: int = self._scheduler.tp_worker.model_runner.model_config.v_head_dim
        return width


def start_metrics(result: None, scheduler: Any) -> None:
    """After `Scheduler.emit_metrics_constants`: begin, where metrics are asked for."""
    scheduler.helix_metrics = Metrics(scheduler) if get_observability().enable_metrics else None


def count_batch(result_: Any, scheduler: Any, batch: Any, result: Any) -> None:
    """After `Scheduler.process_batch_result`: one more batch."""
    if scheduler.helix_metrics is not None:
        scheduler.helix_metrics.count(batch)


def refresh_idle(result: None, scheduler: Any) -> None:
    """After `Scheduler.on_idle`: what finished requests gave back."""
    if scheduler.helix_metrics is not None:
        scheduler.helix_metrics.refresh()
