"""Hooks: which heads a rank's projections hold."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

HEADS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.layers.linear.QKVParallelLinear.__init__",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.layers.linear:qkv_parallel_linear_init",
        signature="self, hidden_size, head_size, total_num_heads, total_num_kv_heads=, bias=, "
        "skip_bias_add=, params_dtype=, quant_config=, prefix=, load_presharded_attn=, "
        "v_head_size=, skip_block_quant_check=, parallel_group=, kv_parallel_group=",
        why="ranks of a KVP group would compute different key-value heads",
        how="shards key-value heads by A while the model is built",
        upstream="sgl-project/sglang#34355",
        until="upstream's models shard key-value heads by tp / dcp",
    ),
    Hook(
        target="sglang.srt.model_loader.loader._initialize_model",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.model_loader.loader:initialize_model",
        signature="model_config, load_config, quant_config=",
        why="see QKVParallelLinear",
        how="sets the scope, then fits and checks every attention layer, or refuses the model",
        upstream="sgl-project/sglang#34355",
        until="see QKVParallelLinear",
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner_components.weight_exporter"
        ".WeightExporter.get_weights_by_name",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.model_executor.weight_exporter:get_weights_by_name",
        signature="self, name, truncate_size=",
        why="cuts keys and values out of the joint projection by N: other matrices' rows",
        how="asks the projection for the rows that it holds",
        upstream="none",
        until="upstream's models ask their projections",
    ),
)
