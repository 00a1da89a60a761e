"""MLA of DeepSeek's class: what names of backends switch in it, and queries scaled by position."""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.hook import Hook
from sglang_helix.series import hooks
from sglang_helix.srt.models.deepseek_v2 import forward_absorb_core
from srt.expected import oracle
from srt.fresh import Fresh
from srt.models.test_models import CHUNK, serve_and_check

# Chunks with a prefix and without, and prompts, end on both sides of it.
ORIGINAL_MAX, BETA = CHUNK // 2, 1.0


def scaling(positions: torch.Tensor) -> torch.Tensor:
    """As the model's configuration means it: 1 below ORIGINAL_MAX, then rising by steps."""
    return 1 + BETA * torch.log(1 + torch.floor(positions / ORIGINAL_MAX))


def scale_queries_of(model: Any) -> None:
    """Scaling by position in the class of transformers that has none."""
    first = 0

    def note_first(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal first
        cache = kwargs.get("past_key_values")
        first = 0 if cache is None else cache.get_seq_length()

    def scale(module: Any, args: Any, queries: torch.Tensor) -> torch.Tensor:
        return queries * scaling(first + torch.arange(queries.shape[1]))[None, :, None]

    model.model.register_forward_pre_hook(note_first, with_kwargs=True)
    for layer in model.model.layers:
        layer.self_attn.q_b_proj.register_forward_hook(scale)


@pytest.mark.parametrize(("processes", "backend"), [("ready", "torch_native"), ("kernels", "fa3")])
def test_queries_scaled_by_position_equal_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, processes: str, backend: str
) -> None:
    """By backends of both lists; FA3 attends prefixes that are not absorbed, too."""
    model = make_checkpoint(
        "deepseek_v2",
        tmp_path,
        num_hidden_layers=2,
        qk_nope_head_dim=128,
        v_head_dim=128,
        llama_4_scaling={"original_max_position_embeddings": ORIGINAL_MAX, "beta": BETA},
    )
    scale_queries_of(oracle(model).model)
    ranks: Fresh = request.getfixturevalue(processes)
    serve_and_check(ranks, model, 2, 1, "a2a", "--attention-backend", backend)


def core(layer: Any, q_pe: Any, k_pe: Any, q_nope_out: Any, *args: Any) -> tuple[Any, ...]:
    """In the place of upstream's: the queries and the scaling that reach it."""
    return q_pe, q_nope_out, args[5]


def reaching_core(backend: str, factors: torch.Tensor | None) -> tuple[Any, ...]:
    layer = SimpleNamespace(current_attention_backend=backend)
    ones = torch.ones(4, 2, 8, dtype=torch.bfloat16)
    found: tuple[Any, ...] = forward_absorb_core(
        core, layer, ones, None, ones, None, None, None, None, None, factors, None
    )
    return found


@pytest.mark.parametrize("backend", ["triton", "fa3", "trtllm_mla"])
def test_every_backend_gets_scaled_queries(backend: str) -> None:
    factors = scaling(torch.tensor([0, ORIGINAL_MAX - 1, ORIGINAL_MAX, 1000]))[:, None, None]
    q_pe, q_nope_out, left = reaching_core(backend, factors)
    assert left is None
    wanted = factors.expand(4, 2, 8).to(torch.bfloat16)
    assert torch.equal(q_pe, wanted)
    assert torch.equal(q_nope_out, wanted)
    assert reaching_core(backend, None)[2] is None


_DEEPSEEK = "models/deepseek_common/attention_forward_methods"
# Who reads what the series changes without wrapping a call, and what the change means there.
READERS = {
    "FORWARD_ABSORB_CORE_ATTENTION_BACKENDS": {
        "models/deepseek_common/utils.py": "the list itself",
        f"{_DEEPSEEK}/forward_mla.py": "the core: two-part queries, an LSE, no scaling (scaled "
        "before it). The fused bmm and the queries born in fp8, which go by the list too, ask for "
        "dcp_size 1. Sinks go to attention as an argument, which the adapters refuse.",
        f"{_DEEPSEEK}/forward_mla_rocm.py": "ROCm only, where the series refuses to start",
    },
    "ATTENTION_BACKENDS": {
        "layers/attention/attention_registry.py": "the table itself",
        "model_executor/model_runner_components/attention_backend_setup.py": "the one that builds "
        "a backend by name: target, draft, prefill and decode",
        "speculative/draft_utils.py": "dsv4's entry, which the series leaves",
    },
    "server_args_class": {
        "entrypoints/engine.py": "the attribute itself, and the one call of it",
    },
}


def occurrences(pattern: str) -> set[tuple[str, str]]:
    """(file, group 1) of every match in SGLang's runtime."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0], "srt")
    return {
        (path.relative_to(root).as_posix(), found)
        for path in root.rglob("*.py")
        for found in re.findall(pattern, path.read_text())
    }


def changed_name(declared: Hook) -> str:
    return declared.target.partition("[")[0].rpartition(".")[2]


def test_every_reader_of_what_the_series_changes_was_looked_at() -> None:
    kinds = ("append", "backend", "attribute")
    changed = {changed_name(declared) for declared in hooks() if declared.kind in kinds}
    assert changed == set(READERS)
    for name, known in READERS.items():
        assert {file for file, _ in occurrences(rf"\b({name})\b")} == set(known)


def test_no_model_goes_by_the_class_of_a_backend_that_is_replaced() -> None:
    # Gemma 3 and 4 with images ask for the Triton backend, whose adapter is a subclass of it.
    asked = occurrences(r"isinstance\([^)]*\b(TritonAttnBackend|TorchNativeAttnBackend)\b")
    assert asked == {
        ("models/gemma3_mm.py", "TritonAttnBackend"),
        ("models/gemma4_mm.py", "TritonAttnBackend"),
    }
