"""Which format rows have, how sure that is, and what a user says with --map."""

from __future__ import annotations

from typing import Any

import pytest

from polar_ft.data.converters import CONVERTERS, convert_file, parse_mapping, recognise_file
from polar_ft.data.converters.format import Layout
from polar_ft.data.converters.mapping import mapped, proposal
from polar_ft.data.reading import read_rows
from polar_ft.data.records import RowError
from polar_ft.errors import PolarError
from tests.data.converters.published import FORMATS, published
from tests.data.rows import WriteRows, pair

SAME = {"ultrafeedback-binarized", "tulu", "openrlhf", "trl"}  # as chat-pairs


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"rmb", "rmb-polar", "trl"}))
def test_every_published_row_is_recognised(name: str, write_rows: WriteRows) -> None:
    found = recognise_file(CONVERTERS, str(write_rows("in.jsonl", [published(name)])))
    assert name in (found.name, *found.same)
    assert (found.read, found.looked_at) == (1, 1)
    assert found.certainty in ("certain", "likely")


def test_every_format_has_a_layout_whose_fields_are_known() -> None:
    layouts = {cls.LAYOUT for cls in Layout.__subclasses__()}
    assert {fmt.layout or name for name, fmt in CONVERTERS.items()} - layouts == {"ranked"}


def test_two_ways_to_read_a_layout_are_not_decided_by_looking(write_rows: WriteRows) -> None:
    with pytest.raises(PolarError, match=r"read in several ways, .* instead of auto: rmb or rmb-polar$"):
        recognise_file(CONVERTERS, str(write_rows("in.jsonl", [published("rmb")])))


def test_how_sure_it_is(write_rows: WriteRows) -> None:
    def look(*rows: dict[str, Any]) -> tuple[str, str]:
        found = recognise_file(CONVERTERS, str(write_rows("in.jsonl", rows)))
        return found.name, found.certainty

    alpaca = published("llama-factory-alpaca")
    assert look(alpaca) == ("llama-factory-alpaca", "certain")
    assert look(alpaca, {"instruction": "Hi"}) == ("llama-factory-alpaca", "doubtful")
    # Rows with a subset of their own are not RewardBench's.
    own = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "subset": "sums"}
    assert look(own)[0] == "chat-pairs"
    assert look(own | {"subset": "math-prm"}) == ("rewardbench", "likely")
    assert look(pair()) == ("ranked", "likely")
    # Where a prompt ends within two texts is a guess.
    assert look({"chosen": "The sky is blue.", "rejected": "The sky is grey."}) == ("trl", "doubtful")
    assert look(published("hh-rlhf")) == ("hh-rlhf", "likely")


def test_unknown_rows_are_answered_with_a_proposal(write_rows: WriteRows) -> None:
    rows = [{"Question": "2 + 2?", "better": "4", "worse": "5", "n": 1}]
    source = str(write_rows("in.jsonl", rows))
    message = (
        "no known format .*: Question, better, worse, n.* --map prompt=Question,chosen=better,rejected=worse$"
    )
    with pytest.raises(PolarError, match=message):
        recognise_file(CONVERTERS, source)
    mapping = parse_mapping(["prompt=Question,chosen=better,rejected=worse"])
    found = recognise_file(CONVERTERS, source, mapping=mapping)
    assert (found.name, found.unknown) == ("chat-pairs", ("n",))


def test_a_mapping_reaches_into_fields_and_keeps_the_rest(write_rows: WriteRows, tmp_path: Any) -> None:
    rows = [
        {"prompt": "old", "task": {"question": "2 + 2?"}, "answers": ["4", "5"], "id": "q"},
        {"task": {}, "answers": ["4", "5"]},
    ]
    mapping = parse_mapping(["prompt=task.question", "chosen=answers.0,rejected=answers.1"])
    done = convert_file(
        "chat-pairs", str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl", mapping=mapping
    )
    ((_, row),) = read_rows(tmp_path / "out.jsonl")
    assert isinstance(row, dict)
    assert row["prompt"] == [{"role": "user", "content": "2 + 2?"}]
    assert (row["rejected"][0]["content"], row["source_prompt"], row["id"]) == ("5", "old", "q")
    assert "in.jsonl:2: task.question: is missing, but --map prompt=task.question names it" in str(
        done.problems[0]
    )


def test_rows_with_images_are_counted_where_nothing_reads_them(write_rows: WriteRows) -> None:
    row = published("ms-swift", images=["cat.png"])
    with pytest.raises(PolarError, match="1 have images, sounds or videos, which cannot be read"):
        recognise_file(CONVERTERS, str(write_rows("in.jsonl", [row])))


def test_guessed_prompts_are_counted(write_rows: WriteRows, tmp_path: Any) -> None:
    rows = [{"chosen": "The sky is blue.", "rejected": "The sky is grey."}, published("trl")]
    done = convert_file("trl", str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl")
    assert (done.pairs, done.guessed) == (2, 1)


@pytest.mark.parametrize("entries", [["prompt"], ["=question"], ["prompt="], ["prompt=a,prompt=b"], [""]])
def test_mappings_that_say_nothing(entries: list[str]) -> None:
    with pytest.raises(PolarError, match="--map"):
        parse_mapping(entries)


def test_names_with_commas_and_dots() -> None:
    assert parse_mapping(["prompt=question, in full, chosen=a"]) == {
        "prompt": "question, in full",
        "chosen": "a",
    }
    assert mapped({"a.b": 1, "a": {"b": 2}}, {"prompt": "a.b"}) == {"prompt": 1, "a": {"b": 2}}
    with pytest.raises(RowError, match="the row has a"):
        mapped({"a": 1}, {"prompt": "b"})
    assert proposal(["question", "better"]) == ""
