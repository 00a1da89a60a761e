"""``python -m sglang_helix check``: the verdict before any server, and layers that it builds."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import render
from srt.fresh import Fresh
from srt.model_loader.configurations import configuration
from srt.models.test_every_model import BUILT
from srt.resolved import SMALL
from srt.test_refused_models import LATENT


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
    mistral = tmp_path / "Mistral-Large-3-text"
    mistral.mkdir()
    named = {"architectures": ["MistralLarge3ForCausalLM"]}
    (mistral / "config.json").write_text(
        json.dumps({**SMALL, **LATENT, "model_type": "deepseek_v3", **named})
    )
    by_config = ("--model-config-parser", "hf")
    by_name = f"refused: --model-path {mistral}: by its name SGLang reads this model from params."
    one_head = ("--json-model-override-args", '{"num_key_value_heads": 1}')
    cases = {
        (str(alone), None, "--dcp-size", "2"): (0, "works: --tp-size 4 --dcp-size 2 --dcp-c"),
        (str(mxfp4), "Hopper", "--dcp-size", "2"): (0, "works: --tp-size 4 --dcp-size 2 --dcp-c"),
        (str(alone), "cpu", "--dcp-size", "2"): (
            0,
            "works: --tp-size 4 --dcp-size 2 --dcp-comm-backend ag_rs, attention by torch_native.",
        ),
        (str(alone), "Hopper", "--dcp-size", "1"): (0, "whole: no sharded cache"),
        (str(alone), "Hopper", "--dcp-size", "2"): (0, "works: --tp-size 4 --dcp-size 2 --dcp-c"),
        (str(alone), "Ampere", "--attn-tp-size", "3"): (1, "refused: --attn-tp-size 3 does not"),
        (models["dsa"], "Blackwell", "--dcp-size", "2"): (0, "own: sglang-helix: SGLang serves"),
        (models["dsa"], "Blackwell", "--attn-tp-size", "2"): (1, "refused: --attn-tp-size 2 is n"),
        (str(tmp_path / "none"), "Hopper"): (1, "refused: "),
        (str(mistral), "Hopper"): (1, by_name),
        (str(mistral), "Hopper", "--dcp-size", "2"): (1, by_name),
        (str(mistral), "Hopper", *by_config): (0, "works: --dcp-size 2 (2x)"),
        (str(mistral), "Hopper", "--dcp-size", "2", *by_config): (0, "works: --tp-size 4 --dcp"),
        (str(alone), "Hopper", *one_head): (0, "works: --dcp-size 2 (2x), --attn-tp-size 2 (2x)"),
        (str(alone), "Hopper", "--tp", "3", "4"): (0, "works: --tp-size 4 --dcp-size 2 ("),
        (str(alone), "Hopper", "--tp", "3"): (1, "refused: its heads allow no sharded cache on 3"),
        (str(alone), "Hopper", "--attn-dp-size", "3"): (
            1,
            "refused: --attn-dp-size 3 does not div",
        ),
        (str(alone), "Hopper", "--tp", "8", "--attn-dp-size", "2"): (
            0,
            "works: --dcp-size 2 (2x), --attn-tp-size 2 (2x), --dcp-size 4 (2x), --attn-tp-size 1",
        ),
        (str(alone), "Hopper", "--enable-dp-attention", "--dp-size", "2"): (
            0,
            "works: --dcp-size 2 (1x), --attn-tp-size 1 (1x) works",
        ),
        (str(alone), "Hopper", "--tp", "4", "8", "--dcp-size", "2"): (1, "refused: --tp 4 8: give"),
    }
    outcomes = gpu.outcomes([(checked, *case) for case in cases])
    for outcome, (status, line) in zip(outcomes, cases.values(), strict=True):
        assert outcome.status == 0, outcome.output
        assert (outcome.value[0], outcome.value[1][: len(line)]) == (status, line)
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


def flags_of_what_is_built(model: str, *flags: str) -> list[str]:
    """The flags of the plain model whose layers check looks at."""
    from sglang_helix.check import check

    built: list[str] = []
    builder = SimpleNamespace(build=lambda argv: (built.extend(argv), ("", ""))[1])
    check(["--model-path", model, "--tp-size", "4", "--dcp-size", "2", *flags], builder, "Hopper")
    return built


def test_check_builds_the_model_that_would_be_served(gpu: Fresh, models: dict[str, str]) -> None:
    """What says how a model is read, which of its pools there are, and what a replica holds."""
    flags = ["--model-config-parser", "hf", "--model-impl", "sglang", "--trust-remote-code"]
    flags += ["--disable-hybrid-swa-memory", "--attn-dp-size", "2"]
    built = gpu.value(flags_of_what_is_built, models["llama"], *flags)
    assert set(flags) < set(built)
    assert built[built.index("--attn-dp-size") + 1] == "2"


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
    status, (of_half, of_none, of_both) = outcome.value
    assert status == 1
    assert of_half.startswith(f"{half}: works: --dcp-size 2 (2x) works by fa3; --attn-tp-size 2 (2")
    assert "refused: --dcp-size > 1 does not support OlmoeForCausalLM: " in of_half
    assert of_none.startswith(f"{tmp_path / 'none'}: refused: ")
    assert of_both == "1 of 2 served"


def verdicts(servers: list[list[str]]) -> list[tuple[str, str]]:
    """Of servers' arguments on Hopper: the verdict, and by what they attend."""
    from sglang_helix.check import check

    return [check(argv, render.UNBUILT, "Hopper")[::2] for argv in servers]


def test_the_models_that_people_run(gpu: Fresh, tmp_path: Path) -> None:
    """docs/models.md, but for the layers, whose classes `test_every_model.py` has."""
    rows = render.table_of_models()
    flags = {name: cells[2].strip("`").split() for name, cells in rows.items()}
    models = render.listed_models(tmp_path)
    argvs = [["--model-path", str(path), *flags[path.name]] for path in models]
    said = dict(zip(rows, gpu.value(verdicts, argvs), strict=True))
    assert said == {name: (cells[1].split()[0], cells[5]) for name, cells in rows.items()}
    works = {name for name, (verdict, _) in said.items() if verdict == "works"}
    published = {path.name for path in render.published_models()}
    assert (len(said), len(published)) == (60, 30)
    assert len(works) >= 45
    assert len(works & published) >= 22
