"""Who serves: the series, SGLang as it is, or nobody; and that SGLang is then really as it is.

Every situation that SGLang serves by itself is resolved in a process with the series and in one
without it. All arguments, and the errors, must be the same.
"""

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.check import facts_of
from sglang_helix.flags import keep
from sglang_helix.srt.compatibility.row import Row
from sglang_helix.srt.compatibility.rows.beside_own import BESIDE_OWN, NO_PLAN
from sglang_helix.srt.compatibility.situation import Situation
from sglang_helix.srt.compatibility.table import TABLE
from sglang_helix.srt.compatibility.verdict import Verdict, decide, refusals
from srt.fresh import Fresh
from srt.model_loader.test_loader import configuration
from srt.models.test_every_model import BUILT
from srt.resolved import SMALL
from srt.test_refused_models import LATENT, SPARSE

HYBRID = (
    "other hybrid linear attention of MLA, of Qwen3.5 and where A is a multiple of KV heads; "
    "what else moves states"
)
DRAFTS = "DSPARK and what cutedsl_mla verifies, of MLA models, and draft models of DSA and Qwen3.5"
DSA = "sparse attention of DeepSeek (DSA: DeepSeek-V3.2, GLM-5) on Blackwell and NPUs"
PD = "prefill-decode disaggregation of MLA models by NIXL, Mori, or with host copies"
NIXL = {"disaggregation_transfer_backend": "nixl"}
PLATFORM = "AMD, Ascend and Intel accelerators"

LINEAR = {"num_heads": 8, "head_dim": 32, "short_conv_kernel_size": 4}
QWEN = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "num_key_value_heads": 2,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "dsa": {"architectures": ["DeepseekV32ForCausalLM"], **SPARSE},
    "kimi_linear": {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        **LATENT,
        **MOE,
        "num_experts_per_token": 2,
        "mla_use_nope": True,
        "linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1], **LINEAR},
    },
    "ring": {
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        "model_type": "bailing_hybrid",
        **LATENT,
        **MOE,
        "layer_group_size": 2,
        "group_norm_size": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "linear_silu": False,
        "use_qk_norm": True,
    },
    "qwen3_next": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **QWEN},
    "qwen3_5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {**SMALL, **QWEN, "model_type": "qwen3_5_text"},
    },
}
TP4 = {"tp_size": 4, "dcp_size": 2}
# Of Kimi-Linear, what moves states is SGLang's own; of Qwen3.5, fewer shards than key-value heads.
CUTEDSL_KIMI = {"attention_backend": "cutedsl_mla", "enable_mixed_chunk": True}
SPLIT = {"dcp_size": 4}
CUTEDSL = {"attention_backend": "cutedsl_mla", "speculative_attention_mode": "decode"}
EAGLE = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 2,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 3,
}
# Name: machine, model, flags beside TP4, the features that make it SGLang's own.
OWN: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "DSA": ("Blackwell", "dsa", {}, (DSA,)),
    "DSA with MTP": ("Blackwell", "dsa", EAGLE, (DRAFTS, DSA)),
    "Kimi-Linear": ("Blackwell", "kimi_linear", {**CUTEDSL_KIMI}, (HYBRID,)),
    "Kimi-Linear PD": (
        "Blackwell",
        "kimi_linear",
        {**NIXL, "disaggregation_mode": "prefill", "attention_backend": "cutedsl_mla"},
        (PD, HYBRID),
    ),
    "Qwen3.5": ("Blackwell", "qwen3_5", {"attention_backend": "triton", **SPLIT}, (HYBRID,)),
    "Qwen3.5 on Hopper": (
        "Hopper",
        "qwen3_5",
        {"attention_backend": "triton", **SPLIT},
        (HYBRID,),
    ),
    **{
        f"Qwen3-Next, {what}": (
            "Hopper",
            "qwen3_next",
            {"attention_backend": "triton", **flags},
            (HYBRID,),
        )
        for what, flags in {
            "mixed chunks": {"enable_mixed_chunk": True},
            "the hierarchical cache": {"enable_hierarchical_cache": True},
            "buffered states": {"enable_linear_replayssm": True},
            "lazy snapshots": {"mamba_radix_cache_strategy": "extra_buffer_lazy"},
        }.items()
    },
    "PD decode": (
        "Hopper",
        "deepseek_v2",
        {**NIXL, "disaggregation_mode": "decode", "attention_backend": "flashinfer"},
        (PD,),
    ),
    "PD prefill by Mori": (
        "Blackwell",
        "deepseek_v2",
        {
            "disaggregation_transfer_backend": "mori",
            "disaggregation_mode": "prefill",
            "attention_backend": "flashinfer",
        },
        (PD,),
    ),
    "MTP": ("Blackwell", "deepseek_v2", {**EAGLE, **CUTEDSL}, (DRAFTS,)),
    "unified memory": (
        "Blackwell",
        "deepseek_v2",
        {"enable_unified_memory": True},
        ("unified memory pool of MLA models",),
    ),
    "LoRA": (
        "Blackwell",
        "deepseek_v2",
        {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["o_proj"]},
        ("LoRA of MLA models",),
    ),
    "attention DP": (
        "Blackwell",
        "deepseek_v2",
        {"attn_dp_size": 2, "dcp_size": 2},
        ("attention data parallelism of MLA models and Qwen3.5",),
    ),
    "AMD": ("AMD", "deepseek_v2", {"attention_backend": "aiter"}, (PLATFORM,)),
    "Intel XPU": ("XPU", "qwen3_next", {"attention_backend": "intel_xpu"}, (PLATFORM,)),
    "Ascend": ("NPU", "dsa", {}, (PLATFORM, DSA)),
}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "AMD": {"is_hip": True, "device_sm": 0},
    "XPU": {"is_xpu": True, "device_sm": 0},
    "NPU": {"is_npu": True, "device_sm": 0},
    "CPU": {"device_sm": 0},
}


