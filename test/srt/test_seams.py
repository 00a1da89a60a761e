"""Imports go one way: what each seam of the design may know of the others."""

import ast
from pathlib import Path

import pytest
import sglang_helix

pytestmark = pytest.mark.quick

ROOT = Path(sglang_helix.__file__).parent
ATTENTION, DCP, DISTRIBUTED = "srt.layers.attention", "srt.layers.dcp", "srt.distributed"

# What modules may import of these three packages, directly or not.
FORMS = {f"{DCP}.partial", f"{DCP}.packed_rows"}
WEIGHTS = f"{DCP}.lse_weights"
COMBINE = FORMS | {WEIGHTS} | {f"{DCP}.lse_combine{part}" for part in ("", "_torch", "_triton")}
KERNEL = {f"{DCP}.symm{part}" for part in ("", "_launch", "_layout", "_workspace")}
SEAMS: dict[str, set[str]] = {
    # Topology, and the collective that process groups are given.
    f"{DISTRIBUTED}.topology": set(),
    f"{DISTRIBUTED}.parallel_state": {f"{DISTRIBUTED}.topology"},
    f"{DISTRIBUTED}.all_to_all": set(),
    # Ownership.
    f"{DCP}.ownership": set(),
    f"{DCP}.planner": {f"{DCP}.ownership"},
    f"{ATTENTION}.local_pages": {f"{DCP}.ownership"},
    # Partial results, and the exchange.
    f"{DCP}.partial": set(),
    f"{DCP}.packed_rows": set(),
    f"{DCP}.lse_combine_torch": FORMS,
    WEIGHTS: set(),
    f"{DCP}.lse_combine_triton": FORMS | {WEIGHTS},
    f"{DCP}.lse_combine": COMBINE,
    f"{DCP}.symm_layout": FORMS,
    f"{DCP}.symm": COMBINE | KERNEL,
    f"{DCP}.symm_launch": COMBINE | KERNEL,
    f"{DCP}.symm_workspace": COMBINE | KERNEL,
    f"{DCP}.exchange": COMBINE | KERNEL,
    # Queries.
    f"{DCP}.gather": set(),
}
# An adapter attends: the exchange, groups and owners are of what it derives from.
ADAPTERS = sorted(
    f"{ATTENTION}.{path.stem}" for path in (ROOT / "srt/layers/attention").glob("*_backend.py")
)
OF_ADAPTERS = COMBINE


def imports(module: str) -> set[str]:
    """What a module of the series imports of it, also inside functions."""
    tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang_helix."):
            name = (node.module or "").removeprefix("sglang_helix.")
            found |= {
                name
                if ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()
                else f"{name}.{alias.name}"
                for alias in node.names
            }
    return found


def of_seams(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith((f"{DCP}.", f"{DISTRIBUTED}."))}


def reached(module: str) -> set[str]:
    found: set[str] = set()
    left = [module]
    while left:
        new = imports(left.pop()) - found
        found |= new
        left += new
    return found - {module}


@pytest.mark.parametrize("module", SEAMS)
def test_a_seam_knows_only_what_it_is_built_on(module: str) -> None:
    found = reached(module)
    assert of_seams(found) <= SEAMS[module]
    assert not {name for name in found if name.startswith(f"{ATTENTION}.")}


@pytest.mark.parametrize("module", ADAPTERS)
def test_an_adapter_sees_no_exchange_and_no_group(module: str) -> None:
    assert of_seams(imports(module)) <= OF_ADAPTERS


def test_what_joins_them_is_seen_to() -> None:
    joined = {f"{DCP}.ownership", f"{DCP}.exchange", f"{DCP}.lse_combine"}
    assert joined <= imports(f"{ATTENTION}.sharded")
