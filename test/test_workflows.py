"""GitHub's workflows: valid by GitHub's schema, and they run what this repository has."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*"))


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def by_schema(*paths: Path) -> subprocess.CompletedProcess[str]:
    """The schema comes with the package: nothing is fetched."""
    pytest.importorskip("check_jsonschema", reason="pip install -e '.[test]'")
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    return subprocess.run(
        [sys.executable, *command, *map(str, paths)], capture_output=True, text=True, check=False
    )


def test_valid_by_schema() -> None:
    assert WORKFLOWS
    checked = by_schema(*WORKFLOWS)
    assert checked.returncode == 0, checked.stdout


def test_a_fault_is_seen(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on: ubuntu", "runs-onn: ubuntu"))
    assert "'runs-on' is a required property" in by_schema(broken).stdout


def test_cpu_job_runs_every_test() -> None:
    (path,) = WORKFLOWS
    *_, last = commands(jobs(path)["cpu"])
    assert last == "./dev test"
    assert "  test)" in (ROOT / "dev").read_text()


def test_gpu_job_runs_on_each_kind_of_runner_that_is_named() -> None:
    (path,) = WORKFLOWS
    job = jobs(path)["gpu"]
    condition, matrix = job["if"], job["strategy"]["matrix"]["gpus"]
    assert "vars.GPU_COUNTS != ''" in condition
    assert "github.event_name != 'pull_request'" in condition
    (default,) = re.findall(r"\|\| '(.*?)'\)", matrix)
    assert json.loads(default) == [2, 4, 8]
    assert job["runs-on"] == ["self-hosted", "linux", "gpu-${{ matrix.gpus }}"]
    assert commands(job)[-1] == '.venv/bin/python -m pytest -m "gpu or multi_gpu" test'
    marks = (ROOT / "pyproject.toml").read_text()
    assert '"gpu: ' in marks
    assert '"multi_gpu: ' in marks
