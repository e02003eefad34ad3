"""Rows for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

WriteRows = Callable[[str, Iterable[Mapping[str, Any]]], Path]


def pair(**changes: Any) -> dict[str, Any]:
    """A good pair row, with changes."""
    return {"prompt": "2 + 2?", "reference": "4", "chosen": "four", "rejected": "five"} | changes


def ranked(*scores: float, key: str = "score", **changes: Any) -> dict[str, Any]:
    """A ranked row of responses "text 0", "text 1", ... with these scores, with changes."""
    responses = [{"content": f"text {i}", key: score} for i, score in enumerate(scores)]
    return {"prompt": "Which?", "responses": responses} | changes
