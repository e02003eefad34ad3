"""Splitting: no prompt on both sides, a side that depends on the prompt alone, nothing lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.data.reading import DataSource, as_sources
from polar_ft.data.split import is_held_out, split_by_prompt
from polar_ft.errors import DataError, PolarError
from tests.data.rows import WriteRows, pair
from tests.shared_data import shared_file


def split(path: Path, out: Path, **options: float) -> tuple[list[dict], list[dict]]:
    paths = out / "train.jsonl", out / "held_out.jsonl"
    split_by_prompt([DataSource(path=str(path))], *paths, **{"fraction": 0.3} | options)  # type: ignore[arg-type]
    train, held_out = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths
    )
    return train, held_out


def test_every_row_is_on_one_side_as_it_was(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [pair(id=i, prompt=f"prompt {i % 100}", note={"é": [1, None]}) for i in range(300)]
    train, held_out = split(write_rows("in.jsonl", rows), tmp_path)
    assert sorted(train + held_out, key=lambda row: row["id"]) == rows
    prompts = [{row["prompt"] for row in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert 15 <= len(prompts[1]) <= 45


def test_the_side_does_not_depend_on_the_order_of_rows(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [pair(id=i, prompt=f"prompt {i}") for i in range(200)]
    _, first = split(write_rows("a.jsonl", rows), tmp_path / "a")
    random.Random(0).shuffle(rows)
    _, second = split(write_rows("b.jsonl", rows), tmp_path / "b")
    _, other_seed = split(write_rows("b.jsonl", rows), tmp_path / "c", seed=1)

    def ids(side: list[dict]) -> set[int]:
        return {row["id"] for row in side}

    assert ids(first) == ids(second)
    assert ids(first) != ids(other_seed)


@given(st.text(), st.integers(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_more_of_the_same(prompt: str, seed: int, a: float, b: float) -> None:
    small, large = sorted((a, b))
    assert is_held_out(prompt, large, seed) >= is_held_out(prompt, small, seed)
    assert not is_held_out(prompt, 0, seed)


def test_a_prompt_of_messages_and_the_same_text_are_one_prompt(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        rows.append(pair(prompt=f"say  {i}\nplease"))
        rows.append(
            pair(prompt=[{"role": "system", "content": f"say {i}"}, {"role": "user", "content": "please"}])
        )
    train, held_out = split(write_rows("in.jsonl", rows), tmp_path)
    assert len(train) % 2 == len(held_out) % 2 == 0
    assert len(train) + len(held_out) == 120


def test_bad_rows_stop_it_and_nothing_is_written(write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows("in.jsonl", [*[pair(prompt=f"{i}") for i in range(50)], pair(chosen=1)])
    with pytest.raises(DataError, match=r"in.jsonl:51: chosen: is the number 1"):
        split(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 7])
def test_fractions_that_are_none(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(PolarError, match="must lie between 0 and 1"):
        split(tmp_path / "unread.jsonl", tmp_path, fraction=fraction)


def test_an_empty_side_is_an_error(write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows("in.jsonl", [pair()] * 20)
    with pytest.raises(PolarError, match=r"side is empty: 1 prompt is too few to hold some out; add rows"):
        split(path, tmp_path / "out")


def test_the_training_side_of_a_split_cannot_be_split_again_by_the_same_seed(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows("in.jsonl", [pair(prompt=f"say {number}") for number in range(200)])
    train, _ = split(path, tmp_path / "out")
    again = write_rows("train.jsonl", train)
    with pytest.raises(PolarError, match=r"are one side of an earlier split with seed 0; .* another --seed"):
        split(again, tmp_path / "again")
    assert all(split(again, tmp_path / "other", seed=1))


def test_full_file_of_ranked_rows(tmp_path: Path) -> None:
    source = shared_file("alpaca_eval_ranked.jsonl.gz")
    train, held_out = split_by_prompt(
        as_sources(str(source)), tmp_path / "t.jsonl", tmp_path / "h.jsonl.gz", fraction=0.1
    )
    assert train.rows + held_out.rows == train.prompts + held_out.prompts == 805
    assert 0.05 < held_out.prompts / 805 < 0.15
    assert (train.subsets + held_out.subsets).keys() >= {"koala", "vicuna", "oasst"}
