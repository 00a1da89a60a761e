"""The command lines of `examples/`: what SGLang and its router make of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.check import told_about
from srt.fresh import Fresh

EXAMPLES = Path(__file__).parents[2] / "examples"
#: What each says, of the model that it is for.
SERVERS: dict[tuple[str, str], dict[str, Any]] = {
    ("two_nodes", "1"): {"tp_size": 16, "dcp_size": 8, "nnodes": 2, "node_rank": 1},
    ("pd_mla", "prefill"): {"tp_size": 8, "dcp_size": 1, "disaggregation_mode": "prefill"},
    ("pd_mla", "decode"): {"tp_size": 8, "dcp_size": 8, "disaggregation_mode": "decode"},
    ("pd_gqa", "prefill"): {"tp_size": 8, "dcp_size": 1, "disaggregation_mode": "prefill"},
    ("pd_gqa", "decode"): {"tp_size": 16, "dcp_size": 2, "disaggregation_mode": "decode"},
}


@pytest.fixture(scope="module")
def launcher() -> Iterator[Fresh]:
    with Fresh(preload=("srt.models.plugins_loaded",)) as process:
        yield process


def command_of(folder: Path, name: str, *arguments: str, **env: str) -> list[str]:
    """What an example has Python do; a Python that writes it down stands in for it."""
    stand_in = folder / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!{sys.executable} -S\nimport json, sys\nprint(json.dumps(sys.argv[1:]))")
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    command = [EXAMPLES / f"{name}.sh", *arguments]
    ran = subprocess.run(
        command,
        check=False,
        env={**os.environ, **env, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return list(json.loads(ran.stdout))


def resolved(arguments: list[str], names: list[str]) -> dict[str, Any]:
    """In a launcher's process: what it resolves on the machine that the examples are for."""
    with told_about("Hopper"):
        from sglang.srt.arg_groups.overrides import resolved_view
        from sglang.srt.server_args import prepare_server_args
        from sglang_helix.srt.server_args import check

        args = prepare_server_args([*arguments, "--device", "cuda"])
        args.resolve_once()
        args.check_server_args()
        check(args)
        return {name: getattr(resolved_view(args), name) for name in names}


@pytest.mark.parametrize(("name", "role"), SERVERS, ids=" ".join)
def test_servers_start_as_they_say(launcher: Fresh, tmp_path: Path, name: str, role: str) -> None:
    family, heads = "deepseek_v2", {}
    if name == "pd_gqa":
        family, heads = "llama", {"num_attention_heads": 16, "num_key_value_heads": 8}
    model = make_checkpoint(family, tmp_path / "model", num_hidden_layers=1, **heads)
    command = command_of(tmp_path, name, role, MODEL=str(model), MASTER="127.0.0.1:5000")
    assert command[:2] == ["-m", "sglang.launch_server"]
    said = SERVERS[name, role]
    assert launcher.here(resolved, command[2:], list(said)) == said


@pytest.mark.parametrize("name", ["pd_mla", "pd_gqa"])
def test_router_starts_as_it_says(tmp_path: Path, name: str) -> None:
    router = pytest.importorskip("sglang_router.launch_router", reason="needs sglang-router")
    servers = {"PREFILL": "a:1", "DECODE": "b:2", "BOOTSTRAP": "3"}
    command = command_of(tmp_path, name, "router", "--host", "127.0.0.1", **servers)
    assert command[:2] == ["-m", "sglang_router.launch_router"]
    args = router.parse_router_args(command[2:])
    assert args.pd_disaggregation
    assert (args.prefill_urls, args.decode_urls) == ([("http://a:1", 3)], ["http://b:2"])