def facts(machine: str) -> dict[str, Any]:
    if machine in ELSEWHERE:
        return {"is_cuda": False, "has_flashinfer": False, **ELSEWHERE[machine]}
    return facts_of(machine)


# Arguments that are the series' own.
OURS = ("attn_tp_size", "dcp_replicate_v_proj")


def resolve(
    machine: str, model: str, flags: dict[str, Any]
) -> tuple[dict[str, str], str, tuple[str, ...] | None, list[str]]:
    """All resolved arguments, the error, the features of an own verdict, what a launch logs."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.arg_groups.pipeline import record_fields
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sglang_helix").addHandler(handler)
    known = facts(machine)
    capability = mock.patch(
        "torch.cuda.get_device_capability", return_value=known.get("device_capability", (9, 0))
    )
    fields: dict[str, str] = {}
    error, features = "", None
    with mock.patch.dict(os.environ), override_platform(**known), capability:
        device = {"XPU": "xpu", "NPU": "npu", "CPU": "cpu"}.get(machine, "cuda")
        fields_given = {**TP4, **flags}
        own = {name: fields_given.pop(name) for name in OURS if name in fields_given}
        args = ServerArgs(model_path=model, device=device, random_seed=1, **fields_given)
        keep(args, **own)
        try:
            args.resolve_once()
            args.check_server_args()
            view = resolved_view(args)
            fields = {
                field.name: repr(getattr(view, field.name)) for field in record_fields(ServerArgs)
            }
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        verdict = getattr(args, "_helix_verdict", None)
        if verdict is not None and verdict.kind == "own":
            features = verdict.features
    logging.getLogger("sglang_helix").removeHandler(handler)
    return fields, error, features, lines


def resolve_all(models: dict[str, str], situations: dict[str, Any]) -> dict[str, Any]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return {
        name: resolve(machine, models[model], flags)
        for name, (machine, model, flags, _) in situations.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    found = {name: str(make_checkpoint(name, root / name)) for name in ("llama", "deepseek_v2")}
    for name, config in CONFIGS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({**SMALL, **config}))
        found[name] = str(root / name)
    return found


@pytest.fixture(scope="module")
def gpu() -> Iterator[Fresh]:
    """New processes that believe in no platform plugin."""
    with Fresh(timeout=180) as process:
        yield process


@pytest.fixture(scope="module")
def both(gpu: Fresh, models: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    loaded = gpu.value(resolve_all, models, OWN)
    return loaded, gpu.value(resolve_all, models, OWN, SGLANG_PLUGINS="none of them")


@pytest.mark.parametrize("name", OWN)
def test_arguments_are_those_of_sglang_alone(both: Any, name: str) -> None:
    (fields, error, features, lines), (alone, alone_error, *_) = both[0][name], both[1][name]
    assert features == OWN[name][3]
    assert alone or alone_error
    assert (fields, error) == (alone, alone_error)
    if not error:
        (line,) = [line for line in lines if "SGLang serves this by its own --dcp-size" in line]
        assert all(feature in line for feature in features)
        assert "--attn-tp-size, --dcp-replicate-v-proj and --dcp-comm-backend symm do not" in line


def test_every_own_row_is_met() -> None:
    met = {feature for *_, features in OWN.values() for feature in features}
    assert met == {row.feature for row in TABLE if row.status == "own"}


ALONE = "is not supported with SGLang's own --dcp-size, which serves "
# Refused although SGLang serves the rest: machine, model, flags, what the error says.
REFUSED: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "--attn-tp-size": (
        "Blackwell",
        "kimi_linear",
        {"attn_tp_size": 2, "dcp_size": 1, "enable_mixed_chunk": True},
        (f"--attn-tp-size 2 {ALONE}{HYBRID} here: only the series has it. Use --dcp-size",),
    ),
    "--dcp-replicate-v-proj": (
        "Blackwell",
        "kimi_linear",
        {"dcp_replicate_v_proj": True, "enable_mixed_chunk": True},
        (f"--dcp-replicate-v-proj {ALONE}", "only the series has it. Leave the flag out."),
    ),
    "symm": (
        "Blackwell",
        "kimi_linear",
        {"dcp_comm_backend": "symm", "enable_mixed_chunk": True},
        (f"--dcp-comm-backend symm {ALONE}", "only the series has it. Use --dcp-comm-backend a2a."),
    ),
    "GQA by the default of Hopper": (
        "Hopper",
        "qwen3_5",
        {**SPLIT},
        (f"--attention-backend fa3 {ALONE}", "Use --attention-backend triton for GQA"),
    ),
    "MLA by the default of Hopper": (
        "Hopper",
        "deepseek_v2",
        {**NIXL, "disaggregation_mode": "decode"},
        (f"--attention-backend fa3 {ALONE}{PD} here", "flashinfer, trtllm_mla or cutedsl_mla"),
    ),
    "verified by flashinfer": (
        "Blackwell",
        "kimi_linear",
        {**EAGLE, "attention_backend": "flashinfer"},
        (f"--attention-backend flashinfer {ALONE}", "Use --attention-backend cutedsl_mla"),
    ),
    **{
        f"DSA by another {half} kernel": (
            "Blackwell",
            "dsa",
            {f"dsa_{half}_backend": "flashmla_sparse"},
            (f"--dsa-{half}-backend flashmla_sparse {ALONE}", "Use trtllm, or leave the flag out"),
        )
        for half in ("prefill", "decode")
    },
    "a row that SGLang fails too": (
        "Blackwell",
        "kimi_linear",
        {"enable_symm_mem": True, **CUTEDSL_KIMI},
        (f"--enable-symm-mem {ALONE}", "captured graphs answer wrongly at small batches"),
    ),
    "Ring": (
        "Blackwell",
        "ring",
        {"attention_backend": "flashinfer"},
        ("(BailingMoeV2_5ForCausal",),
    ),
    "heads of AMD": (
        "AMD",
        "llama",
        {"attention_backend": "triton", "dcp_size": 4},
        ("key-value heads that ranks of a group do not share (LlamaForCausalLM)", PLATFORM),
    ),
    "CPU": (
        "CPU",
        "deepseek_v2",
        {**NIXL, "disaggregation_mode": "prefill", "attention_backend": "torch_native"},
        (f"platform cpu {ALONE}{PD} here",),
    ),
}
# A refusal that speaks of the series' own code ("starts") does not hold where that is not there.
PASSED: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    name: ("Blackwell", "kimi_linear", {**CUTEDSL_KIMI, **flags}, (HYBRID,))
    for name, flags in {
        "torch.compile of the model": {"enable_torch_compile": True},
        "mixed chunk of MLA models": {"enable_mixed_chunk": True},
        "streaming sessions": {"enable_streaming_session": True},
    }.items()
}


@pytest.fixture(scope="module")
def beside_own(gpu: Fresh, models: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = gpu.value(resolve_all, models, {**REFUSED, **PASSED})
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_refused_wins(beside_own: dict[str, Any], name: str) -> None:
    _, error, features, lines = beside_own[name]
    assert features
    assert not lines
    for part in REFUSED[name][3]:
        assert part in error


def test_every_row_beside_own_is_met(beside_own: dict[str, Any]) -> None:
    errors = "\n".join(error for _, error, *_ in beside_own.values())
    for row in BESIDE_OWN:
        assert row.why in errors, row.feature


def classes_with_a_plan() -> dict[str, bool]:
    """Every class of SGLang's model files, and whether it or a base plans a sharded prefix."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    bases, planned = {}, set()
    for path in Path(spec.submodule_search_locations[0], "srt/models").rglob("*.py"):
        _, *parts = re.split(r"^class (\w+)(.*)", path.read_text(), flags=re.M)
        for name, inherits, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            bases[name] = set(re.findall(r"\w+", inherits)) - {name}
            if "def prepare_context_parallel_metadata_for_dcp" in body:
                planned.add(name)
    for _ in range(4):
        planned |= {name for name, inherited in bases.items() if inherited & planned}
    return {name: name in planned for name in bases}


