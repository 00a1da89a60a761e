"""Nothing is served unless every hook is in place in every process.

What fails here fails inside a process or a function; test_launcher_refuses.py breaks real servers.
"""

import itertools
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Server
from sglang_helix import series
from sglang_helix.hook import HOOK_TYPES, SeriesError
from sglang_helix.srt.compatibility.verdict import Verdict
from sglang_helix.srt.entrypoints.engine import check_reports, launch_scheduler_processes
from sglang_helix.srt.layers.attention.adapters import ADAPTERS
from sglang_helix.srt.managers.data_parallel_controller import add_series_reports
from sglang_helix.srt.managers.scheduler import OTHER_NODES, SERIES_KEY
from srt.expected import check, prompt
from srt.fresh import Fresh

LAUNCH = [h.target for h in series.hooks("launch") if h.kind in HOOK_TYPES]
SERVE = [h.target for h in series.hooks("serve") if h.kind in HOOK_TYPES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("m") / "llama")


# SGLang logs what goes wrong with a plugin or a hook, and carries on. The series does not.


def hook_that_does_not_take(target: str, model: str, dcp_size: int) -> None:
    """SGLang fails to apply one hook; then a launcher resolves, and a rank starts."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    apply = HookRegistry._apply_target.__func__

    def failing(cls: Any, applied: str, hooks: Any) -> None:
        if applied == target:
            raise AttributeError("renamed by SGLang")
        apply(cls, applied, hooks)

    HookRegistry._apply_target = classmethod(failing)
    load_plugins()
    from sglang.srt.server_args import ServerArgs
    from sglang_helix import plugin

    ServerArgs(model_path=model, tp_size=2, dcp_size=dcp_size).resolve_once()
    print("resolved", flush=True)
    plugin.install_serve_stage()


@pytest.mark.parametrize("target", LAUNCH)
def test_launcher_stops_at_a_launch_hook_that_did_not_take(
    fresh: Fresh, model: Path, target: str
) -> None:
    stopped = fresh.outcome(hook_that_does_not_take, target, str(model), 1)
    assert stopped.status == 1
    assert f"SeriesError: SGLang did not apply the hooks on {target}" in stopped.output
    assert "resolved" not in stopped.output.splitlines()


def plugin_beside_a_tree_that_has_the_series() -> None:
    module = ModuleType("sglang.srt.helix")
    module.__spec__ = ModuleSpec(module.__name__, None)
    sys.modules[module.__name__] = module
    from sglang.srt.plugins import load_plugins

    load_plugins()
    print("loaded", flush=True)


def test_the_series_is_not_started_twice(fresh: Fresh) -> None:
    stopped = fresh.outcome(plugin_beside_a_tree_that_has_the_series)
    assert stopped.status == 1
    assert "this SGLang has the series in its own tree (sglang/srt/helix.py)" in stopped.output
    assert "pip uninstall sglang-helix" in stopped.output
    assert "loaded" not in stopped.output.splitlines()


@pytest.mark.parametrize("target", SERVE[:: max(1, len(SERVE) // 4)])
def test_rank_stops_at_a_serve_hook_that_did_not_take(
    fresh: Fresh, model: Path, target: str
) -> None:
    stopped = fresh.outcome(hook_that_does_not_take, target, str(model), 2)
    assert stopped.status == 1
    assert "resolved" in stopped.output.splitlines()
    assert "sglang-helix: the serve stage of the series failed: SGLang did not apply the " in (
        stopped.output
    )
    assert target in stopped.output


def module_that_does_not_import(name: str) -> None:
    sys.modules[name] = None  # type: ignore[assignment]
    from sglang.srt.plugins import load_plugins

    load_plugins()
    print("loaded", flush=True)
    from sglang_helix import plugin

    plugin.install_serve_stage()


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("sglang_helix.series", "launch"),
        ("sglang_helix.srt.entrypoints.engine", "launch"),
        ("sglang_helix.srt.layers.linear", "serve"),
        ("sglang_helix.srt.model_executor.model_runner", "serve"),
    ],
)
def test_process_stops_where_something_does_not_import(fresh: Fresh, name: str, stage: str) -> None:
    stopped = fresh.outcome(module_that_does_not_import, name)
    assert stopped.status == 1
    assert f"sglang-helix: the {stage} stage of the series failed: " in stopped.output
    assert ("loaded" in stopped.output.splitlines()) == (stage == "serve")


def factory_of_torch_native() -> str:
    """Who makes `torch_native` once a rank of the CPU reference has all it needs."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang_helix import plugin

    plugin.install_serve_stage()
    import sglang.srt.model_executor.model_runner  # noqa: F401 the platform registers its own
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return str(ATTENTION_BACKENDS["torch_native"])


