"""The full files of shared data, where they are present beside a checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_file(name: str) -> Path:
    """Path of a file of shared data; skips the test where it is not present."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("POLAR_FT_SHARED_DATA", default)) / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside this checkout (POLAR_FT_SHARED_DATA names its folder)")
    return path
