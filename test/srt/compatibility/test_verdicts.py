"""Who serves: the series, SGLang as it is, or nobody; and that SGLang is then really as it is.

Every situation that SGLang serves by itself is resolved in a process with the series and in one
without it. All arguments, and the errors, must be the same.
"""

import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from sglang_helix.flags import keep
from sglang_helix.srt.compatibility.row import Row
from sglang_helix.srt.compatibility.rows.beside_own import BESIDE_OWN, NO_PLAN
from sglang_helix.srt.compatibility.situation import Situation
from sglang_helix.srt.compatibility.table import TABLE
from sglang_helix.srt.compatibility.verdict import Verdict, decide, refusals
from srt.compatibility.situations import CUTEDSL_KIMI, OURS, SPLIT, TP4, facts
from srt.fresh import Fresh

HYBRID = (
    "other hybrid linear attention of MLA, of Qwen3.5 and where A is a multiple of KV heads; "
    "what else moves states"
)
DRAFTS = "DSPARK and what cutedsl_mla verifies, of MLA models, and draft models of DSA and Qwen3.5"
DSA = "sparse attention of DeepSeek (DSA: DeepSeek-V3.2, GLM-5) on Blackwell and NPUs"
PD = "prefill-decode disaggregation of MLA models by NIXL, Mori, or with host copies"
NIXL = {"disaggregation_transfer_backend": "nixl"}
PLATFORM = "AMD, Ascend and Intel accelerators"

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
    "Kimi-K3": ("Blackwell", "kimi_k3", {}, (HYBRID,)),
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
        {"attn_dp_size": 2, "dcp_size": 2, **EAGLE, **CUTEDSL},
        ("attention data parallelism of MLA models and Qwen3.5 beside what is untried", DRAFTS),
    ),
    "AMD": ("AMD", "deepseek_v2", {"attention_backend": "aiter"}, (PLATFORM,)),
    "Intel XPU": ("XPU", "qwen3_next", {"attention_backend": "intel_xpu"}, (PLATFORM,)),
    "Ascend": ("NPU", "dsa", {}, (PLATFORM, DSA)),
}


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
        {"attention_backend": "flashinfer", "enable_mixed_chunk": True},
        ("(BailingMoeV2_5ForCausal",),
    ),
    "Kimi-K3 on Hopper": (
        "Hopper",
        "kimi_k3",
        {},
        ("CuteDSL MLA backend is only supported on Blackwell GPUs",),
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
