"""The cost model of ``layout --gpu``: against what was measured, published, and counted by hand."""

import json
import math
from pathlib import Path

import pytest
from scipy.optimize import least_squares
from sglang.srt.configs.model_config import ModelConfig
from sglang_helix import advice, cost
from sglang_helix.__main__ import main
from sglang_helix.layout import rows
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.dcp.exchange import GATHER_VARIABLE
from sglang_helix.srt.models.value_switch import switch

from benchmark.dcp import fit

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "benchmark/dcp/models"
FIGURES = sorted((ROOT / "docs/figures").glob("serve-*.csv"))
LITE = "benchmark/dcp/models/DeepSeek-V2-Lite"


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_every_measured_server_is_met(path: Path) -> None:
    figures = fit.measured(path)
    assert figures
    for row in figures:
        assert row.predicted(cost.fitted()) == pytest.approx(row.ms, rel=fit.BOUND), row


def test_the_published_table_has_this_form() -> None:
    """16 GB200s, DeepSeek-V2-Lite, 8 requests, by another engine: its constants, our formula.

    Eight figures, four of them constants: a layer's fixed time, the two exchanges, bandwidth.
    """
    published = {
        "": {256: 22.29, 512: 33.77},  # plain TP does not hold 8 x 1M
        "ag_rs": {256: 15.36, 512: 15.97, 1024: 17.57},
        "a2a": {256: 14.27, 512: 15.05, 1024: 16.64},
    }
    model = fit.model(LITE)
    by_k = {row.layout.kvp_size: row for row in rows(model.shape, 16, 0, 2)}

    def errors(constants: list[float]) -> list[float]:
        layer, ag_rs, a2a, bandwidth = constants
        parameters = cost.fitted()._replace(
            layer=layer,
            exchange={"ag_rs": ag_rs, "a2a": a2a},
            gather={cost.BY_NCCL: 0},
            cache=bandwidth,
        )
        return [
            cost.step_ms(
                model,
                cost.Choice(by_k[16 if name else 1], name, False),
                cost.GPUS["gb200"],
                parameters,
                context=context * 1024,
                requests=8,
            )
            / ms
            - 1
            for name, by_context in published.items()
            for context, ms in by_context.items()
        ]

    found = least_squares(errors, [300, 100, 100, 0.7])
    assert max(map(abs, errors(found.x))) < 0.03


def test_recurrent_states_are_read_and_written_in_every_layout() -> None:
    config = ModelConfig(str(ROOT / "docs/models/Qwen3-Next-80B-A3B"))
    model = cost.model_of(config)
    # 36 layers: 32 value heads of 128 x 128 in fp32, and 3 inputs of the convolution in bf16.
    assert model.state == 36 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)
    # Projections to 2 x 16 keys of 128, 32 values of 128 and as wide a gate, and back; of 12 layers
    # to and from 16 heads of 256.
    width, values = 2048, 32 * 128
    assert model.recurrent_layers == 36
    assert model.queries == model.attention == 12 * width * 16 * 256
    shared = 48 * 3 * width * 512
    recurrent = 36 * width * (2 * 16 * 128 + values + 2 * values)
    assert model.dense == recurrent + shared + width * 151936
    for row in rows(model.shape, 8, 0, 2):
        choice = cost.Choice(row, "a2a" if row.layout.kvp_size > 1 else "", False)
        with_states, without = (
            cost.step_ms(one, choice, cost.GPUS["h200"], cost.fitted(), context=8192, requests=16)
            for one in (model, model._replace(state=0))
        )
        moved = 2 * 16 * model.state / 8
        assert with_states - without == pytest.approx(moved / (4.8e9 * cost.fitted().cache))


def test_shipped_parameters_are_what_fit_writes(tmp_path: Path) -> None:
    """Every figure is predicted the same.

    What a layer, MLA, experts and a backend's call cost can stand in for one another, so that two
    kinds of CPU fit them a few percent apart.
    """
    out = tmp_path / "cost.json"
    assert fit.main([*map(str, FIGURES), "--out", str(out)]) == 0
    anew = json.loads(out.read_text())
    assert anew.keys() == cost.fitted()._asdict().keys()
    for name, value in cost.fitted()._asdict().items():
        assert anew[name] == pytest.approx(value, rel=0.05), name
    parameters = cost.Parameters(**anew)
    for row in (row for path in FIGURES for row in fit.measured(path)):
        assert row.predicted(parameters) == pytest.approx(row.predicted(cost.fitted()), rel=1e-3)


