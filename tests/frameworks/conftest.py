"""Real RL frameworks, each in an environment of its own: run by `make test-rft`, not by the ordinary tests.

POLAR_RFT names the folder of those environments, which tools/rft_env.sh makes. A framework's part of a test
is a script in this folder that its Python runs; what it was given comes back as JSON, and is compared with
the rewards of `RewardScorer` here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import model  # noqa: F401
from tests.engines.servers import polar_server

ENVIRONMENTS = os.environ.get("POLAR_RFT")
collect_ignore_glob = ["*_run.py"] if ENVIRONMENTS else ["*.py"]

ROOT = Path(__file__).parents[2]
FLOOR = -100.0
# Folder of an environment, without its version, to the project whose version is printed.
PROJECTS = {
    "trl": "trl",
    "verl": "verl",
    "verifiers": "verifiers",
    "trinity": "trinity_rft",
    "areal": "areal",
    "opencompass": "opencompass",
}


RAN: set[str] = set()


def environment_of(name: str) -> Path:
    """Folder of an environment."""
    assert ENVIRONMENTS
    return Path(ENVIRONMENTS).resolve() / name


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the versions that were run."""
    found = []
    for environment in sorted(RAN):
        project = PROJECTS[environment.partition("-")[0]]
        (metadata,) = environment_of(environment).glob(f"lib/python*/site-packages/{project}-*.dist-info")
        found.append(metadata.stem.replace("-", " ").replace("_", "-"))
    if found:
        terminalreporter.write_line(f"frameworks: {', '.join(found)}")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """64 questions with a reference and an output, some with thoughts, one without an answer."""
    rows = []
    with (ROOT / "examples/data/alpaca_held_out.jsonl").open(encoding="utf-8") as lines:
        for number, line in zip(range(64), lines, strict=False):
            row = json.loads(line)
            reference, output = (response["content"] for response in row["responses"][:2])
            thought = "<think>Well.</think>\n" if number % 3 == 0 else ""
            rows.append({"question": row["prompt"], "reference": reference, "output": thought + output})
    rows[5]["output"] = "<think>" + rows[5]["output"]
    return rows


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    """`polar-ft serve` with a random model."""
    with polar_server(model, tmp_path_factory.mktemp("server"), "--dtype", "float32") as address:
        yield address


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """Runs a script of this folder in the environment of a framework and returns the JSON that it wrote."""

    def run(environment: str, script: str, **given: Any) -> Any:
        RAN.add(environment)
        python = environment_of(environment) / "bin" / "python"
        (tmp_path / "given.json").write_text(json.dumps(given))
        command = [str(python), str(Path(__file__).with_name(script)), str(tmp_path)]
        variables = {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return json.loads((tmp_path / "result.json").read_text())

    return run