def test_classes_without_a_plan() -> None:
    planned = classes_with_a_plan()
    assert not any(planned[name] for name in NO_PLAN)
    assert planned["DeepseekV32ForCausalLM"]
    assert planned["KimiK3ForConditionalGeneration"]
    source = Path(str(find_spec("sglang.srt.configs.model_config").origin)).read_text()  # type: ignore[union-attr]
    named = set(re.findall(r'"(\w+)" in self\.hf_config\.architectures', source))
    latent = {name for name in named if planned.get(name) is False}
    # What is no MLA, and what SGLang or another row refuses.
    assert {name for name in latent - NO_PLAN if "NextN" not in name} == {
        *("BaichuanForCausalLM", "IQuestLoopCoderForCausalLM", "MistralForCausalLM"),
        *("MistralModel", "MixtralForCausalLM", "NanbeigeForCausalLM"),
        *("WhisperForConditionalGeneration", "Eagle3DeepseekV2ForCausalLM"),
        *("DeepseekV4ForCausalLM", "DeepseekV4ForCausalLMDSpark"),
        *("Glm5NextForConditionalGeneration", "HYV4ForCausalLM"),
    }


@pytest.mark.parametrize("name", PASSED)
def test_a_reason_of_the_series_alone_does_not_hold(beside_own: dict[str, Any], name: str) -> None:
    (row,) = [row for row in TABLE if row.feature == name]
    assert (row.status, row.by_sglang) == ("refused", "starts")
    _, error, features, lines = beside_own[name]
    assert (error, features, len(lines)) == ("", PASSED[name][3], 1)


