"""``--attn-tp-size`` on every way to start a server, and what is said when it cannot be right."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.fresh import Fresh


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {f: str(make_checkpoint(f, root / f)) for f in ("llama", "deepseek_v2")}


def layout_of(server_args: Any) -> dict[str, Any]:
    from sglang.srt.arg_groups.overrides import resolved_view

    server_args.resolve_once()
    view = resolved_view(server_args)
    names = ("tp_size", "dcp_size", "dcp_comm_backend", "dcp_replicate_q_proj")
    return {name: getattr(view, name) for name in names}


def command_line(*argv: str) -> dict[str, Any]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    return layout_of(prepare_server_args(list(argv)))


def engine(**fields: Any) -> dict[str, Any]:
    """What `sglang.Engine(...)` does before it launches anything."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints.engine import Engine

    return layout_of(Engine.server_args_class(**fields))


def engine_of(model: str, attn_tp_size: int) -> dict[str, Any]:
    return engine(model_path=model, tp_size=4, attn_tp_size=attn_tp_size)


def pickled(model: str) -> int:
    """The flag in a child process, which gets the record pickled."""
    import pickle

    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args
    from sglang_helix.srt.compatibility.situation import attn_tp_size_of

    args = prepare_server_args(["--model-path", model, "--tp", "4", "--attn-tp-size", "2"])
    size = attn_tp_size_of(pickle.loads(pickle.dumps(args)))
    assert size is not None
    return size


@pytest.mark.parametrize("flag", ["--attn-tp-size", "--attention-tensor-parallel-size"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_flag_sets_the_layout(
    fresh: Fresh, checkpoints: dict[str, str], family: str, flag: str
) -> None:
    found = fresh.value(command_line, "--model-path", checkpoints[family], "--tp", "4", flag, "2")
    expected = {"tp_size": 4, "dcp_size": 2, "dcp_replicate_q_proj": True}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_queries_are_gathered_where_that_is_asked_for(
    fresh: Fresh, checkpoints: dict[str, str], family: str
) -> None:
    """The layout of the flag, and all else as --dcp-size alone has it."""
    model = ("--model-path", checkpoints[family], "--tp", "4", "--no-dcp-replicate-q-proj")
    found = fresh.value(command_line, *model, "--attn-tp-size", "2")
    assert (found["dcp_size"], found["dcp_replicate_q_proj"]) == (2, False)
    assert found == fresh.value(command_line, *model, "--dcp-size", "2")


@pytest.mark.parametrize("backend", ["a2a", "ag_rs"])
def test_queries_are_replicated_with_every_exchange(
    fresh: Fresh, checkpoints: dict[str, str], backend: str
) -> None:
    flags = ("--dcp-size", "2", "--dcp-replicate-q-proj", "--dcp-comm-backend", backend)
    found = fresh.value(command_line, "--model-path", checkpoints["llama"], "--tp", "4", *flags)
    assert (found["dcp_replicate_q_proj"], found["dcp_comm_backend"]) == (True, backend)


SHOWN = "--attention-tensor-parallel-size A, --attn-tp-size A"


def test_help_of_sglang_serve() -> None:
    # Forked processes have torch imported already, so this one must start from nothing.
    command = [Path(sys.executable).with_name("sglang"), "serve", "--help"]
    assert SHOWN in subprocess.check_output(command, text=True, timeout=300)


def test_help_of_launch_server(fresh: Fresh) -> None:
    assert SHOWN in fresh.outcome(command_line, "--help").output


def test_same_as_tp_is_plain_tp(fresh: Fresh, checkpoints: dict[str, str]) -> None:
    model = ("--model-path", checkpoints["llama"], "--tp", "4")
    given = fresh.value(command_line, *model, "--attn-tp-size", "4")
    assert given == fresh.value(command_line, *model)
    assert given["dcp_size"] == 1


def test_yaml_file(fresh: Fresh, checkpoints: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"model-path: {checkpoints['llama']}\ntp-size: 4\nattn-tp-size: 1\n")
    assert fresh.value(command_line, "--config", str(config))["dcp_size"] == 4


def test_engine(fresh: Fresh, checkpoints: dict[str, str]) -> None:
    assert fresh.value(engine_of, checkpoints["llama"], 2)["dcp_size"] == 2


def test_flag_travels_to_child_processes(fresh: Fresh, checkpoints: dict[str, str]) -> None:
    assert fresh.value(pickled, checkpoints["llama"]) == 2


def test_both_flags_may_be_given_when_they_agree(fresh: Fresh, checkpoints: dict[str, str]) -> None:
    model = ("--model-path", checkpoints["llama"], "--tp", "4")
    agreed = fresh.value(command_line, *model, "--attn-tp-size", "2", "--dcp-size", "2")
    assert agreed["dcp_size"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--attn-tp-size", "3"), r"--attn-tp-size 3 .*--tp-size 4: use one of \[1, 2, 4\]"),
        (("--attn-tp-size", "0"), r"--attn-tp-size 0 .*use one of \[1, 2, 4\]"),
        (
            ("--attn-tp-size", "1", "--dcp-size", "2"),
            r"--attn-tp-size 1 .*--dcp-size 4, but --dcp-size 2 was given",
        ),
    ],
)
def test_what_cannot_be_right_is_said(
    fresh: Fresh, checkpoints: dict[str, str], flags: tuple[str, ...], message: str
) -> None:
    outcome = fresh.outcome(command_line, "--model-path", checkpoints["llama"], "--tp", "4", *flags)
    assert outcome.status != 0
    assert re.search(message, outcome.output.replace("\n", " ")), outcome.output[-2000:]


def test_heads_that_do_not_fit_name_the_sizes_that_do(fresh: Fresh, tmp_path: Path) -> None:
    odd = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 192}
    model = str(make_checkpoint("llama", tmp_path / "llama", **odd))
    outcome = fresh.outcome(command_line, "--model-path", model, "--tp", "4", "--attn-tp-size", "4")
    assert outcome.status == 0  # plain TP stays SGLang's own affair
    outcome = fresh.outcome(
        command_line, "--model-path", model, "--tp", "12", "--attn-tp-size", "4"
    )
    assert outcome.status != 0
    assert "--attn-tp-size 4 with --tp-size 12" in outcome.output
    assert "use one of [1, 2, 3, 6, 12]" in outcome.output
