"""Sliding windows and sinks in SGLang's schedulers, against transformers.

Window layers with a pool of their own keep it whole, and full layers are sharded; other windows are
cut by owner. The load goes across the window's edge in decode and in chunks, hits the prefix cache
and comes back after retraction; a rank that is idle checks that no slot of any pool is lost.
"""

import itertools
import json
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES, Family, make_checkpoint
from srt.expected import check, check_all, prompt
from srt.fresh import Fresh
from srt.models.serving import command_line, oversubscribed, serve, serve_by_each

WINDOW = 16
NEW_TOKENS = 6
PAGE = 2
CHUNK = 38
BATCHES = (
    (prompt(2 * CHUNK + 5, seed=10),),
    # One token; decode from within the window to beyond it; exactly at its edge; long.
    (prompt(1, seed=11), prompt(WINDOW - 3, seed=12), prompt(WINDOW, seed=13), prompt(60, seed=14)),
    (prompt(2 * CHUNK + 5, seed=10) + prompt(6, seed=15),),
)


FLAGS = ("--attention-backend", "fa3", "--moe-runner-backend", "triton", "--dcp-size", "2")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


def test_gpt_oss_equals_transformers(kernels: Fresh, gpt_oss: Path) -> None:
    """With each exchange."""
    flags = (*FLAGS, "--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
    flags += ("--max-total-tokens", "256")
    load = (("a2a", "ag_rs"), BATCHES, NEW_TOKENS, True)
    by_rank = serve_by_each(kernels, gpt_oss, 4, flags, *load)
    for report in itertools.chain.from_iterable(by_rank):
        check_all(gpt_oss, BATCHES, report.answers, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > CHUNK


COMMON = {**FAMILIES["llama"].config, "sliding_window": WINDOW, "num_hidden_layers": 4}
ALTERNATING = {"layer_types": ["full_attention", "sliding_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Heads of 16 in what takes their width from the hidden size.
OTHERS = {
    "granite_swa": Family(  # sinks in every layer; no position in one
        "granite_swa",
        {
            **COMMON,
            **ALTERNATING,
            "head_dim": 16,
            "layer_rope_theta": [10000.0, 10000.0, 0.0, 10000.0],
            "attention_multiplier": 0.25,
            "logits_scaling": 0.5,
        },
    ),
    "mellum": Family(
        "mellum",
        {
            **COMMON,
            **ALTERNATING,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        },
    ),
    "mimo_v2_flash": Family(  # sinks and more key-value heads in windows, short values
        "mimo_v2_flash",
        {
            **COMMON,
            **ALTERNATING,
            "head_dim": 48,
            "v_head_dim": 32,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "rope_parameters": {
                "full_attention": {**ROPE, "partial_rotary_factor": 0.334},
                "sliding_attention": {**ROPE, "partial_rotary_factor": 0.334},
            },
        },
        {
            "rope_parameters": {
                **ROPE,
                "full_attention": {**ROPE, "partial_rotary_factor": 0.334},
                "sliding_attention": {**ROPE, "partial_rotary_factor": 0.334},
            },
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.334,
            "layernorm_epsilon": 1e-6,
            "hybrid_layer_pattern": [0, 1] * 2,
            "moe_layer_freq": [0, 1] * 2,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_shared_experts": None,
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": WINDOW,
            "attention_chunk_size": WINDOW,
            "swa_num_attention_heads": 8,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 48,
            "swa_v_head_dim": 32,
        },
    ),
    "laguna": Family(  # more query heads in windows
        "laguna",
        {
            **COMMON,
            **ALTERNATING,
            "num_attention_heads_per_layer": [8, 16, 8, 16],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "rope_parameters": {
                "full_attention": {**ROPE, "partial_rotary_factor": 0.5},
                "sliding_attention": {**ROPE, "partial_rotary_factor": 1.0},
            },
        },
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_windows_equal_transformers(ready: Fresh, tmp_path: Path, family: str) -> None:
    model = make_checkpoint(OTHERS[family], tmp_path)
    flags = ("--attention-backend", "torch_native", "--dcp-size", "2", "--dcp-comm-backend", "a2a")
    flags += ("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
    flags += ("--max-total-tokens", "256", "--dtype", "float32")
    for report in serve(ready, model, 4, flags, BATCHES, NEW_TOKENS, retracting=True):
        check_all(model, BATCHES, report.answers, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > CHUNK


# Published with another class for its text, without pictures: SGLang's reads the same weights.
STEP_3_7 = Family(
    "step3p7",
    {
        "text_config": {
            **COMMON,
            **ALTERNATING,
            "num_sliding_attention_heads": 16,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "share_expert_dim": 64,
            "moe_router_scaling_factor": 2.0,
            "rope_theta": [10000.0, 1000.0] * 2,
            "partial_rotary_factors": [0.5, 1.0] * 2,
        },
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "mlp_ratio": 2.0,
        },
    },
)
STEP_3_5 = {
    **COMMON,
    **ALTERNATING,
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "torch_dtype": "float32",
    "num_attention_groups": 2,
    "attention_other_setting": {"num_attention_heads": 16, "num_attention_groups": 2},
    "use_head_wise_attn_gate": True,
    "moe_layers_enum": "1,3",
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_intermediate_size": 64,
    "share_expert_dim": 64,
    "moe_router_scaling_factor": 2.0,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "swiglu_limits": [0.0] * 4,
    "swiglu_limits_shared": [0.0] * 4,
    "rope_theta": [10000.0, 1000.0] * 2,
    "partial_rotary_factors": [0.5, 1.0] * 2,
    "per_layer_config": {},  # transformers derives one that SGLang cannot read
}


def test_step_equals_transformers(kernels: Fresh, tmp_path: Path) -> None:
    oracle, served = make_checkpoint(STEP_3_7, tmp_path / "3.7"), tmp_path / "3.5"
    served.mkdir()
    for file in oracle.iterdir():
        (served / file.name).symlink_to(file)
    (served / "config.json").unlink()
    (served / "config.json").write_text(json.dumps(STEP_3_5))
    flags = (*FLAGS, "--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
    flags += ("--max-total-tokens", "256", "--dtype", "float32")
    for report in serve(kernels, served, 4, flags, BATCHES, NEW_TOKENS, retracting=True):
        check_all(oracle, BATCHES, report.answers, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > CHUNK


CUT_COMMON = {**COMMON, "num_key_value_heads": 1}
REVERSED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA = {**CUT_COMMON, **REVERSED, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Windows in the pool of all layers.
CUT = {
    # Logits of about 3 are capped in attention, where it shows.
    "gemma2": Family(
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 4.0},
        {"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma3": Family(
        "gemma3_text",
        {**GEMMA, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    ),
    "exaone4": Family(  # SGLang knows one base of its rotary embedding
        "exaone4",
        {
            **CUT_COMMON,
            **REVERSED,
            "sliding_window_pattern": "LG",
            "head_dim": 16,
            "rope_parameters": {**ROPE, "rope_theta": 1000000.0},
        },
    ),
    "cohere2": Family(
        "cohere2",
        {
            **CUT_COMMON,
            **REVERSED,
            "logit_scale": 0.5,
            "head_dim": 16,
            "layer_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    ),
    # Command-A+, its norms centred: SGLang knows no other, transformers takes rms_norm_eps for a
    # norm that is not.
    "cohere2_moe": Family(
        "cohere2_moe",
        {
            **CUT_COMMON,
            **REVERSED,
            **EXPERTS,
            "logit_scale": 0.5,
            "head_dim": 16,
            "rms_norm_eps": None,
            "layer_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "num_shared_experts": 1,
            "expert_selection_fn": "sigmoid",
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
            "prefix_dense_intermediate_size": 256,
            "intermediate_size": 64,
        },
        {"first_k_dense_replace": 1},
    ),
    "exaone_moe": Family(  # K-EXAONE
        "exaone_moe",
        {
            **CUT_COMMON,
            **REVERSED,
            **EXPERTS,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "head_dim": 16,
            "rope_parameters": {**ROPE, "rope_theta": 1000000.0},
        },
        {"is_moe_layer": [False, True] * 2},
    ),
    "afmoe": Family(  # Trinity; its experts are Triton only
        "afmoe",
        {**CUT_COMMON, **REVERSED, **EXPERTS, "num_dense_layers": 4, "mup_enabled": True},
    ),
}


@pytest.mark.parametrize("family", CUT)
def test_cut_windows_equal_transformers(kernels: Fresh, tmp_path: Path, family: str) -> None:
    model = make_checkpoint(CUT[family], tmp_path)
    flags = (*FLAGS, "--dcp-comm-backend", "a2a")
    flags += ("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
    flags += ("--max-total-tokens", "256", "--dtype", "float32")
    for report in serve(kernels, model, 2, flags, BATCHES, NEW_TOKENS, retracting=True):
        check_all(model, BATCHES, report.answers, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > CHUNK


GEMMA_4 = Family(
    "gemma4",
    {
        "text_config": {
            **COMMON,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "global_head_dim": 64,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": COMMON["vocab_size"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                },
                "sliding_attention": ROPE,
            },
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 16,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        "tie_word_embeddings": False,
    },
    {"language_model_only": True},
)


def test_gemma4_equals_transformers(interpreted: Fresh, tmp_path: Path) -> None:
    """Other widths and heads in windows; on Hopper SGLang takes Triton alone for it."""
    model = make_checkpoint(GEMMA_4, tmp_path)
    flags = ("--dcp-size", "2", "--dcp-comm-backend", "a2a", "--max-running-requests", "4")
    flags += ("--attention-backend", "triton", "--chunked-prefill-size", "16")
    batch = [prompt(length, seed=6) for length in (1, 19)]
    batches = [batch, batch[1:]]
    for report in serve(interpreted, model, 2, flags, batches, 3, retracting=True):
        check_all(model, batches, report.answers, 3)
        assert report.answers[-1][0].cached_tokens == 18


@pytest.mark.parametrize(("family", "ranks"), [("gpt_oss", 4), ("exaone4", 2)])
def test_small_pools_retract_and_resume(
    kernels: Fresh, gpt_oss: Path, tmp_path: Path, family: str, ranks: int
) -> None:
    """Requests that no pool can hold at once; chunks are mixed with what decodes."""
    model = make_checkpoint(CUT[family], tmp_path) if family in CUT else gpt_oss
    new_tokens = 36
    prompts = [prompt(20, seed=seed) for seed in range(16, 24)]
    flags = (*FLAGS, "--page-size", "1", "--max-total-tokens", "128", "--enable-mixed-chunk")
    flags += ("--chunked-prefill-size", "33", "--schedule-conservativeness", "0.05")
    argv = command_line(model, ranks, *flags)
    for answers in kernels.ranks(oversubscribed, ranks, argv, prompts, new_tokens):
        assert sum(answer.retractions for answer in answers)
        for tokens, said in zip(prompts, answers, strict=True):
            check(model, tokens, said, new_tokens)