def test_precedence() -> None:
    """refused > own > works, by the table alone."""

    def row(name: str, status: Any, alone: Any = "") -> Row:
        def given(situation: Situation) -> object | None:
            return name in situation.args.asked or None

        return Row(name, f"--{name}", status, f"{name} why", "Leave it", given, alone)

    table = (
        Row("works", "--works", "works", "tested"),
        row("own", "own", "serves"),
        row("series", "refused", "starts"),
        row("never", "refused", "wrong"),
    )

    def verdict(*asked: str) -> tuple[str, list[str]]:
        situation = Situation(SimpleNamespace(asked=asked, dcp_size=2), SimpleNamespace())
        with (
            mock.patch("sglang_helix.srt.compatibility.verdict.TABLE", table),
            mock.patch("sglang_helix.srt.compatibility.verdict.BESIDE_OWN", ()),
        ):
            decided = decide(situation)
            return decided.kind, [line.split()[0] for line in refusals(situation, decided)]

    assert verdict("works") == ("works", [])
    assert verdict("works", "own") == ("own", [])
    assert verdict("works", "never") == ("works", ["--never"])
    assert verdict("works", "series", "never") == ("works", ["--series", "--never"])
    assert verdict("own", "never") == ("own", ["--never"])
    assert verdict("own", "series") == ("own", [])
    whole = Situation(SimpleNamespace(asked=("never",), dcp_size=1), SimpleNamespace())
    assert refusals(whole, Verdict("whole")) == []


