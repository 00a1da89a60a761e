"""`--dcp-comm-backend symm` on every way to start a server.

This machine has no GPU, so a start that knows the backend ends with the refusal that says why.
"""

from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.fresh import Fresh
from srt.test_attn_tp_flags import command_line, engine

REFUSED = (
    "--dcp-comm-backend symm is not supported with --dcp-size 2: it needs CUDA devices that have "
    "peer access to each other. Use --dcp-comm-backend a2a."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama"))


def engine_of(model: str) -> dict[str, Any]:
    return engine(model_path=model, tp_size=2, dcp_size=2, dcp_comm_backend="symm")


def test_command_line(fresh: Fresh, model: str) -> None:
    flags = ("--model-path", model, "--tp", "2", "--dcp-size", "2", "--dcp-comm-backend")
    assert REFUSED in fresh.outcome(command_line, *flags, "symm").output
    unknown = fresh.outcome(command_line, *flags, "carrier-pigeon").output
    assert "choose from" in unknown
    assert "fi_a2a" in unknown
    assert "symm" in unknown


def test_yaml_file(fresh: Fresh, model: str, tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"model-path: {model}\ntp-size: 2\ndcp-size: 2\ndcp-comm-backend: symm\n")
    assert REFUSED in fresh.outcome(command_line, "--config", str(config)).output


def test_engine(fresh: Fresh, model: str) -> None:
    assert REFUSED in fresh.outcome(engine_of, model).output


def test_help(fresh: Fresh) -> None:
    said = " ".join(fresh.outcome(command_line, "--help").output.split())
    assert "--dcp-comm-backend {ag_rs,a2a,fi_a2a,symm}" in said
    assert "sglang-helix adds 'symm' (one kernel over symmetric memory;" in said
