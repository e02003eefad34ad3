"""Comparisons of Label Studio and Argilla: files as they write them, worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polar_ft.data.converters import convert_file
from polar_ft.data.converters.annotation import SKIPPED, UNDECIDED, argilla, label_studio
from polar_ft.data.converters.format import TIED
from polar_ft.data.reading import read_examples
from polar_ft.data.records import RowError
from tests.data.converters.published import published


def annotation(side: str | None, who: Any = 3, **changes: Any) -> dict[str, Any]:
    (one,) = published("label-studio")["annotations"]
    one["result"][0]["value"]["selected"] = side
    return one | {"completed_by": who} | changes


def test_label_studio_with_several_labellers() -> None:
    skipped = annotation("left", was_cancelled=True)
    task = published(
        "label-studio",
        annotations=[
            annotation("left", {"id": 4, "email": "a@example.org"}),
            annotation("right", None, lead_time=None),
            skipped,
            annotation(None, result=[]),
            annotation(None, result=[{"type": "choices", "value": {"choices": ["x"]}}]),
        ],
    )
    converted = label_studio(task)
    assert [(row["chosen"], row.get("labeller"), row.get("seconds")) for row in converted.rows] == [
        ("5", "a@example.org", 4.288),
        ("4", None, None),
    ]
    assert converted.left_out == {SKIPPED: 1, UNDECIDED: 2}
    assert converted.rows[0].keys() == {
        "id",
        "prompt",
        "reference",
        "chosen",
        "rejected",
        "labeller",
        "seconds",
    }  # nothing of Label Studio's bookkeeping
    assert label_studio(published("label-studio", annotations=[])).left_out == {UNDECIDED: 1}


def test_label_studio_with_other_names() -> None:
    data = {"text1": "5", "text2": "4", "reference": "four", "topic": "sums"}
    with pytest.raises(RowError, match=r"data: has no prompt — name it: --map prompt=data.NAME"):
        label_studio(published("label-studio", data=data))
    (row,) = label_studio(published("label-studio", data=data, prompt="2 + 2?")).rows  # as --map gives it
    assert (row["prompt"], row["reference"], row["chosen"], row["topic"]) == ("2 + 2?", "four", "4", "sums")
    assert "source_prompt" not in row
    named = annotation("left")
    named["result"][0]["to_name"] = "mine,yours"
    data = {"question": "2 + 2?", "mine": "4", "yours": "5", "answer1": "x", "answer2": "y"}
    (row,) = label_studio(published("label-studio", data=data, annotations=[named])).rows
    assert (row["chosen"], row["rejected"]) == ("4", "5")
    with pytest.raises(RowError, match="data: has no answers — expected answer1 and answer2, or text1"):
        label_studio(published("label-studio", data={"prompt": "p", "a": "4"}))


def test_the_file_of_label_studio_is_read_with_a_name_from_the_command_line(tmp_path: Path) -> None:
    task = published("label-studio", data={"ask": "2 + 2?", "text1": "5", "text2": "4"})
    (tmp_path / "export.json").write_text(json.dumps([task], indent=2))
    convert_file(
        "label-studio", str(tmp_path / "export.json"), tmp_path / "out.jsonl", mapping={"prompt": "data.ask"}
    )
    (example,) = read_examples(tmp_path / "out.jsonl")
    assert (example.prompt, example.candidates, example.id) == ("2 + 2?", ("4", "5"), "11")


def record(*values: Any, **fields: str) -> dict[str, Any]:
    row = published("argilla")
    row["fields"] |= fields
    row["responses"]["ranking"] = [{"value": value, "user_id": f"u{n}"} for n, value in enumerate(values)]
    return row


def test_argilla_in_the_forms_of_a_ranking() -> None:
    ranked = [{"value": "response1", "rank": 2}, {"value": "response2", "rank": 1}]
    tied = [{"value": "response1", "rank": 1}, {"value": "response2", "rank": 1}]
    converted = argilla(record(["response1", "response2"], ranked, tied, "response2", "tie", ["other"]))
    assert [(row["chosen"], row["labeller"]) for row in converted.rows] == [
        ("5", "u0"),
        ("4", "u1"),
        ("4", "u3"),
    ]
    assert converted.left_out == {TIED: 2}
    assert argilla(published("argilla", responses={})).left_out == {UNDECIDED: 1}


def test_argilla_with_three_answers_metadata_and_a_reference() -> None:
    row = record(["response3", "response1", "response2"], response3="four", reference="IV", topic="sums")
    row["metadata"] = {"source": "exam"}
    (ranked,) = argilla(row).rows
    assert [(one["content"], one["rank"]) for one in ranked["responses"]] == [("four", 1), ("5", 2), ("4", 3)]
    assert (ranked["reference"], ranked["topic"], ranked["source"]) == ("IV", "sums", "exam")
    with pytest.raises(RowError, match="fields: has no prompt or instruction or question"):
        argilla(published("argilla", fields={"response1": "5", "response2": "4"}))


def test_argilla_flat_as_on_the_hub(tmp_path: Path) -> None:
    flat = {
        "id": "q-1",
        "status": "completed",
        "_server_id": "c0ffee",
        "instruction": "2 + 2?",
        "response1": "5",
        "response2": "4",
        "ranking.responses": [["response2", "response1"]] * 3,
        "ranking.responses.users": ["a", "b", "c"],
        "ranking.responses.status": ["submitted", "draft", "discarded"],
        "ranking.suggestion": None,
    }
    none = flat | dict.fromkeys(name for name in flat if name.startswith("ranking."))
    (tmp_path / "hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (flat, none)))
    done = convert_file("argilla", str(tmp_path / "hub.jsonl"), tmp_path / "out.jsonl")
    assert (done.pairs, dict(done.left_out)) == (1, {SKIPPED: 2, UNDECIDED: 1})
    (example,) = read_examples(tmp_path / "out.jsonl")
    assert (example.candidates, example.extra) == (("4", "5"), {"labeller": "a"})