# Whoever resolved the arguments, launch and ranks check them.


def launch(models: dict[str, str], cases: dict[str, Any]) -> dict[str, str]:
    """Resolve without the series, load it, and launch: how that ends."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    ended = {}
    for name, (machine, model, flags, _) in cases.items():
        capability = mock.patch("torch.cuda.get_device_capability", return_value=(10, 0))
        with mock.patch.dict(os.environ), override_platform(**facts(machine)), capability:
            given = {**TP4, **flags}
            own = {name: given.pop(name) for name in OURS if name in given}
            args = ServerArgs(model_path=models[model], device="cuda", **given)
            keep(args, **own)
            ended[name] = args
            args.resolve_once()
    load_plugins()
    for name, (machine, *_) in cases.items():
        with override_platform(**facts(machine)):
            try:
                ended[name].check_server_args()
                ended[name] = ended[name]._helix_verdict.kind
            except ValueError as error:
                ended[name] = str(error)
    return ended


TRITON = {"attention_backend": "triton", "dcp_comm_backend": "a2a"}
RESOLVED_BEFORE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "whole": ("Blackwell", "llama", {"dcp_size": 1}, "whole"),
    "works": ("Blackwell", "llama", TRITON, "works"),
    "own": ("Blackwell", "kimi_linear", CUTEDSL_KIMI, "own"),
    "backend": (
        "Blackwell",
        "llama",
        {"attention_backend": "flex_attention", "dcp_comm_backend": "a2a"},
        "--attention-backend flex_attention does not serve GQA or MHA with --dcp-size 2",
    ),
    "a backend that nobody named and nobody has seen": (
        "Blackwell",
        "llama",
        {"dcp_comm_backend": "a2a"},
        "--attention-backend trtllm_mha has not been seen on a GPU with --dcp-size, and SGLang "
        "chose it: give the flag to have it all the same, or with one of flashinfer, triton, ",
    ),
    "a backend that was named": (
        "Blackwell",
        "llama",
        {"attention_backend": "trtllm_mha", "dcp_comm_backend": "a2a"},
        "works",
    ),
    "fi_a2a": (
        "Blackwell",
        "llama",
        {**TRITON, "dcp_comm_backend": "fi_a2a"},
        "--dcp-comm-backend fi_a2a is not supported with --dcp-size 2",
    ),
    "heads": (
        "Blackwell",
        "llama",
        {**TRITON, "tp_size": 6},
        "--dcp-size 2 with --tp-size 6: 8 query heads cannot be split over 6 ranks",
    ),
    "refused flag": (
        "Blackwell",
        "llama",
        {**TRITON, "enable_symm_mem": True},
        "--enable-symm-mem is not supported with --dcp-size 2",
    ),
    "attn_tp_size": (
        "Blackwell",
        "llama",
        {**TRITON, "dcp_comm_backend": None, "dcp_size": 1, "attn_tp_size": 2},
        "--attn-tp-size 2 was not heard: these arguments were resolved before plugins were loaded. "
        "Call sglang.srt.plugins.load_plugins() before",
    ),
}


def test_what_was_resolved_before_plugins_is_checked_at_launch(
    gpu: Fresh, models: dict[str, str]
) -> None:
    ended = gpu.value(launch, models, RESOLVED_BEFORE)
    for name, (*_, expected) in RESOLVED_BEFORE.items():
        assert expected in ended[name], name


def rank_of(model: str, machine: str, flags: dict[str, Any], before_plugins: bool) -> list[str]:
    """A rank that is about to build its groups: the serve hooks it has then."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    capability = mock.patch("torch.cuda.get_device_capability", return_value=(10, 0))
    with override_platform(**facts(machine)), capability:
        args = ServerArgs(model_path=model, device="cuda", **{**TP4, **flags})
        if before_plugins:
            args.resolve_once()
        load_plugins()
        args.resolve_once()
        from sglang.srt.plugins.hook_registry import HookRegistry
        from sglang_helix import plugin
        from sglang_helix.series import hooks

        plugin.before_process_groups(server_args=args, device="cuda", dist_port=1)
        return [hook.target for hook in hooks("serve") if hook.target in HookRegistry._patched]


