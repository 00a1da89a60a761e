"""Hooks: projections that every rank of a KVP group holds."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

QPROJ: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.model_executor.model_runner:load_model",
        signature="self",
        why="MLA's replicas are made after the pool is sized, so their memory is not counted; "
        "weights that cannot be replicated are skipped with a warning; values have none",
        how="gathers them once the model is loaded, in memory that is released with the "
        "weights', and refuses where they were asked for",
        upstream="sgl-project/sglang#21637",
        until="upstream accounts for the replicas and refuses",
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner._prepare_replicated_q_proj",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.model_executor.model_runner:prepare_replicated_q_proj",
        signature="self",
        why="would gather them a second time, at other addresses",
        how="does nothing: see load_model",
        upstream="sgl-project/sglang#21637",
        until="see load_model",
    ),
    *(
        Hook(
            target="sglang.srt.model_executor.model_runner_components.weight_updater"
            f".WeightUpdater.{method}",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.model_executor.weight_updater:{impl}",
            signature=signature,
            why="a rank that fails is not noticed by the others; the replicas of MLA keep the "
            "weights of before the update: wrong tokens",
            how="ranks agree on success; a whole update that succeeded renews the replicas in "
            "place, one that failed gives up those that are stale",
            upstream="none",
            until="upstream's ranks agree, and it renews the replicas",
        )
        for method, impl, signature in (
            (
                "update_weights_from_disk",
                "update",
                "self, model_path, load_format, weight_name_filter=, recapture_cuda_graph=",
            ),
            ("update_weights_from_ipc", "update", "self, recv_req"),
            (
                "receive_weights_from_distributed",
                "receive",
                "self, names, dtypes, shapes, group_name, load_format=",
            ),
            ("load_weights_from_distributed", "load_bucket", "self, named_tensors"),
            ("update_weights_from_tensor", "load_bucket", "self, named_tensors, load_format="),
            ("end_weight_update", "end", "self, run_post_load"),
        )
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.weight_updater"
        ".SchedulerWeightUpdaterManager.end_weight_update",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.model_executor.weight_updater:end_session",
        signature="self, recv_req",
        why="the end of a session of updates cannot fail but by ending the server",
        how="answers with the failure that every rank agreed on",
        upstream="none",
        until="upstream's ranks agree, and it renews the replicas",
    ),
)
