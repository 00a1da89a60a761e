"""Which attention backend serves a sharded cache: where none is named, and where one is."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES
from sglang_helix.check import MACHINES
from sglang_helix.srt.layers.attention import seen
from sglang_helix.srt.layers.attention.adapters import adapter, serving
from sglang_helix.srt.layers.attention.measured import faster
from sglang_helix.srt.layers.attention.seen import Seen
from srt.resolved import ATTENTION, WORKING, Resolve, written

# The attention backend where none is named.


@pytest.mark.parametrize(
    ("machine", "family", "default", "chosen"),
    [
        ("Ampere", "llama", "flashinfer", "flashinfer"),
        ("Ampere", "deepseek_v2", "triton", "triton"),
        ("Hopper", "llama", "fa3", "fa3"),
        ("Hopper", "deepseek_v2", "fa3", "fa3"),
        ("Blackwell", "llama", "trtllm_mha", "flashinfer"),
        ("Blackwell", "deepseek_v2", "flashinfer", "flashinfer"),
    ],
)
def test_default_gives_way_only_where_it_does_not_serve(
    resolved: Resolve, machine: str, family: str, default: str, chosen: str
) -> None:
    whole = resolved(machine, family, tp_size=4)
    assert (whole.backends, whole.said) == ((default, default), "")
    sharded = resolved(machine, family, tp_size=4, dcp_size=2)
    assert sharded.backends == (chosen, chosen), sharded.error
    if chosen == default:
        assert "--attention-backend" not in sharded.said
    else:
        said = f"--attention-backend {chosen}: the default here, {default}, does not serve"
        assert said in sharded.said
        assert "--dcp-size 2" in sharded.said


@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_a_named_half_is_kept_and_the_other_chosen(resolved: Resolve, half: str) -> None:
    flags = {f"{half}_attention_backend": "torch_native"}
    found = resolved("Hopper", "llama", tp_size=4, dcp_size=2, **flags)
    assert found.backends is not None, found.error
    assert set(found.backends) == {"torch_native", "fa3"}
    assert found.backends[half == "decode"] == "torch_native"
    assert "--attention-backend" not in found.said


def choices() -> list[str]:
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

    return list(ATTENTION_BACKEND_CHOICES)


# Refused by the series itself, on some machine; the rest needs hardware or models that SGLang
# asks for first.
BY_THE_SERIES = {
    "llama": {"fa4", "flex_attention", "trtllm_mha", "aiter", "wave"},
    "deepseek_v2": {"fa4", "flex_attention", "flashmla", "aiter", "wave"},
}


@pytest.mark.parametrize("side", ["attention", "prefill_attention", "decode_attention"])
@pytest.mark.parametrize("family", WORKING)
def test_backends_serve_or_are_refused_by_name(resolved: Resolve, family: str, side: str) -> None:
    other = {
        "prefill_attention": {"decode_attention_backend": "torch_native"},
        "decode_attention": {"prefill_attention_backend": "torch_native"},
    }.get(side, {})
    refused_by_name = set()
    for machine in MACHINES:
        for backend in choices():
            flags = {f"{side}_backend": backend, **other}
            found = resolved(machine, family, tp_size=4, dcp_size=2, **flags)
            if found.backends is not None:
                assert set(found.backends) <= set(WORKING[family]), f"{machine} {backend}"
                continue
            if "does not serve" in found.error:
                advised = re.search(r"--dcp-size 2: use one of ([\w, ]+)\.", found.error)
                assert advised is not None, found.error
                assert backend not in advised[1].split(", ")
                assert set(advised[1].split(", ")) <= set(WORKING[family])
            # SGLang gives some other names, or another half beside them.
            flag = "--" + side.replace("_", "-") + "-backend"
            if f"{flag} {backend} does not serve " in found.error:
                refused_by_name.add(backend)
    assert refused_by_name >= BY_THE_SERIES[family], BY_THE_SERIES[family] - refused_by_name


def test_a_cache_that_a_backend_cannot_read(resolved: Resolve) -> None:
    """Not taken where none is named; where it is, refused with what reads it."""
    sharded = {"tp_size": 4, "dcp_size": 2, "kv_cache_dtype": "fp8_e4m3"}
    latent = resolved("Hopper", "deepseek_v2", **sharded)
    assert latent.backends == ("flashmla", "flashmla"), latent.error
    assert latent.args["page_size"] == 64
    assert "--attention-backend flashmla: the default here, fa3, does not serve" in latent.said
    for backend in ("fa3", "flashinfer"):
        named = resolved("Hopper", "deepseek_v2", attention_backend=backend, **sharded).error
        refused = f"--attention-backend {backend} does not read --kv-cache-dtype fp8_e4m3 for MLA"
        assert refused in named
        assert "with --dcp-size 2 (decode would convert the whole pool" in named
        assert ": use one of flashmla, triton, torch_native." in named
    # Of pages that the user wants otherwise, and of the other fp8, Triton.
    for flags in ({"page_size": 16}, {"kv_cache_dtype": "fp8_e5m2"}):
        other = resolved("Hopper", "deepseek_v2", **{**sharded, **flags})
        assert other.backends == ("triton", "triton"), other.error
    for dtype, backend in (("fp8_e4m3", "trtllm_mla"), ("fp8_e5m2", "triton")):
        other = resolved("Blackwell", "deepseek_v2", **{**sharded, "kv_cache_dtype": dtype})
        assert other.backends == (backend, backend), other.error
    keys = resolved("Hopper", "llama", **sharded)
    assert keys.backends == ("fa3", "fa3"), keys.error


@pytest.mark.parametrize(
    ("machine", "family", "flags", "said"),
    [
        (
            *("Hopper", "deepseek_v2"),
            {"attention_backend": "flashmla", "kv_cache_dtype": "fp8_e5m2"},
            "does not read --kv-cache-dtype fp8_e5m2 for MLA with --dcp-size 2 (fp8_e4m3 it does)",
        ),
        (
            *("Blackwell", "llama"),
            {"attention_backend": "trtllm_mha", "page_size": 128},
            "takes --page-size 16 or 32 or 64, not 128, for GQA or MHA with --dcp-size 2",
        ),
        (
            *("Hopper", "llama"),
            {"attention_backend": "flex_attention"},
            "does not serve GQA or MHA with --dcp-size 2",
        ),
    ],
)
def test_what_a_backend_cannot_take_is_one_error(
    resolved: Resolve, machine: str, family: str, flags: dict[str, Any], said: str
) -> None:
    error = resolved(machine, family, tp_size=4, dcp_size=2, **flags).error
    assert error.startswith(f"ValueError: --attention-backend {flags['attention_backend']} {said}")
    assert ": use one of " in error
    assert error.count("\n") == 0


UNSEEN = "has not been seen on a GPU of compute capability"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("family", ATTENTION)
def test_a_backend_not_seen_on_such_a_gpu_is_taken_by_name_alone(
    resolved: Resolve, machine: str, family: str
) -> None:
    kind, major = ATTENTION[family], MACHINES[machine]["device_sm"] // 10
    layout = {"tp_size": 4, "dcp_size": 2}
    taken = resolved(machine, family, **layout).backends
    assert taken is not None
    for record in serving(kind):
        if major not in (record.majors_for(kind) or (major,)):
            continue
        found = resolved(machine, family, launched=True, **layout, attention_backend=record.name)
        assert record.name in (found.backends or ()), found.error
        unseen = {major, None} & {*record.unseen(kind)}
        said = f"--attention-backend {record.name} {UNSEEN} {major}.x with --dcp-size."
        assert found.said.count(said) == len(unseen)
        if unseen:
            assert record.name not in taken


def test_seen_on_one_generation_is_not_seen_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of one name are others on another; the default of a machine stays what it was."""
    hopper, blackwell = (
        SimpleNamespace(is_cuda=True, device_sm=MACHINES[name]["device_sm"])
        for name in ("Hopper", "Blackwell")
    )
    line = Seen("fa4", "GQA", "several GPUs", ("graph", "extend", "verify"), "")
    monkeypatch.setattr(seen, "SEEN", (*seen.SEEN, line))
    record = adapter("fa4")
    assert record.unseen("GQA") == record.unseen("MLA") == (10,)
    assert record.is_chosen_on(hopper, "GQA")
    assert record.is_verified_on(hopper, "GQA")
    assert not record.is_chosen_on(blackwell, "GQA")
    assert not record.is_verified_on(blackwell, "GQA")
    first = next(one for one in serving("GQA") if one.is_chosen_on(hopper, "GQA"))
    assert first.name == "fa3"
    # What names no major has the same kernels on all of them.
    assert adapter("flashinfer").is_chosen_on(blackwell, "GQA")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("backend", ["triton", "torch_native"])
def test_working_backends_are_kept(resolved: Resolve, machine: str, backend: str) -> None:
    for family in WORKING:
        found = resolved(machine, family, tp_size=4, dcp_size=2, attention_backend=backend)
        assert found.backends == (backend, backend), found.error
        assert "--attention-backend" not in found.said


def test_a_faster_backend_is_named_once(resolved: Resolve, tmp_path: Path) -> None:
    """By what is shipped; `test_measured.py` has both sides of the bound."""
    heads = {"num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config = {**FAMILIES["deepseek_v2"].config, **heads, "model_type": "deepseek_v2"}
    model = written(tmp_path, architectures=["DeepseekV2ForCausalLM"], **config)
    known = faster("fa3", WORKING["deepseek_v2"], "MLA 128", 9)
    for layout in ({"tp_size": 8, "dcp_size": 8}, {"tp_size": 8, "dcp_size": 4}):
        found = resolved("Hopper", model, launched=True, **layout)
        assert found.backends == ("fa3", "fa3"), found.error
        count = int(known is not None and layout["dcp_size"] == 8)
        assert found.said.count("times as fast as fa3 with the MLA 128 heads") == count