def test_ranks_install_the_serve_stage_where_the_series_serves(
    gpu: Fresh, models: dict[str, str]
) -> None:
    calls = [
        (rank_of, models["llama"], "Blackwell", TRITON, False),
        (rank_of, models["kimi_linear"], "Blackwell", CUTEDSL_KIMI, False),
        (rank_of, models["llama"], "Blackwell", {"dcp_size": 1}, False),
        (rank_of, models["llama"], "Blackwell", {**TRITON, "enable_symm_mem": True}, True),
    ]
    works, own, whole, refused = gpu.outcomes(calls)
    assert works.status == own.status == whole.status == 0, works.output + own.output
    assert works.value
    assert own.value == whole.value == []
    assert refused.status == 1
    assert "--enable-symm-mem is not supported with --dcp-size 2" in refused.output


def engine(model: str, loaded: bool) -> None:
    import sglang
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    if loaded:
        load_plugins()
    sglang.Engine(server_args=ServerArgs(model_path=model, tp_size=2), attn_tp_size=1)


@pytest.mark.parametrize("loaded", [False, True])
def test_engine_does_not_lose_attn_tp_size(
    gpu: Fresh, models: dict[str, str], loaded: bool
) -> None:
    ended = gpu.outcome(engine, models["llama"], loaded)
    assert ended.status == 1
    assert "Engine(server_args=..., attn_tp_size=1): attn_tp_size would be ignored. Give" in (
        ended.output
    )


