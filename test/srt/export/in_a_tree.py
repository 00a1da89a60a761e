"""Functions that are called in processes of an exported tree; see `calls`."""

import sys
from typing import Any

_OF_THE_PROCESS = {"nccl_port", "dist_init_addr"}


def resolved(rank: int, argv: list[str]) -> dict[str, str]:
    """Every argument as it is resolved, in words."""
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    load_plugins()
    server_args = prepare_server_args(argv)
    server_args.resolve_once()
    server_args.check_server_args()
    view = resolved_view(server_args)
    names = {field.name for field in record_fields(ServerArgs)} - _OF_THE_PROCESS
    return {name: repr(getattr(view, name)) for name in sorted(names)}


def help_of_serve(rank: int) -> None:
    """``sglang serve --help``."""
    from sglang.cli.main import main

    sys.argv = ["sglang", "serve", "--help"]
    main()


def load_the_plugin_too(rank: int, installed: str) -> None:
    """What SGLang does where the plugin is installed as well, in a folder of its own."""
    sys.path.append(installed)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    print("loaded", flush=True)


def installed_plugins(rank: int) -> Any:
    """Names of the entry points that SGLang loads, and whether the plugin can be imported."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    names = sorted(point.name for point in entry_points(group="sglang.srt.plugins"))
    return names, find_spec("sglang_helix") is not None


def run_tests(rank: int, files: list[str]) -> int:
    """Pytest's exit status of tests that have landed."""
    import pytest

    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *files]))


def served(rank: int, *what: Any) -> Any:
    """A rank's report, see `srt.models.serving`, and the series' metrics by name and labels."""
    from prometheus_client import REGISTRY
    from srt.models.serving import _serve

    report = _serve(rank, *what)
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return report, {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for sample in samples
        if sample.name.startswith("sglang_helix:")
    }
