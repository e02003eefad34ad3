"""A tiny model, rows, and a config of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_ft.model.tiny_base import make_tiny_base
from tests.training.runs import edit_config, make_rows, write_rows


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``rows.jsonl`` and ``tiny.py``."""
    folder = tmp_path_factory.mktemp("doctor_project")
    rows = make_rows()
    base = make_tiny_base(
        folder / "base", [text for row in rows for text in row.values()], vocab_size=400, hidden=32
    )
    data = write_rows(folder / "rows.jsonl", rows)
    settings = dict(global_batch_pairs=20, max_packed_length=512)
    paths = dict(pretrained_model_name_or_path=str(base), data=str(data))
    edit_config("polar_tiny_cpu.py", folder / "tiny.py", **paths, **settings)
    return folder