def attached(model: str, machine: str, storage: str) -> str:
    """The answer to `PUT /hicache/storage-backend` of a rank that runs the series."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    from sglang_helix.srt.managers.scheduler import attach_hicache_storage

    capability = mock.patch("torch.cuda.get_device_capability", return_value=(10, 0))
    with override_platform(**facts(machine)), capability:
        args = ServerArgs(model_path=model, device="cuda", **TP4)
        args.resolve_once()
        with mock.patch("sglang.srt.runtime_context.get_server_args", return_value=args):
            answer = attach_hicache_storage(
                lambda scheduler, request: SimpleNamespace(message="asked SGLang"),
                None,
                SimpleNamespace(hicache_storage_backend=storage),
            )
    return str(answer.message)


def test_storage_attached_later_obeys_the_rows_of_the_flag(
    gpu: Fresh, models: dict[str, str]
) -> None:
    latent, heads = models["deepseek_v2"], models["llama"]
    calls = [
        (attached, model, "Blackwell", storage)
        for model, storage in (
            (latent, "file"),
            (latent, "mooncake"),
            (latent, "nixl"),
            (heads, "file"),
            (heads, "mooncake"),
        )
    ]
    works, mooncake, nixl, heads_in_files, in_mooncake = (o.value for o in gpu.outcomes(calls))
    assert works == mooncake == heads_in_files == "asked SGLang"
    for message in (nixl, in_mooncake):
        assert (
            "is not supported with --dcp-size 2: no other store has a page format by owner"
            in message
        )


def checked(model: str, machine: str | None, *flags: str) -> tuple[int, str]:
    """Status and last line of ``python -m sglang_helix check`` where layers are as they need be."""
    from sglang_helix.__main__ import main
    from sglang_helix.build import Builder

    printed = io.StringIO()
    built = mock.patch.object(Builder, "build", return_value=("", ""))
    with contextlib.redirect_stdout(printed), built:
        on = ["--on", machine] if machine else []
        status = main(["check", *on, "--model-path", model, "--tp", "4", *flags])
    return status, printed.getvalue().splitlines()[-1]


def test_check_says_the_verdict_by_the_configuration_alone(
    gpu: Fresh, models: dict[str, str], tmp_path: Path
) -> None:
    alone = tmp_path / "configuration"
    alone.mkdir()
    (alone / "config.json").write_text((Path(models["llama"]) / "config.json").read_text())
    mxfp4 = tmp_path / "mxfp4"
    mxfp4.mkdir()
    (mxfp4 / "config.json").write_text(
        json.dumps(
            json.loads((alone / "config.json").read_text())
            | {"quantization_config": {"quant_method": "mxfp4"}}
        )
    )
    cases = {
        (str(alone), None, "--dcp-size", "2"): (0, "works: --tp-size 4 --dcp-size 2 --dcp-c"),
        (str(mxfp4), "Hopper", "--dcp-size", "2"): (0, "works: --tp-size 4 --dcp-size 2 --dcp-c"),
        (str(alone), "Hopper", "--dcp-size", "1"): (0, "whole: no sharded cache"),
        (str(alone), "Hopper", "--dcp-size", "2"): (0, "works: --tp-size 4 --dcp-size 2 --dcp-c"),
        (str(alone), "Ampere", "--attn-tp-size", "3"): (1, "refused: --attn-tp-size 3 does not"),
        (models["dsa"], "Blackwell", "--dcp-size", "2"): (0, "own: sglang-helix: SGLang serves"),
        (models["dsa"], "Blackwell", "--attn-tp-size", "2"): (1, "refused: --attn-tp-size 2 is n"),
        (str(tmp_path / "none"), "Hopper"): (1, "refused: "),
    }
    outcomes = gpu.outcomes([(checked, *case) for case in cases])
    for outcome, (status, line) in zip(outcomes, cases.values(), strict=True):
        assert outcome.status == 0, outcome.output
        assert outcome.value[0] == status
        assert outcome.value[1].startswith(line)
    # Whose GPUs it answered for is said where nobody named them.
    assert "this machine has no GPU: as on Hopper (--on: Ampere, " in outcomes[0].output
    assert "this machine has no GPU" not in outcomes[1].output


def checked_where_nothing_is_built(model: str) -> list[str]:
    """What check says where only a sharded cache stands in the way of a model, and where not."""
    from sglang_helix.check import check

    argv = ["--model-path", model, "--tp-size", "4", "--dcp-size", "2"]
    builders = [
        SimpleNamespace(build=lambda flags: ("", "no GPU")),
        SimpleNamespace(build=lambda flags: ("", "no GPU" if "--dcp-size" in flags else "")),
    ]
    return [check(argv, builder, "Hopper").meaning for builder in builders]


def test_check_says_whether_sglang_builds_the_model_at_all(
    gpu: Fresh, models: dict[str, str]
) -> None:
    neither, whole = gpu.value(checked_where_nothing_is_built, models["llama"])
    here = "Its layers could not be built here and are checked when it starts (no GPU)."
    assert neither.endswith(f"{here} SGLang builds them here no more without a sharded cache.")
    assert whole.endswith(here)


def checked_by_layout(models: list[str]) -> tuple[int, list[str]]:
    """Status and lines of a check of several models without a layout among the flags."""
    from sglang_helix.__main__ import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["check", "--on", "Hopper", "--model-path", *models, "--tp", "4"])
    return status, printed.getvalue().splitlines()


def test_check_builds_the_layers_of_every_layout(gpu: Fresh, tmp_path: Path) -> None:
    """The loader's refusals come before any server too: OLMoE's norms over all heads, fitted."""
    model_type, entries, _ = BUILT["OlmoeForCausalLM"]
    half = configuration("OlmoeForCausalLM", model_type, entries, tmp_path)
    (outcome,) = gpu.outcomes([(checked_by_layout, [str(half), str(tmp_path / "none")])])
    assert outcome.status == 0, outcome.output
    status, (of_half, of_none) = outcome.value
    assert status == 1
    assert of_half.startswith(f"{half}: works: --dcp-size 2 (2x) works by fa3; --attn-tp-size 2 (2")
    assert "refused: --dcp-size > 1 does not support OlmoeForCausalLM: " in of_half
    assert of_none.startswith(f"{tmp_path / 'none'}: refused: ")
