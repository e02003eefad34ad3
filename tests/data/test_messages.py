"""Messages as others write them, in a converter and in the reader itself."""

from __future__ import annotations

from typing import Any

import pytest

from polar_ft.data.converters.dialogues import chat_pairs
from polar_ft.data.messages import plain_message
from polar_ft.data.records import RowError, parse_row

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 2}'}}


def pair(**message: Any) -> dict[str, Any]:
    """A row whose better answer is this message."""
    answer = {"role": "assistant"} | message
    return {"chosen": [USER, answer], "rejected": [USER, {"role": "assistant", "content": "B"}]}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "A"}, "A"),
        ({"content": "A", "tool_calls": None}, "A"),
        ({"content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}, "A\nB"),
        ({"content": [{"type": "text", "text": "A", "image_url": None}]}, "A"),
        ({"content": [{"type": "output_text", "text": "A", "annotations": []}]}, "A"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": None, "tool_calls": [CALL]}, '{"name": "add", "arguments": {"a": 2}}'),
        ({"content": "", "tool_calls": [CALL]}, '{"name": "add", "arguments": {"a": 2}}'),
        ({"tool_calls": [CALL]}, '{"name": "add", "arguments": {"a": 2}}'),
        (
            {"content": "So:", "tool_calls": [CALL, {"name": "stop", "arguments": "now"}]},
            'So:\n{"name": "add", "arguments": {"a": 2}}\n{"name": "stop", "arguments": "now"}',
        ),
        (
            {"content": [{"type": "tool_use", "id": "t", "name": "add", "input": {"a": 2}}]},
            '{"name": "add", "arguments": {"a": 2}}',
        ),
        ({"content": [{"type": "tool_result", "content": [{"type": "text", "text": "4"}]}]}, "4"),
    ],
)
def test_what_becomes_text(message: dict[str, Any], text: str) -> None:
    (row,) = chat_pairs(pair(**message)).rows
    assert row["chosen"] == [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of the type 'image_url'"),
        ({"content": [{"type": "text", "text": "A"}, {"type": "input_audio"}]}, "the type 'input_audio'"),
        ({"content": ["A"]}, r"chosen\[1\].content: is a list of 1"),
        ({"content": [{"text": "A"}]}, r"chosen\[1\].content: is a list of 1"),
        ({"content": [{"type": "tool_result", "content": None}]}, "a part of the type 'tool_result'"),
        ({"content": [{"type": "text", "text": None}]}, "a part of the type 'text'"),
        ({"content": None, "tool_calls": [{"id": 1}]}, 'a call in tool_calls without "name"'),
        ({"content": None}, r"chosen\[1\].content: is null"),
        ({"content": 7, "tool_calls": [CALL]}, r"chosen\[1\].content: is the number 7"),
        ({"content": {"type": "text", "text": "A"}}, r"chosen\[1\].content: is an object with 'type'"),
    ],
)
def test_what_cannot_become_text_is_named(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason) as caught:
        chat_pairs(pair(**message))
    assert caught.value.field.startswith("chosen[1]")


@pytest.mark.parametrize("column", ["images", "image", "videos", "audios"])
def test_a_row_with_an_image_is_refused(column: str) -> None:
    with pytest.raises(RowError, match=f"{column}: is not empty, but only text can be read"):
        chat_pairs({**pair(content="A"), column: ["cat.png"]})
    assert chat_pairs({**pair(content="A"), column: []}).rows


def test_roles_of_sharegpt() -> None:
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
    for theirs, ours in {**roles, "system": "system"}.items():
        assert plain_message({"from": theirs, "value": "A"}) == {"role": ours, "content": "A"}


@pytest.mark.parametrize("value", [None, 3, "text", [], {"text": "A"}, {"role": [1], "content": "A"}])
def test_what_is_no_message_stays_as_it_is(value: Any) -> None:
    assert plain_message(value) == value


def test_the_reader_itself_reads_them() -> None:
    row = parse_row({"prompt": [USER], "reference": "", **pair(content=None, tool_calls=[CALL])})
    example = row.to_example("a.jsonl:1")
    assert example.candidates == ('Hi\n{"name": "add", "arguments": {"a": 2}}', "Hi\nB")
    with pytest.raises(RowError, match=r"chosen\[1\]: has a part of the type 'image_url' in its content"):
        parse_row({"prompt": "Hi", "reference": "", **pair(content=[{"type": "image_url"}])})
