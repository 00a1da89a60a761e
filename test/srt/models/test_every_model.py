"""Every attention class of the installed SGLang, and what becomes of it over a sharded cache.

The scan reads SGLang's model files without importing them. It finds every class that builds a
`RadixAttention`, and every class that inherits from one, and gives it a verdict by rules that say
what the loader's checks need. `VERDICTS` is what they found in the SGLang that the series supports:
a new class, or one that changed its nature, fails the test until somebody has looked at it.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import free_port
from srt.fresh import Fresh
from srt.model_loader.configurations import SMALL, built, configuration, vision_of_qwen
from srt.models.attention_classes import (
    ALL_HEADS,
    BY_CONFIGURATION,
    CROSS,
    GATE,
    GATE_IN_QKV,
    INDEXER,
    LINEAR,
    MLA,
    NO_HEADS,
    NO_QKV,
    NORM,
    OUTPUT,
    OWN_WRITE,
    SEVERAL_LAYERS,
    SHARES_NO_HEADS,
    WEIGHTS,
    WORKS,
    by_name,
    scan,
)

# What the loader makes of a class where it has to fit it: fewer shards of attention than key-value
# heads, or replicated queries.

VERDICTS = {
    WORKS: """
        apertus.ApertusAttention arcee.ArceeAttention bailing_moe.BailingMoEAttention
        bailing_moe_linear.BailingMoEAttention bailing_moe_v3.BailingMoEAttention
        chatglm.GLMAttention dbrx.DbrxAttention deepseek.DeepseekAttention
        ernie45_moe_vl.Ernie4_5_VLMoeAttention exaone.ExaoneAttention gemma.GemmaAttention
        glm4.Glm4Attention glm4_moe.Glm4MoeAttention glm_image_vl.GlmImageTextAttention
        grok.Grok1Attention hunyuan_v3.HYV3Attention internlm2.InternLM2Attention
        llama.LlamaAttention mixtral.MixtralAttention mixtral_quant.MixtralAttention
        moss_vl.MossVLSelfAttention orion.OrionAttention phimoe.PhiMoEAttention
        qwen2.Qwen2Attention qwen2_moe.Qwen2MoeAttention qwen3.Qwen3Attention
        qwen3_moe.Qwen3MoeAttention solar.SolarAttention starcoder2.Starcoder2Attention
        xllm.XllmAttention xverse.XverseAttention xverse_moe.XverseAttention
    """,
    MLA: "deepseek_v2.DeepseekV2AttentionMLA",
    BY_CONFIGURATION: """
        bert.BertSelfAttention cohere2_moe.Cohere2MoeAttention exaone4.Exaone4Attention
        exaone_moe.ExaoneMoEAttention gemma2.Gemma2Attention gemma3n_causal.Gemma3nAttention
        granite.GraniteAttention granitemoe.GraniteMoeAttention llada2.LLaDA2MoeAttention
        llama4.Llama4Attention mellum.MellumAttention nemotron_h.NemotronHAttention
        sdar.SDARAttention sdar_moe.SDARMoeAttention
    """,
    CROSS: """
        mllama.MllamaTextCrossAttention moss_vl.MossVLTextCrossAttention
        transformers.TransformersBase whisper.WhisperAttention
    """,
    NO_QKV: """
        deepseek_v4.MQALayer deepseek_v4_dspark.DSparkAttention dflash.DFlashAttention
        dots3_common/modeling.Dots3AttentionMLA hrm_text.HrmTextAttention
        inkling_common/attn.InklingAttention minicpm3.MiniCPM3AttentionMLA
        sarvam_moe.SarvamMoEMLAAttention step3_vl.Step3TextAttention
        torch_native_llama.LlamaAttention xllm._XllmMoVAAttentionBase zaya.ZayaAttention
    """,
    SEVERAL_LAYERS: """
        gemma4_diffusion.DiffusionGemmaAttention iquest_loopcoder.LoopCoderAttention
        nanbeige.NanbeigeAttention
    """,
    GATE: """
        afmoe.AfmoeAttention bailing_moe_linear.BailingMoELinearAttention beam.BeamAttention
        hunyuan.HunYuanAttention laguna.LagunaAttention minicpm.MiniCPMAttention
        minicpm.MiniCPMLightningMixer muse_glimmer.MuseGlimmerAttention
        muse_spark.MuseSpark1xAttention spark2_5.Spark2_5Attention step3p5.Step3p5Attention
    """,
    GATE_IN_QKV: """
        interns2_mobius.InternS2MobiusAttentionDecoderLayer qwen3_5.Qwen3_5AttentionDecoderLayer
        qwen3_next.Qwen3HybridAttentionDecoderLayer
    """,
    WEIGHTS: """
        baichuan.BaiChuanAttention falcon_h1.FalconH1HybridAttentionDecoderLayer
        gpt_oss.GptOssAttention iquest_q1.IQuestQ1Attention mimo_v2.MiMoV2Attention
    """,
    NORM: """
        commandr.CohereAttention minimax_m2.MiniMaxM2Attention minimax_m3.MiniMaxM3Attention
        olmo2.Olmo2Attention olmoe.OlmoeAttention
    """,
    NO_HEADS: """
        gpt2.GPT2Attention gpt_bigcode.GPTBigCodeAttention gpt_j.GPTJAttention
        granitemoehybrid.GraniteMoeHybridAttention jet_nemotron.JetNemotronAttention
        lfm2.Lfm2Attention lfm2_moe.Lfm2MoeAttention olmo.OlmoAttention opt.OPTAttention
        persimmon.PersimmonAttention phi.PhiAttention phi3_small.Phi3SmallSelfAttention
        qwen.QWenAttention stablelm.StablelmAttention
    """,
    OUTPUT: """
        embedding_gemma2.EmbeddingGemma2Attention gemma3_causal.Gemma3Attention
        gemma4_causal.Gemma4Attention
    """,
    "inherits from DeepseekV2AttentionMLA": """
        bailing_moe_linear.DsV3MLA bailing_moe_v3.DsV3MLA gigachat35.GigaChat35AttentionMLA
        hunyuan_v4.HYV4Attention kimi_k3.KimiK3MLAAttention
    """,
    "inherits from DFlashAttention": "dflash.DFlashLagunaAttention",
    "inherits from MiniMaxM3Attention": "dspark_minimax.DSparkMiniMaxAttention",
    "inherits from Qwen3MoeAttention": "interns1pro.InternS1ProTextAttention",
    "inherits from LlamaAttention": "ministral3.Ministral3Attention",
    "inherits from Qwen3_5AttentionDecoderLayer": "qwen4_exp.Qwen4ExpAttentionDecoderLayer",
    "inherits from TransformersBase": """
        transformers.TransformersForCausalLM transformers.TransformersMoEForCausalLM
        transformers.TransformersMultiModalForCausalLM
        transformers.TransformersMultiModalMoEForCausalLM transformers.TransformersEmbeddingModel
        transformers.TransformersMoEEmbeddingModel
        transformers.TransformersMultiModalEmbeddingModel
        transformers.TransformersMultiModalMoEEmbeddingModel
        transformers.TransformersForSequenceClassification
        transformers.TransformersMoEForSequenceClassification
        transformers.TransformersMultiModalForSequenceClassification
        transformers.TransformersMultiModalMoEForSequenceClassification
    """,
    "inherits from _XllmMoVAAttentionBase": "xllm.XllmGatedAttention xllm.XllmMoVAAttention",
}


# What the classes above that cannot be fitted become where A >= KV: the module stays as plain TP
# builds it, and only what reaches the softmax counts.
AS_BUILT = {
    WORKS: """
        falcon_h1.FalconH1HybridAttentionDecoderLayer gpt_bigcode.GPTBigCodeAttention
        granitemoehybrid.GraniteMoeHybridAttention hunyuan.HunYuanAttention
        interns2_mobius.InternS2MobiusAttentionDecoderLayer lfm2_moe.Lfm2MoeAttention
        minicpm.MiniCPMAttention minimax_m2.MiniMaxM2Attention phi3_small.Phi3SmallSelfAttention
        qwen3_next.Qwen3HybridAttentionDecoderLayer stablelm.StablelmAttention
    """,
    BY_CONFIGURATION: """
        afmoe.AfmoeAttention commandr.CohereAttention embedding_gemma2.EmbeddingGemma2Attention
        gemma3_causal.Gemma3Attention gemma4_causal.Gemma4Attention
        gemma4_diffusion.DiffusionGemmaAttention gpt_oss.GptOssAttention
        iquest_loopcoder.LoopCoderAttention jet_nemotron.JetNemotronAttention
        laguna.LagunaAttention lfm2.Lfm2Attention mimo_v2.MiMoV2Attention
        muse_glimmer.MuseGlimmerAttention qwen3_5.Qwen3_5AttentionDecoderLayer
        spark2_5.Spark2_5Attention step3p5.Step3p5Attention
    """,
    WEIGHTS: """
        baichuan.BaiChuanAttention beam.BeamAttention iquest_q1.IQuestQ1Attention
    """,
    LINEAR: """
        bailing_moe_linear.BailingMoELinearAttention minicpm.MiniCPMLightningMixer
    """,
    NO_QKV: """
        deepseek_v4.MQALayer deepseek_v4_dspark.DSparkAttention dflash.DFlashAttention
        dots3_common/modeling.Dots3AttentionMLA hrm_text.HrmTextAttention
        inkling_common/attn.InklingAttention minicpm3.MiniCPM3AttentionMLA
        sarvam_moe.SarvamMoEMLAAttention step3_vl.Step3TextAttention
        torch_native_llama.LlamaAttention xllm._XllmMoVAAttentionBase zaya.ZayaAttention
    """,
    ALL_HEADS: """
        gpt2.GPT2Attention gpt_j.GPTJAttention olmo.OlmoAttention opt.OPTAttention
        persimmon.PersimmonAttention phi.PhiAttention qwen.QWenAttention
    """,
    INDEXER: """
        minimax_m3.MiniMaxM3Attention
    """,
    CROSS: """
        mllama.MllamaTextCrossAttention moss_vl.MossVLTextCrossAttention
        transformers.TransformersBase whisper.WhisperAttention
    """,
    OWN_WRITE: """
        muse_spark.MuseSpark1xAttention
    """,
    SHARES_NO_HEADS: """
        nanbeige.NanbeigeAttention olmo2.Olmo2Attention olmoe.OlmoeAttention
    """,
}


def test_every_attention_class_is_classified() -> None:
    verdicts, built = scan()
    assert verdicts == by_name(VERDICTS)
    assert built == by_name(AS_BUILT)


TEXT_OF_MLLAMA = {
    **SMALL,
    "model_type": "mllama_text_model",
    "cross_attention_layers": [1],
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
VISION_OF_MLLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 8,
    "vision_output_dim": 64,
    "image_size": 28,
    "patch_size": 14,
}
NOT_ONE_OF_EACH = "not one QKVParallelLinear, RadixAttention and RowParallelLinear"
GATED_QUERIES = "16 query and 4 key-value heads in its projection, other numbers than the model"
EVERY_LAYER_FULL = {"layer_types": ["full_attention"] * 3, "sliding_window": None}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# One architecture for each reason that test_loader.py has none for, and some that are built. How
# transformers reads its configuration, what that holds, and what the loader says of it.
BUILT = {
    "Qwen3MoeForCausalLM": ("qwen3_moe", MOE, "built"),
    "Glm4MoeForCausalLM": ("glm4_moe", {**MOE, "n_routed_experts": 4, "n_group": 1}, "built"),
    "ApertusForCausalLM": ("apertus", {"hidden_act": "xielu"}, "built"),
    "MllamaForConditionalGeneration": (
        "mllama",
        {"text_config": TEXT_OF_MLLAMA, "vision_config": VISION_OF_MLLAMA},
        "cross attention",
    ),
    "WhisperForConditionalGeneration": (
        "whisper",
        {
            "d_model": 256,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
        },
        "not a causal decoder's",
    ),
    "TorchNativeLlamaForCausalLM": ("llama", {}, NOT_ONE_OF_EACH),
    "NanbeigeForCausalLM": (
        "gpt2",  # its configuration leaves rope_theta where it is
        {
            "num_loops": 2,
            "rope_theta": 1e4,
            "rope_scaling": None,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
        },
        NOT_ONE_OF_EACH,
    ),
    "AfmoeForCausalLM": (
        "llama",
        {**EVERY_LAYER_FULL, **MOE, "num_dense_layers": 3, "mup_enabled": False},
        "a projection beside q, k, v and o (gate_proj)",
    ),
    "Qwen3NextForCausalLM": (
        "qwen3_next",
        {**MOE, "full_attention_interval": 1, "mlp_only_layers": [0, 1, 2]},
        GATED_QUERIES,
    ),
    # Their class brings groups like those of a fitted projection, and at K = 2 queries and gates
    # sharded by N are as many as queries sharded by A.
    "Qwen4ExpForConditionalGeneration": (
        "qwen4_exp",
        {
            "text_config": {
                **SMALL,
                **MOE,
                "model_type": "qwen4_exp_text",
                "layer_types": ["full_attention"] * 3,
                "full_attention_interval": 1,
                "shared_expert_intermediate_size": 64,
                "hc_count": 2,
                "hc_lowrank": 16,
            },
            "vision_config": vision_of_qwen(4) | {"out_hidden_size": 256},
        },
        GATED_QUERIES,
    ),
    "IQuestQ1ForCausalLM": (
        "llama",
        {
            **EVERY_LAYER_FULL,
            **MOE,
            "enable_sink_attention": True,
            "softmax_scale": None,
            "no_rope_layers": [],
            "mlp_only_layers": [0, 1, 2],
            **dict.fromkeys(("attn_out_scale", "ffn_out_scale"), 1.0),
            **dict.fromkeys(("first_layer_attn_out_scale", "first_layer_ffn_out_scale"), 1.0),
            "is_checkpoint_fp": True,
            "logit_scale": 1.0,
            "dense_intermediate_size": 64,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "weights beside its projections (sink_k)",
    ),
    # Hybrid linear attention, its layers built inline.
    "FalconH1ForCausalLM": ("falcon_h1", {}, "a number of heads kept in mamba"),
    "OlmoeForCausalLM": (
        "olmoe",
        {"num_key_value_heads": 2},
        "a norm over several heads (q_norm). It is served with --dcp-size 2 and no "
        "--attn-tp-size or --dcp-replicate-q-proj, or without --dcp-size.",
    ),
    # Olmo-3 is of this class.
    "Olmo2ForCausalLM": (
        "olmo3",
        {"layer_types": ["full_attention"] * 3},
        "a norm over several heads (k_norm)",
    ),
    # One query head per rank: its norm over all heads has the shape of one over a head.
    "MiniMaxM2ForCausalLM": (
        "minimax_m2",
        {
            **MOE,
            "num_local_experts": 4,
            "num_attention_heads": 4,
            "use_qk_norm": True,
            "rotary_dim": 16,
            "qk_norm_type": "per_layer",
            "scoring_func": "sigmoid",
            "rope_theta": 1e4,
            "hidden_act": "silu",
        },
        "a number of heads kept in q_norm",
    ),
}


# The same with two key-value heads and gathered queries, on as many shards of attention: A >= KV.
TWO = {"num_key_value_heads": 2}
LEFT_AS_BUILT = {
    **{
        architecture: (model_type, {**entries, **TWO}, "built")
        for architecture, (model_type, entries, _) in BUILT.items()
        if architecture
        in (
            "Qwen3MoeForCausalLM",
            "AfmoeForCausalLM",
            "Qwen3NextForCausalLM",
            "FalconH1ForCausalLM",
            "OlmoeForCausalLM",
            "MiniMaxM2ForCausalLM",
        )
    },
    "StableLmForCausalLM": ("stablelm", {**TWO, "hidden_act": "silu"}, "built"),
    "CohereForCausalLM": ("cohere", {**TWO, "use_qk_norm": True}, "built"),
    "IQuestQ1ForCausalLM": (
        "llama",
        {**BUILT["IQuestQ1ForCausalLM"][1], **TWO},
        "weights beside its projections (sink_k)",
    ),
    "GptOssForCausalLM": (
        "gpt_oss",
        {
            **TWO,
            "num_local_experts": 4,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "built",
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {
            **TWO,
            "sliding_window": 32,
            "layer_types": ["sliding_attention"] * 3,
            "query_pre_attn_scalar": 32,
        },
        "built",
    ),
    # SGLang's classes of these have no windows.
    "MistralForCausalLM": (
        "mistral",
        {**TWO, "sliding_window": 32},
        "a window of 32 in its configuration alone",
    ),
    "Qwen2ForCausalLM": (
        "qwen2",
        {**TWO, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        "a window of 32 in its configuration alone",
    ),
    "Exaone4ForCausalLM": (
        "exaone4",
        {
            **TWO,
            "sliding_window": 32,
            "sliding_window_pattern": "LLG",
            "layer_types": ["full_attention"] * 3,
        },
        "a window that is not its configuration's None",
    ),
}


def said_of(rank: int, argv: list[str], models: Mapping[str, Path]) -> dict[str, str]:
    """What building each model says on a rank: the refusal, another error, or "built"."""
    return {architecture: error or "built" for architecture, error, _ in built(rank, argv, models)}


@pytest.fixture(scope="module")
def said(ready: Fresh, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """On each of four ranks, two shards of attention: with replicated queries, and gathered."""
    base = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    results = {}
    for flag, cases in (("--attn-tp-size", BUILT), ("--dcp-size", LEFT_AS_BUILT)):
        root = tmp_path_factory.mktemp("configurations")
        models = {
            architecture: configuration(architecture, model_type, entries, root)
            for architecture, (model_type, entries, _) in cases.items()
        }
        argv = [
            *("--model-path", str(base), "--tp-size", "4"),
            *(flag, "2", "--nccl-port", str(free_port())),
        ]
        results[flag] = ready.ranks(said_of, 4, argv, models)
    return results


def agrees(said: list[dict[str, str]], architecture: str, reason: str) -> None:
    for by_architecture in said:
        message = by_architecture[architecture]
        if reason == "built":
            assert message == reason
        else:
            assert message.startswith(f"--dcp-size > 1 does not support {architecture}: ")
            assert reason in message


@pytest.mark.parametrize("architecture", BUILT)
def test_loader_agrees(said: dict[str, list[dict[str, str]]], architecture: str) -> None:
    agrees(said["--attn-tp-size"], architecture, BUILT[architecture][2])


@pytest.mark.parametrize("architecture", LEFT_AS_BUILT)
def test_loader_leaves_as_built(said: dict[str, list[dict[str, str]]], architecture: str) -> None:
    agrees(said["--dcp-size"], architecture, LEFT_AS_BUILT[architecture][2])
