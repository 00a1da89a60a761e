"""What is prepared and probed once a model is loaded: heads of a group, widths, largest batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang_helix.flags import keep
from sglang_helix.srt.model_executor import model_runner

pytestmark = pytest.mark.quick


class Attention(torch.nn.Module):
    """Layers of two widths, as in models whose value heads differ between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            RadixAttention(8, 64, 1.0, num_kv_heads=2, layer_id=layer, v_head_dim=width)
            for layer, width in enumerate((64, 128, 64))
        )


class Case:
    """A rank of N = 8, K = 4, and what it is told about the server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prepared: list[dict[str, Any]] = []
        self.gathered: list[dict[str, Any]] = []
        self.probed: list[dict[str, Any]] = []
        self.group = SimpleNamespace()
        self.everyone = object()
        self.parallel = SimpleNamespace(
            dcp_comm_backend="symm",
            attn_tp_size=8,
            attn_dcp_size=4,
            dcp_replicate_q_proj=True,
            dcp_group=self.group,
            tp_group=SimpleNamespace(cpu_group=self.everyone),
        )
        self.backends = "flashinfer", "fa3"
        self.decode = SimpleNamespace(bs=[1, 2, 160])
        self.schedule = SimpleNamespace(max_running_requests=None)
        graph = SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=self.decode))
        self.spec = SimpleNamespace(speculative_num_draft_tokens=None)
        bags = {
            "get_spec": self.spec,
            "get_parallel": self.parallel,
            "get_exec": SimpleNamespace(graph=graph),
            "get_schedule": self.schedule,
            "get_device": SimpleNamespace(watchdog_timeout=77.0),
        }
        for name, bag in bags.items():
            monkeypatch.setattr(model_runner, name, lambda bag=bag: bag)
        monkeypatch.setattr(model_runner, "attention_backends", lambda: self.backends)
        monkeypatch.setattr(model_runner, "probe", self._probe)
        monkeypatch.setattr(model_runner, "Exchanger", self._exchanger)
        self.runner = SimpleNamespace(
            model=Attention(),
            use_mla_backend=False,
            server_args=SimpleNamespace(),
            dtype=torch.bfloat16,
            model_config=SimpleNamespace(
                get_max_num_attention_heads=lambda: 64,
                kv_lora_rank=512,
                qk_rope_head_dim=64,
                hf_text_config=None,
                is_hybrid_swa=False,
            ),
        )

    def _exchanger(self, backend: str, group: object) -> Any:
        assert group is self.group
        return SimpleNamespace(
            name=backend,
            prepare=lambda **shape: self.prepared.append(shape),
            prepare_queries=lambda **shape: self.gathered.append(shape),
        )

    def _probe(self, exchanger: Any, everyone: object, **options: Any) -> None:
        assert exchanger is self.group.exchanger
        assert everyone is self.everyone
        self.probed.append({"backend": exchanger.name, **options})

    def load(self) -> list[dict[str, Any]]:
        model_runner.prepare_exchange(None, self.runner)
        return self.prepared


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(monkeypatch)


COMMON = {"num_heads": 32, "dtype": torch.bfloat16, "timeout": 77.0, "max_tokens": 160}


def test_every_width_once_in_one_order(case: Case) -> None:
    assert case.load() == [{**COMMON, "head_dim": 64}, {**COMMON, "head_dim": 128}]


def test_mla_exchanges_latents(case: Case) -> None:
    case.runner.use_mla_backend = True
    assert case.load() == [{**COMMON, "head_dim": 512}]


def test_values_projected_first_are_exchanged_too(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.runner.use_mla_backend = True
    keep(case.runner.server_args, dcp_replicate_v_proj=True)
    layer = SimpleNamespace(v_head_dim=128)
    monkeypatch.setattr(model_runner.replicas, "layers", lambda model: [("0", layer), ("1", layer)])
    assert [shape["head_dim"] for shape in case.load()] == [128, 512]
    assert [found["head_dims"] for found in case.probed] == [[128, 512]]


@pytest.mark.parametrize(
    ("captured", "running", "largest"),
    [([1, 8], 48, 48), ([1, 64], 48, 64), (None, 48, 48), (None, None, None), ([], None, None)],
)
def test_the_larger_of_what_is_captured_and_what_may_run(
    case: Case, captured: list[int] | None, running: int | None, largest: int | None
) -> None:
    case.decode.bs, case.schedule.max_running_requests = captured, running
    assert {shape["max_tokens"] for shape in case.load()} == {largest}


def test_every_draft_of_a_request_is_exchanged(case: Case) -> None:
    case.spec.speculative_num_draft_tokens = 4
    assert {shape["max_tokens"] for shape in case.load()} == {640}


def test_a_draft_model_exchanges_nothing(case: Case) -> None:
    case.parallel.attn_dcp_size = 1
    assert case.load() == []
    assert case.probed == []


@pytest.mark.parametrize(
    ("decode", "base2", "form"),
    [
        ("fa3", False, "rows"),
        ("flashinfer", True, "rows"),
        ("triton", False, "splits"),
        ("trtllm_mha", True, "masked rows"),
    ],
)
@pytest.mark.parametrize("backend", ["symm", "a2a", "ag_rs"])
def test_every_exchange_is_probed_as_decode_calls_it(
    case: Case, backend: str, decode: str, base2: bool, form: str
) -> None:
    case.parallel.dcp_comm_backend, case.backends = backend, ("fa3", decode)
    case.load()
    shape = {"num_heads": 32, "dtype": torch.bfloat16, "max_tokens": 160, "head_dims": [64, 128]}
    left = {"base2": base2, "form": form, "queries": []}
    assert case.probed == [{"backend": backend, **left, **shape}]


@pytest.mark.parametrize(("mla", "widths"), [(True, [(512, 64)]), (False, [(64,)])])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_queries_are_probed_as_decode_gathers_them(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    mla: bool,
    widths: list[tuple[int]],
    by_kernel: bool,
) -> None:
    case.runner.use_mla_backend, case.parallel.dcp_replicate_q_proj = mla, False
    monkeypatch.setenv("HELIX_SYMM_GATHER", "1" if by_kernel else "0")
    case.load()
    assert [found["queries"] for found in case.probed] == [widths]
    assert case.gathered == [{**COMMON, "widths": one} for one in widths if by_kernel]


def test_another_exchange_is_not_ours(case: Case) -> None:
    case.parallel.dcp_comm_backend = "fi_a2a"
    assert case.load() == []
    assert case.probed == []
    assert not hasattr(case.group, "exchanger")
