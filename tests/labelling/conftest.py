"""Rows to label, a folder of decisions, and its page on a free port."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from polar_ft.labelling.app import create_app
from polar_ft.labelling.pairs import Pair, ordered_pairs, parse_task
from polar_ft.labelling.store import Store
from tests.serving.conftest import http
from tests.serving.tiny import running

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question {number}?", "reference": "Beijing.", "candidates": ["yes", f"no {number}"]}
    for number in range(4)
]


def pairs_of(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    return ordered_pairs([parse_task(row, f"in.jsonl:{number}") for number, row in enumerate(rows, start=1)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "labels"


OpenStore = Callable[..., Store]


@pytest.fixture
def open_store(folder: Path) -> Iterator[OpenStore]:
    """Opens the folder as a new start does: one that is open is closed first."""
    opened: list[Store] = []

    def open_one(rows: Sequence[dict[str, Any]] = ROWS, repeat: float = 0.0) -> Store:
        for store in opened:
            store.close()
        opened.append(Store(folder, pairs_of(rows), repeat))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@contextmanager
def labelling(store: Store, **settings: Any) -> Iterator[tuple[str, httpx.Client]]:
    """The address of the page, and a client of it."""
    with running(create_app(store, **settings)) as address, http(address) as client:
        yield address, client


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