def test_adapters_take_the_place_of_a_platforms_backend(fresh: Fresh) -> None:
    assert "create_backend" in fresh.value(factory_of_torch_native)


def target_of_another_plugin(target: str) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, lambda original, *a, **k: original(*a, **k), HookType.AROUND)
    load_plugins()
    from sglang_helix import plugin

    plugin.install_serve_stage()


def test_rank_stops_where_another_plugin_came_first(fresh: Fresh) -> None:
    """SGLang patches a target once: the series' hook would be ignored without a word."""
    target = "sglang.srt.models.utils.enable_fused_set_kv_buffer"
    stopped = fresh.outcome(target_of_another_plugin, target)
    assert stopped.status == 1
    assert f"another plugin has hooked {target}" in stopped.output
    assert "SGLANG_PLUGINS" in stopped.output


def test_launch_targets_may_be_shared(fresh: Fresh) -> None:
    """Before the first apply SGLang chains the hooks of several plugins."""
    target = "sglang.srt.managers.scheduler.Scheduler.get_init_info"
    assert fresh.outcome(target_of_another_plugin, target).status == 0


# Every rank reports what it runs, and the launcher compares.


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The launcher's layout."""
    layout = SimpleNamespace(
        tp_size=4,
        attn_tp_size=4,
        pp_size=1,
        dp_size=1,
        nnodes=1,
        node_rank=0,
        attn_dcp_size=2,
        dcp_comm_backend="a2a",
        dcp_replicate_q_proj=False,
    )
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: layout)
    launched_with(monkeypatch, "works")
    return layout


def launched_with(monkeypatch: pytest.MonkeyPatch, kind: Any, mode: str = "null") -> None:
    arguments = SimpleNamespace(
        _helix_verdict=Verdict(kind),
        disaggregation_mode=mode,
        disaggregation_transfer_backend="mooncake",
    )
    monkeypatch.setattr("sglang.srt.runtime_context.get_server_args", lambda: arguments)


def report(**different: Any) -> dict[str, Any]:
    from sglang_helix.srt.managers.scheduler import series_of

    stages = frozenset({"launch", "serve"})
    return {SERIES_KEY: {"series": {**series_of(stages), **different}, "kv_tokens": 1}}


