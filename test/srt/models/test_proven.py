"""docs/models.md names a test for each class of models: it exists, and is of that class."""

import importlib.util
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import render
from sglang_cpu_reference.checkpoints import FAMILIES, Family
from sglang_cpu_reference.oracle import reference_of

ROOT = Path(__file__).parents[3]
PROOFS = render.proofs()


def named(proof: str) -> tuple[FunctionType, str]:
    """The function of a test and what stands in its brackets; "" where nothing does."""
    path, _, test = proof.partition("::")
    name, _, case = test.removesuffix("]").partition("[")
    module = import_module("srt." + path.removesuffix(".py").replace("/", "."))
    return getattr(module, name), case


def cases(function: Any) -> Iterator[str]:
    """The first of each of its parameters' values."""
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "parametrize":
            for given in mark.args[1]:
                value = getattr(given, "values", given)
                yield str(value[0] if isinstance(value, tuple) else value)


def served_by(function: FunctionType, case: str) -> Iterator[str]:
    """Classes of the families that a test's own code names."""
    code = function.__code__
    for name in (case, *code.co_varnames):
        if name in FAMILIES:
            yield class_of(FAMILIES[name])
    for name in code.co_names:
        found = function.__globals__.get(name)
        if isinstance(found, Mapping) and case in found:
            found = found[case]
        if isinstance(found, tuple) and not isinstance(found, Family) and str(found[0]) in FAMILIES:
            found = FAMILIES[found[0]]
        if isinstance(found, Family):
            yield class_of(found)
        elif isinstance(found, Mapping):
            yield from found.get("architectures", ())


def class_of(family: Family) -> str:
    """The class that the configuration of a tiny checkpoint asks for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if reference := reference_of(family.model_type):
        return str(reference.__name__)
    kind = AutoModelForImageTextToText if "vision_config" in family.config else AutoModelForCausalLM
    config = type(AutoConfig.for_model(family.model_type, **family.config))
    return str(kind._model_mapping[config].__name__)


@pytest.mark.parametrize("architecture", [name for name, proof in PROOFS.items() if proof])
def test_the_test_exists_and_is_of_that_class(architecture: str) -> None:
    proof = PROOFS[architecture]
    if proof in PROOFS:  # it wraps that class
        (model,) = wrappers(architecture)
        assert f"{proof}(" in model
        return
    function, case = named(proof)
    assert not case or case in cases(function)
    if "refused" in proof or "heads" in proof:
        return
    assert architecture in served_by(function, case)


def wrappers(architecture: str) -> list[str]:
    """Texts of SGLang's model files that define a class."""
    spec = importlib.util.find_spec("sglang.srt.models")
    assert spec is not None
    assert spec.submodule_search_locations
    texts = [path.read_text() for path in Path(spec.submodule_search_locations[0]).glob("*.py")]
    return [text for text in texts if f"\nclass {architecture}(" in text]


def test_what_works_has_a_test_and_what_is_refused_is_for_the_reason_that_is_tested() -> None:
    for cells in render.table_of_models().values():
        assert "::" in cells[6] or cells[1] == "refused", cells[0]
        if "::" in cells[6]:
            assert ("transformers" in cells[6]) == (cells[1] == "works"), cells[0]
            if "test_model_is_refused" in cells[6]:
                assert cells[7].startswith(cells[6].split("[")[1].removesuffix("]`")), cells[0]
