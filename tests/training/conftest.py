"""A tiny base, rows to train on, and runs that are shared by the tests."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from polar_ft.model.tiny_base import make_tiny_base
from tests.training.runs import (
    Run,
    edit_config,
    like_published,
    make_rows,
    run,
    with_tokenizer_code,
    write_rows,
)

RunOnce = Callable[..., Run]

# High, so that the losses of three steps differ by far more than rounding.
TOP_LINES = dict(lr=3e-2, global_batch_pairs=20, max_packed_length=512, save_steps=2)
STEPS = 3


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``published`` (ids as POLAR-7B), ``with_code``, ``rows.jsonl`` and ``tiny.py``.

    The processes of pytest-xdist share it.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "training_project"
    with FileLock(f"{folder}.lock"):
        if not (folder / "tiny.py").is_file():
            folder.mkdir()
            rows = make_rows()
            base = make_tiny_base(
                folder / "base", [text for row in rows for text in row.values()], vocab_size=400, hidden=32
            )
            published = like_published(base, folder / "published")
            with_tokenizer_code(published, folder / "with_code")
            data = write_rows(folder / "rows.jsonl", rows)
            paths = dict(pretrained_model_name_or_path=str(base), data=str(data))
            edit_config("polar_tiny_cpu.py", folder / "tiny.py", **paths, **TOP_LINES)
    return folder


@pytest.fixture(scope="session")
def run_once(project: Path) -> RunOnce:
    """``run_once(name, *command, **environment)``: the run of that name, made when first asked for."""

    def get(name: str, *command: str, **environment: str) -> Run:
        folder = project / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / "result.pickle"
        with FileLock(f"{folder}.lock"):
            if not result.is_file():
                ended = run(command, folder / "work", project, **environment)
                result.write_bytes(pickle.dumps(ended))
        return pickle.loads(result.read_bytes())

    return get


@pytest.fixture(scope="session")
def plain_run(project: Path, run_once: RunOnce) -> Run:
    """``xtuner train`` on one process, in float32."""
    return run_once("plain", "xtuner", "train", str(project / "tiny.py"))
