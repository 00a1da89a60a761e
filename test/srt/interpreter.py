"""Tests of kernels: on a GPU where there is one, else in Triton's interpreter.

There the whole file runs once more, in a process of its own: triton.jit reads TRITON_INTERPRET when
it decorates. The file has a test for that, marked `without_a_gpu`, which calls `passes`.
"""

import os
from typing import Any

import pytest
import torch
from srt.fresh import Fresh

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

launches = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="test_interpreter runs it, and so does a GPU"
)
without_a_gpu = pytest.mark.skipif(
    DEVICE == "cuda" or INTERPRETED, reason="runs the file without a GPU"
)


def kernels(test: Any) -> Any:
    """Mark a test that launches kernels."""
    return pytest.mark.gpu(launches(test))


def passes(interpreted: Fresh, file: str, *options: str) -> None:
    """Run a file's tests in the interpreter; AssertionError with what pytest said of failures."""
    outcome = interpreted.outcome(_pytest, ["-q", "-p", "no:cacheprovider", *options, file])
    assert outcome.value == 0, outcome.output
    assert " passed" in outcome.output, outcome.output


def _pytest(arguments: list[str]) -> int:
    return int(pytest.main(arguments))
