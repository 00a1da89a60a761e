"""Hooks: what an operator sees."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

METRICS: tuple[Hook, ...] = tuple(
    Hook(
        target=f"sglang.srt.managers.scheduler.Scheduler.{name}",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.observability.metrics_collector:{implementation}",
        signature=signature,
        why="SGLang's metrics know neither the rows of a rank nor its exchange",
        how=how,
        upstream="none",
        until="upstream exports them",
    )
    for name, signature, implementation, how in (
        ("emit_metrics_constants", "self", "start_metrics", "makes this rank's metrics"),
        (
            "process_batch_result",
            "self, batch, result",
            "count_batch",
            "counts the batch by its exchange, and reads the pool",
        ),
        ("on_idle", "self", "refresh_idle", "reads the pool once more"),
    )
)