def test_fit_refuses_what_it_misses(tmp_path: Path) -> None:
    path, out = tmp_path / "serve-wrong.csv", tmp_path / "cost.json"
    head, first, *rest = (ROOT / "docs/figures/serve-h200x2-llama-8b.csv").read_text().splitlines()
    cells = dict(zip(head.split(","), first.split(","), strict=True))
    cells["tpot_median_ms"] = str(2 * float(cells["tpot_median_ms"]))
    path.write_text("\n".join([head, ",".join(cells.values()), *rest]) + "\n")
    assert fit.main([str(path), "--out", str(out)]) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("path", "billions"),
    # Published sizes, less the table of embeddings, which no step reads.
    [
        (MODELS / "Llama-3-8B", 8.03 - 0.525),
        (MODELS / "DeepSeek-V2-Lite", 15.7 - 0.21),
        (ROOT / "docs/models/DeepSeek-V3", 671 - 0.93),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_weights_are_counted(path: Path, billions: float) -> None:
    model = fit.model(str(path))
    plain = next(iter(rows(model.shape, 1, 0, 2)))
    held = cost.weight_bytes(model, plain.layout, False, None, 1)
    assert held / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_batch_reads_the_experts_it_chooses() -> None:
    model = fit.model(LITE)
    plain = next(iter(rows(model.shape, 1, 0, 2)))
    read = [cost.weight_bytes(model, plain.layout, False, n, 1) for n in (1, 2, 10**6)]
    chosen = model.expert_layers * model.experts * model.chosen
    assert read[1] - read[0] == pytest.approx(chosen * (1 - 6 / 64))
    assert read[2] == cost.weight_bytes(model, plain.layout, False, None, 1)


def advice_for(name: str, tp_size: int, **options: float) -> cost.Advice:
    given = {"kv_memory_gib": None, "cache_bytes": 2, **options}
    return cost.advise(
        fit.model(f"benchmark/dcp/models/{name}"), tp_size, cost.GPUS["h200"], **given
    )


def test_the_crossing_is_where_the_lines_cross() -> None:
    compared = advice_for("DeepSeek-V2-Lite", 4)
    for requests in (1, 8):
        crossing = compared.crossing(requests)
        assert crossing is not None
        plain, *sharded = compared.choices
        for context, wins in ((crossing - 1, False), (crossing, True)):
            fastest = min(compared.ms(choice, context, requests) for choice in sharded)
            assert (fastest < compared.ms(plain, context, requests)) == wins
        # Four H200s broke even between 8K and 128K with one request, and at 8K with eight.
        assert 2048 < crossing < (131072 if requests == 1 else 16384)


def test_every_exchange_that_was_fitted_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the least time a call first: it is what is plotted."""
    shipped = cost.fitted()
    for first in shipped.exchange:
        changed = shipped._replace(exchange={**shipped.exchange, first: 0.1})
        monkeypatch.setattr(cost, "fitted", lambda changed=changed: changed)
        compared = advice_for("DeepSeek-V2-Lite", 4)
        listed = list(dict.fromkeys(choice.exchange for choice in compared.choices))
        assert listed[:2] == ["", compared.exchange] == ["", first]
        assert {*listed} == {"", *shipped.exchange}


def test_where_no_copies_are_stored_plain_tp_is_advised() -> None:
    compared = advice_for("Llama-3-8B", 2)
    best = compared.best(4096, 1)
    assert best is not None
    assert best.flags == "plain TP"
    assert compared.crossing(1) is None
    assert "at no length" in advice.table(compared, [4096], [1])


def test_capacity_is_what_the_weights_leave() -> None:
    compared = advice_for("Qwen3-235B-shard", 2)
    plain = compared.choices[0]
    # A server of this shape held 2.6 million tokens in 115 GiB of each of four such GPUs, half.
    assert plain.row.kv_tokens == pytest.approx(2.57e6, rel=0.05)
    for choice in compared.choices[1:]:
        lost = plain.row.kv_tokens * 2 / choice.row.kv_tokens
        assert 1 <= lost < 1.03  # replicated queries take memory
    with pytest.raises(ValueError, match="--tp 2: the weights take all of 141 GiB"):
        advice_for("DeepSeek-V3-8-layers", 2, weight_element=20)


def test_every_layout_says_its_largest_batch() -> None:
    compared, contexts = advice_for("DeepSeek-V2-Lite", 4), (8192, 1 << 20)
    lines = advice.table(compared, contexts, [1]).splitlines()
    assert "| largest batch of 8K / 1M |" in lines[2]
    for line, choice in zip(lines[4:], compared.choices, strict=False):
        largest = " / ".join(str(choice.row.kv_tokens // context) for context in contexts)
        assert line.startswith(f"| {choice.flags} | {choice.row.kv_tokens:,} | {largest} |")


def test_a_draft_takes_its_part_of_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """MTP beside DeepSeek-V3: a layer of K ranks' tokens on each, beside 61 of its own."""
    path = str(ROOT / "docs/models/DeepSeek-V3")
    model = fit.model("docs/models/DeepSeek-V3")
    alone, drafted = (
        cost.advise(
            model, 8, cost.GPUS["h200"], kv_memory_gib=40, cache_bytes=2, draft=draft
        ).choices
        for draft in (None, model.shape._replace(layers=1))
    )
    for one, other in zip(alone, drafted, strict=True):
        size = one.row.layout.kvp_size
        held = other.row.kv_tokens / one.row.kv_tokens
        assert held == pytest.approx(61 / (61 + size), rel=1e-4)
        assert other._replace(row=one.row) == one
        assert other.row._replace(kv_tokens=one.row.kv_tokens) == one.row  # and so its times
    command = ["layout", "--model-path", path, "--tp", "8", "--gpu", "h200"]
    command += ["--kv-memory-gib", "40", "--contexts", "8192", "--draft-model-path", path]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "Below, tokens are those beside the draft's cache; times are without drafts." in said
    for choice in drafted:
        assert f"| {choice.flags} | {choice.row.kv_tokens:,} |" in said


def test_the_command_advises(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["layout", "--model-path", str(MODELS / "DeepSeek-V2-Lite"), "--tp", "4"]
    more = ["--contexts", "8192", "1048576", "--concurrency", "1", "8"]
    assert main([*command, *more, "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert any(line.startswith("| plain TP |") and line.endswith("| 3 fit |") for line in lines)
    assert any(line.startswith("| --dcp-size 4 --dcp-comm-backend symm |") for line in lines)
    assert any(line.startswith("- 1 x 1M: --") for line in lines)
    assert "With 8 at once a sharded cache is faster than plain TP from " in out
    assert main([*command, *more, "--gpu", "4.8,450,989,141"]) == 0
    assert capsys.readouterr().out == out
    png = tmp_path / "advice.png"
    written = main([*command, "--gpu", "h200", "--plot", str(png)]) == 0
    assert written == png.exists()
    assert written or "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [(None, "bf16"), ("fp8", "fp8"), ("modelopt_fp4", "fp4"), ("mxfp4", "fp4")],
)
def test_weights_are_those_of_the_configuration(
    quantization: str | None, dtype: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also of a quantization that SGLang knows where it is imported beside a GPU alone: mxfp4."""
    entries = json.loads((MODELS / "DeepSeek-V2-Lite/config.json").read_text())
    entries["quantization_config"] = quantization and {"quant_method": quantization}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    command = ["layout", "--model-path", str(tmp_path), "--tp", "4", "--gpu", "h200"]
    assert main(command) == 0
    by_configuration = capsys.readouterr()
    assert not by_configuration.err
    assert main([*command, "--weight-dtype", dtype]) == 0
    assert capsys.readouterr() == by_configuration


@pytest.mark.parametrize("gpu", ["h300", "4.8,450", "1,2,3,x", "0,1,1,1"])
def test_a_gpu_that_is_none_is_refused(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["layout", "--model-path", str(MODELS / "Llama-3-8B"), "--tp", "2", "--gpu", gpu]
    assert main(command) == 1
    assert f"--gpu {gpu}: give one of h100, h200" in capsys.readouterr().err


def test_mla_of_many_heads_is_bound_by_arithmetic() -> None:
    model = fit.model("benchmark/dcp/models/DeepSeek-V3-8-layers")
    *_, widest = rows(model.shape, 4, 0, 2)
    times = [
        cost.step_ms(
            model,
            cost.Choice(widest, "symm", False),
            cost.GPUS["h200"]._replace(tflops=tflops),
            cost.fitted(),
            context=1 << 20,
            requests=8,
        )
        for tflops in (989, math.inf)
    ]
    assert times[0] > 1.2 * times[1]


def test_replicated_queries_are_advised_where_they_pay() -> None:
    """DeepSeek-V3's 128 heads are read by every rank; 8 of V2-Lite's cost less than a gather."""
    gpu = cost.gpu_called("NVIDIA H200")
    assert gpu == cost.GPUS["h200"]
    assert cost.gpu_called("NVIDIA A100-SXM4-80GB") is None
    lite, deep = fit.model(LITE), fit.model("benchmark/dcp/models/DeepSeek-V3-8-layers")
    small = advice.on_queries(lite, Layout(2, 2), gpu, "symm")
    assert small.startswith("to replicate queries is faster than to gather them at any batch")
    said = advice.on_queries(deep, Layout(8, 8), gpu, "symm")
    # By hand, in bf16, a layer: the query projections of 7/8 more heads, beside a gather.
    low_rank, heads, width, latent, nope = 1536, 128, 192, 512, 128
    read = 2 * 7 / 8 * heads * (low_rank * width + nope * latent) / 4.8e6
    parameters = cost.fitted()
    row = next(row for row in rows(deep.shape, 8, 0, 2) if row.layout == Layout(8, 8))
    sent = row.wire_bytes["a2a"] - row.wire_bytes["a2a+q"]
    sent /= gpu.link_gb_s * 1e3 * parameters.link[cost.BY_KERNEL]
    more = read / parameters.weights - parameters.gather[cost.BY_KERNEL]
    pays = math.floor(more / sent) + 1
    assert pays > 1
    alone = deep.shape.layers * (more - sent) / 1e3
    assert f"from {pays} requests at once on, and alone {alone:.2f} ms a token slower" in said


def test_queries_are_gathered_by_what_the_server_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """`symm` by its kernel, unless told not to; a figure by what its column says."""
    model, gpu = fit.model(LITE), cost.GPUS["h200"]
    *_, widest = rows(model.shape, 2, 0, 2)

    def took(exchange: str, gather: str = "") -> float:
        choice = cost.Choice(widest, exchange, False, gather=gather)
        parameters = cost.fitted()
        return cost.step_ms(model, choice, gpu, parameters, context=1 << 17, requests=8)

    monkeypatch.delenv(GATHER_VARIABLE, raising=False)
    by_kernel, by_nccl = (took("symm", by) for by in (cost.BY_KERNEL, cost.BY_NCCL))
    assert took("symm") == by_kernel < by_nccl
    assert took("a2a") == took("a2a", cost.BY_NCCL)
    monkeypatch.setenv(GATHER_VARIABLE, "0")
    assert took("symm") == by_nccl
    # As between two GPUs by themselves: 27 layers of 16 heads, where latency is most of it.
    assert 27 * 2 < 1e3 * (by_nccl - by_kernel) < 27 * 10
    (path,) = (path for path in FIGURES if path.stem.endswith("x2-qwen3-shard"))
    gathered = {row.layout: row.choice.gather for row in fit.measured(path)}
    assert gathered == {
        "tp@fa3": "",
        "symm@fa3": cost.BY_KERNEL,
        "attn-tp:1:symm@fa3": fit.REPLICATED,
        "a2a@fa3": cost.BY_NCCL,
        "ag_rs@fa3": cost.BY_NCCL,
    }


def test_a_model_of_few_layers_waits_for_the_host() -> None:
    """Longer over a sharded cache; neither queries nor values advise by that wait."""
    model = fit.model("benchmark/dcp/models/DeepSeek-V3-8-layers")
    plain, sharded = (cost.fitted().host[kind] / 1e3 for kind in (cost.PLAIN, cost.SHARDED))
    compared = cost.advise(
        model, 2, cost.GPUS["h200"], kv_memory_gib=None, cache_bytes=2, exchanges=("symm",)
    )
    waits = [compared.ms(choice, 8192, 1) for choice in compared.choices]
    assert waits == [plain, sharded, sharded]
    assert plain < sharded
    assert compared.best(8192, 1) == compared.choices[0]
    gathered, replicated = (
        compared.ms(choice, 0, 1, of_gpu=True) for choice in compared.choices[1:]
    )
    assert gathered != replicated
    said = advice.table(compared, [8192, 1 << 20], [1])
    assert f"- {plain:.2f} ms plain TP, {sharded:.2f} ms sharded: what SGLang's scheduler" in said
    assert "what SGLang's scheduler took" not in advice.table(compared, [1 << 20], [1])


def test_values_projected_first_cost_memory_and_save_bytes() -> None:
    """DeepSeek-V3 at K = 8: 128 heads of 512 x 128 on every rank, 16 of which it had."""
    model = fit.model("docs/models/DeepSeek-V3")
    behind, before = (
        cost.advise(
            model,
            8,
            cost.GPUS["h200"],
            kv_memory_gib=None,
            cache_bytes=2,
            weight_element=1,
            exchanges=("symm",),
            values_first=first,
        )
        for first in (False, True)
    )
    assert before.choices[0] == behind.choices[0], "plain TP has no exchange"
    last, first = behind.choices[-1], before.choices[-1]
    assert first.flags == "--attn-tp-size 1 --dcp-comm-backend symm --dcp-replicate-v-proj"
    layers, heads, latent, value = 61, 128, 512, 128
    fewer = last.row.kv_tokens - first.row.kv_tokens
    held = layers * heads * latent * value * 2
    assert fewer == pytest.approx(8 * held / (layers * 576 * 2), rel=1e-4)
    # Below the switch nothing changes but the memory; from it on the weights of the other 7/8 of
    # the heads are read, or multiplied with, and of each row that is sent 384 elements stay.
    at = switch().from_tokens
    assert before.ms(first, 4096, at - 1) == behind.ms(last, 4096, at - 1)
    parameters, gpu, others = cost.fitted(), cost.GPUS["h200"], heads * 7 / 8 * latent * value
    for requests in (at, 1024):
        read = 2 * others / (gpu.memory_tb_s * 1e6 * parameters.weights)
        flops = 2 * requests * others / (gpu.tflops * 1e6 * parameters.arithmetic)
        sent = requests * 16 * 7 * 384 * 2 / (gpu.link_gb_s * 1e3 * parameters.link["symm"])
        saved = behind.ms(last, 4096, requests) - before.ms(first, 4096, requests)
        assert saved == pytest.approx(layers * (sent - max(read, flops)) / 1e3)
        assert saved > 0
    said = advice.table(behind, [4096], [1, 64])
    gained = behind.ms(last, 0, 64) - before.ms(first, 0, 64)
    assert f"- K = 8: --dcp-replicate-v-proj takes {held / 2**30:.2f} GiB a rank" in said
    assert f"with symm, saves a token {gained:.2f} ms with 64 at once (computed)." in said


def test_values_of_other_models_are_not_projected_first(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["layout", "--model-path", str(MODELS / "Llama-3-8B"), "--tp", "2", "--gpu", "h200"]
    assert main([*command, "--dcp-replicate-v-proj"]) == 1
    assert "--dcp-replicate-v-proj: only MLA projects values" in capsys.readouterr().err


def test_a_start_says_what_replicated_queries_cost() -> None:
    from sglang.srt.configs.model_config import ModelConfig

    model, layout = ModelConfig(str(ROOT / LITE)), Layout(8, 8)
    (line,) = advice.on_start(layout, model, "NVIDIA H200", "symm", True)
    assert line.startswith("Queries are replicated (--[no-]dcp-replicate-q-proj); to replicate")
    assert advice.on_start(layout, model, "NVIDIA L4", "symm", True) == []
    assert advice.on_start(layout, model, "NVIDIA H200", "fi_a2a", True) == []
