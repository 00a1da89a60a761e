"""`import torch` calls an entry point of the series, and must work whatever became of the series.

Torch is imported here already; what it calls while it is imported is called again.
"""

import sys
from typing import Any

import pytest
from srt.fresh import Fresh

BROKEN = (
    "sglang_helix.plugin",
    "sglang_helix.series",
    "sglang_helix.hook",
    "sglang_helix.srt",
    "sglang.srt.plugins",
    "sglang",
)


def import_torch(missing: tuple[str, ...], argv: Any) -> list[str]:
    """What torch does with its entry points; returns which modules of the series it took."""
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang_helix"]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(missing))  # an import of them raises
    if argv is None:
        del sys.argv  # as where Python is embedded
    else:
        sys.argv = argv
    torch._import_device_backends()
    return sorted(
        name for name, module in sys.modules.items() if module and name.startswith("sglang_helix")
    )


@pytest.mark.parametrize(
    "argv", [["sglang", "serve", "--help"], ["python"], [], [None, "serve", []], None], ids=str
)
@pytest.mark.parametrize("missing", [(), BROKEN], ids=["whole", "broken"])
def test_import_torch_works(fresh: Fresh, missing: tuple[str, ...], argv: Any) -> None:
    taken = fresh.value(import_torch, missing, argv)
    assert taken == ["sglang_helix", "sglang_helix.cli", "sglang_helix.cli.serve"]


def test_nothing_of_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_helix.cli import serve

    monkeypatch.setattr(sys, "argv", ["sglang", "serve", "--help"])
    monkeypatch.setattr(sys, "meta_path", None)
    serve.load_plugins_for_help()