@pytest.mark.usefixtures("parallel")
def test_equal_reports_pass() -> None:
    check_reports([report()] * 4)


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize(
    "different",
    [
        {"version": "0.0.1"},
        {"stages": ["launch"]},
        {"stages": []},
        {"verdict": "own"},
        {"tp_size": 8},
        {"dcp_size": 4},
        {"dcp_size": 1, "stages": ["launch"]},
        {"dcp_comm_backend": "ag_rs"},
        {"dcp_replicate_q_proj": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_with_another_report_is_named(rank: int, different: dict[str, Any]) -> None:
    infos = [report() for _ in range(4)]
    infos[rank] = report(**different)
    with pytest.raises(SeriesError) as refused:
        check_reports(infos)
    message = str(refused.value)
    assert message.startswith(f"scheduler process {rank} runs ")
    assert all(f"{name!r}: {value!r}" in message for name, value in different.items())


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("info", [{}, {"status": "ready"}, {SERIES_KEY: {}}])
def test_a_rank_without_the_series_is_named(info: dict[str, Any]) -> None:
    with pytest.raises(SeriesError, match="scheduler process 1 runs without the series"):
        check_reports([report(), info])


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("kind", ["whole", "own"])
def test_the_launch_stage_alone_where_the_series_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    launched_with(monkeypatch, kind)
    check_reports([report(stages=["launch"])] * 4)
    with pytest.raises(SeriesError):
        check_reports([report(stages=["launch"]), {}])
    with pytest.raises(SeriesError):
        check_reports([report()])
    with pytest.raises(SeriesError, match="0 scheduler processes of at least 1 have"):
        check_reports([])


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("works", ["launch", "serve", "transfer"]),
        ("whole", ["launch", "transfer"]),
        ("own", ["launch"]),
    ],
)
def test_both_servers_of_a_transfer_have_its_stage(
    monkeypatch: pytest.MonkeyPatch, kind: Any, stages: list[str]
) -> None:
    """A plain prefill server too: without it, it would end at a sharded decode server."""
    launched_with(monkeypatch, kind, mode="prefill")
    check_reports([report(stages=stages)] * 4)
    with pytest.raises(SeriesError, match="scheduler process 3 runs"):
        check_reports([report(stages=stages)] * 3 + [report(stages=stages[:-1])])


def test_no_rank_is_missing(parallel: SimpleNamespace) -> None:
    for count in range(4):
        with pytest.raises(SeriesError, match=f"{count} scheduler processes of at least 4 have"):
            check_reports([report()] * count)
    parallel.pp_size = 2
    with pytest.raises(SeriesError, match="4 scheduler processes of at least 8 have"):
        check_reports([report()] * 4)
    check_reports([report()] * 8)


def test_the_first_node_hears_of_all_others(parallel: SimpleNamespace) -> None:
    def first(*others: dict[str, Any]) -> dict[str, Any]:
        info = report()
        return {SERIES_KEY: {**info[SERIES_KEY], OTHER_NODES: [one[SERIES_KEY] for one in others]}}

    parallel.nnodes = 2
    check_reports([first(report(), report()), report()])
    with pytest.raises(SeriesError, match="3 scheduler processes of at least 4 have"):
        check_reports([first(report()), report()])
    with pytest.raises(SeriesError, match=r"scheduler process 3 runs .*'version': '0.0.1'"):
        check_reports([first(report(), report(version="0.0.1")), report()])
    # The other node hears of its own only.
    parallel.node_rank = 1
    check_reports([report()] * 2)
    with pytest.raises(SeriesError, match="1 scheduler processes of at least 2 have"):
        check_reports([report()])


def test_reports_of_replicas_come_through_their_controller(parallel: SimpleNamespace) -> None:
    """The launcher hears from the data-parallel controller only."""

    def controller(*infos: dict[str, Any]) -> list[dict[str, Any]]:
        result: dict[str, Any] = {"status": "ready"}
        add_series_reports(result, SimpleNamespace(_scheduler_init_infos=list(infos)))
        return [result]

    parallel.dp_size = 2
    check_reports(controller(*[report()] * 8))
    with pytest.raises(SeriesError, match="7 scheduler processes of at least 8 have"):
        check_reports(controller(*[report()] * 7))
    with pytest.raises(SeriesError, match="scheduler process 2 runs without the series"):
        check_reports(controller(report(), report(), {}))
    with pytest.raises(SeriesError, match=r"scheduler process 1 runs .*'dcp_size': 4"):
        check_reports(controller(report(), report(dcp_size=4)))
    layout = {"attn_tp_size": 2, "kvp_size": 4}
    (of_server,) = controller(*[report() | layout] * 8)
    assert of_server.items() >= layout.items()  # as `/server_info` shows it without replicas


@pytest.mark.usefixtures("parallel")
def test_launcher_waits_for_the_reports() -> None:
    waited: list[str] = []
    result = SimpleNamespace(scheduler_infos=[], wait_for_ready=lambda: waited.append("upstream"))

    def launch(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        assert (args, kwargs) == (("args",), {"placement_group": None})
        return result, ["process"]

    launched, processes = launch_scheduler_processes(launch, "args", placement_group=None)
    assert (launched, processes, waited) == (result, ["process"], [])
    result.scheduler_infos += [report(), {}]
    with pytest.raises(SeriesError, match="scheduler process 1"):
        launched.wait_for_ready()
    assert waited == ["upstream"]


# The backend that a rank ends up with.


def backends_that_pass(model: str) -> dict[str, str]:
    """What `check_backend` says of each kind of backend, for GQA and for MLA."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang_helix.srt.layers.attention import torch_native_backend, torch_reference
    from sglang_helix.srt.layers.attention.attention_registry import check_backend

    class Foreign(TorchNativeAttnBackend):
        """Registered by another plugin under the adapter's name, after the series."""

    def made(kind: type, **parts: Any) -> Any:
        backend = object.__new__(kind)
        backend.__dict__.update(parts)
        return backend

    def named(path: str) -> Any:
        module, _, name = path.partition(":")
        return made(type(name, (), {"__module__": module}))

    ours = made(torch_native_backend.ShardedTorchReferenceAttnBackend)
    both = {"prefill_backend": ours, "decode_backend": ours}
    candidates = {
        "adapter": ours,
        "child": made(type("Child", (type(ours),), {})),
        "whole": made(torch_reference.TorchReferenceAttnBackend),
        "upstream": made(TorchNativeAttnBackend),
        "foreign": made(Foreign),
        "halves": made(HybridAttnBackend, **both),
        "foreign prefill": made(HybridAttnBackend, **{**both, "prefill_backend": made(Foreign)}),
        "foreign decode": made(HybridAttnBackend, **{**both, "decode_backend": made(Foreign)}),
    }
    candidates |= {path: named(path) for record in ADAPTERS for path in record.gqa + record.mla}
    said = {}
    for kind in ("GQA", "MLA"):
        for name, backend in candidates.items():
            try:
                check_backend(backend, mla=kind == "MLA")
                said[f"{kind} {name}"] = ""
            except SeriesError as refused:
                said[f"{kind} {name}"] = str(refused)
    return said


def test_backend_that_is_no_adapter_is_refused(fresh: Fresh, model: Path) -> None:
    said = fresh.value(backends_that_pass, str(model))
    passed = {name for name, refusal in said.items() if not refusal}
    assert passed == {
        f"{kind} {name}" for kind in ("GQA", "MLA") for name in ("adapter", "halves")
    } | {
        f"{kind} {path}"
        for record in ADAPTERS
        for kind, paths in (("GQA", record.gqa), ("MLA", record.mla))
        for path in paths
    }
    for name, refusal in said.items():
        if "foreign" in name:
            assert "Foreign does not serve a sharded cache: something replaced" in refusal


def caches_that_are_refused(model: str) -> dict[tuple[str, str, str], str]:
    """What a rank's factories say of caches that start-up did not see, by backend and dtype."""
    import torch
    from sglang_helix.srt.layers.attention import attention_registry
    from srt.rank import published

    published(0, ["--model-path", model, "--tp-size", "2", "--dcp-size", "2"])
    said = {}
    with mock.patch.object(attention_registry.pkgutil, "resolve_name", return_value=str):
        for record, kind, dtype in itertools.product(
            ADAPTERS,
            ("GQA", "MLA"),
            (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        ):
            runner = SimpleNamespace(
                use_mla_backend=kind == "MLA", dtype=torch.bfloat16, kv_cache_dtype=dtype
            )
            try:
                attention_registry.create_backend(record.name, str, runner)
            except ValueError as refused:
                said[record.name, kind, str(dtype)] = str(refused)
    return said


def test_a_cache_that_a_checkpoint_asked_for_is_refused_by_name(fresh: Fresh, model: Path) -> None:
    said = fresh.value(caches_that_are_refused, str(model))
    assert said.keys() == {
        (record.name, kind, f"torch.float8_{form}")
        for record in ADAPTERS
        for kind in ("GQA", "MLA")
        for form in ("e4m3fn", "e5m2")
        if kind in record.no_fp8 or (record.no_e5m2 and form == "e5m2")
    }
    for (name, kind, dtype), refusal in said.items():
        assert f"--attention-backend {name} does not read a cache of {dtype} for {kind}" in refusal
        *_, others = refusal.partition("give --kv-cache-dtype bfloat16, or --attention-backend ")
        assert "triton" in others
        assert name not in others.rstrip(".").split(" or ")


def scales_of_softmax(model: str) -> dict[float, str]:
    """What a rank's factories say of layers with these scales where the configuration's is 0.1."""
    import torch
    from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang_helix.srt.layers.attention.attention_registry import create_backend
    from srt.rank import published

    published(0, ["--model-path", model, "--tp-size", "2", "--dcp-size", "2"])
    said = {}
    for scale in (0.1, 0.08):
        runner = SimpleNamespace(
            use_mla_backend=True,
            dtype=torch.bfloat16,
            kv_cache_dtype=torch.bfloat16,
            model_config=SimpleNamespace(scaling=0.1, kv_lora_rank=512),
            model=torch.nn.ModuleList(
                [
                    RadixAttention(16, 128, 0.5, 16, 2),  # a recurrent layer of Ring-2.5
                    RadixAttention(16, 576, scale, 1, 3, v_head_dim=512),
                ]
            ),
        )
        try:
            create_backend("flashinfer", lambda _: object.__new__(FlashInferMLAAttnBackend), runner)
        except ValueError as refused:
            said[scale] = str(refused)
    return said


def test_flashinfer_attends_with_the_scale_of_the_layers(fresh: Fresh, model: Path) -> None:
    """A YaRN in the configuration of a model without positions, which its layers leave out."""
    said = fresh.value(scales_of_softmax, str(model))
    assert said.keys() == {0.08}
    assert "--attention-backend flashinfer attends with a softmax scale of 0.1" in said[0.08]
    assert "layer 3 of this model has 0.08" in said[0.08]


# With data-parallel replicas everything is in place too, and nothing is refused for nothing.


@pytest.mark.server
def test_replicas_serve(tmp_path: Path) -> None:
    """Two replicas of two ranks, without a prefix cache: chunks end between pages of a group."""
    checkpoint = make_checkpoint("deepseek_v2", tmp_path / "deepseek_v2")
    layout = ("--tp", "2", "--dcp-size", "2", "--dcp-comm-backend", "a2a", "--dp-size", "2")
    flags = ("--disable-radix-cache", "--chunked-prefill-size", "31", "--page-size", "1")
    with Server(checkpoint, *layout, *flags) as server:
        reports = server.server_info()[SERIES_KEY]
        assert [one["series"]["stages"] for one in reports] == [["launch", "serve"]] * 4
        prompts = [prompt(length, seed=7) for length in (1, 2, 33, 70)]
        for tokens, answer in zip(prompts, server.generate_batch(prompts, 5), strict=True):
            check(checkpoint, tokens, answer, 5)
