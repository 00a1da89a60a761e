"""Hooks: process groups, their collectives, and the exchange."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

EXCHANGE: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.distributed.parallel_state.initialize_model_parallel",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.distributed.parallel_state:initialize_model_parallel",
        signature="backend=, duplicate_tp_group=, enable_symm_mem=, recovered_rank=, "
        "rank_offset=, max_world_size=",
        why="upstream builds its DCP group on CUDA, HIP, NPU and XPU only",
        how="builds the same group where upstream refuses the platform",
        upstream="sgl-project/sglang#26432",
        until="the platform gate goes",
    ),
    Hook(
        target="sglang.srt.distributed.parallel_state.GroupCoordinator.all_to_all_single",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.distributed.all_to_all:group_all_to_all_single",
        signature="self, output, input",
        why="equal splits only, no check of its arguments, no CPU tensors",
        how="validated, uneven splits, any dtype, gloo, one custom op",
        upstream="sgl-project/sglang#21637",
        until="upstream's takes splits and checks its arguments",
    ),
    Hook(
        target="sglang.srt.distributed.device_communicators.pynccl.PyNcclCommunicator"
        ".all_to_all_single",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.distributed.device_communicators.pynccl:pynccl_all_to_all_single",
        signature="self, output_tensor, input_tensor",
        why="right for one dimension only; leaves the output unset when disabled",
        how="bytes, any shape and split, ncclAlltoAll where the library has it",
        upstream="sgl-project/sglang#32560",
        until="upstream's does the same",
    ),
    Hook(
        target="sglang.srt.layers.dcp.comm.dcp_a2a_lse_reduce",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.layers.dcp.comm:dcp_a2a_lse_reduce",
        signature="cp_attn_out, cp_attn_lse, cp_group, is_lse_base_on_e=, "
        "cuda_graph_buffers=, comm_backend=",
        why="an empty shard's NaN reaches the result; 4-byte rows; power-of-two sizes only",
        how="the series' exchange; fi_a2a stays upstream's",
        upstream="sgl-project/sglang#34614",
        until="upstream's combine masks empty shards",
    ),
    Hook(
        target="sglang.srt.layers.dcp.comm.cp_lse_ag_out_rs_mha",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.layers.dcp.comm:cp_lse_ag_out_rs_mha",
        signature="cp_attn_out, cp_attn_lse, cp_group, return_lse=",
        why="all-reduces what it then slices; a +inf LSE zeroes every rank's share",
        how="the series' exchange: a true reduce-scatter",
        upstream="sgl-project/sglang#25090",
        until="upstream's reduce-scatters and masks",
    ),
    Hook(
        target="sglang.srt.layers.dcp.comm.cp_lse_ag_out_rs_mla",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.layers.dcp.comm:cp_lse_ag_out_rs_mla",
        signature="cp_attn_out, cp_attn_lse, cp_group, ctx=, is_lse_base_on_e=",
        why="an empty shard's NaN is spread to all ranks; power-of-two sizes only",
        how="the series' exchange",
        upstream="sgl-project/sglang#14194",
        until="upstream's masks empty shards",
    ),
    Hook(
        target="sglang.srt.layers.dcp.comm.all_gather_q_for_mla_decode",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.layers.dcp.comm:all_gather_q_for_mla_decode",
        signature="q_nope_out, q_pe",
        why="gathers the rope part in front of the latent, which kernels that take both as one "
        "want behind it: a copy of all heads' queries in each layer",
        how="gathers them in that order, and returns views",
        upstream="none",
        until="upstream's gathers the latent first",
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.model_executor.model_runner:prepare_exchange",
        signature="self",
        why="an exchange that one machine gets wrong shows in answers alone; symmetric memory "
        "is allocated by all ranks at once, before the pool is sized and graphs are captured",
        how="allocates it for the heads, widths and dtype of the loaded model; tries every "
        "exchange once against a reference, and stops all ranks where one gets it wrong",
        upstream="sgl-project/sglang#33364, #40539",
        until="upstream tries its exchanges",
    ),
)
