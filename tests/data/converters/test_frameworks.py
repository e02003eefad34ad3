"""Preference data of other frameworks: rows worked by hand, in each form that the frameworks read."""

from __future__ import annotations

from typing import Any

import pytest

from polar_ft.data.converters.frameworks import (
    alpaca_pair,
    openai_pair,
    preference,
    sharegpt_pair,
    swift_pair,
    unpaired,
)
from polar_ft.data.records import RowError
from tests.data.converters.published import published

SYSTEM, USER, ANSWER, OTHER = (
    {"role": role, "content": content}
    for role, content in (("system", "Brief."), ("user", "Hi"), ("assistant", "A"), ("assistant", "B"))
)


def spoken(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


def test_alpaca_with_history_input_and_system() -> None:
    row = published(
        "llama-factory-alpaca",
        instruction="Translate.",
        input="Hallo",
        system="Brief.",
        history=[["Hi", "A"]],
    )
    (pair,) = alpaca_pair(row).rows
    assert pair["prompt"] == [SYSTEM, USER, ANSWER, {"role": "user", "content": "Translate.\nHallo"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "4"}]
    with pytest.raises(RowError, match=r"history: has an entry that is not \[question, answer\]"):
        alpaca_pair({**row, "history": [["Hi"]]})


def test_sharegpt_with_tools_and_a_system_column() -> None:
    conversation = [
        ("human", "Hi"),
        ("function_call", "f()"),
        ("observation", "3"),
        ("gpt", "A"),
        ("human", "?"),
    ]
    row = published(
        "llama-factory-sharegpt", conversations=spoken(*conversation), system="Brief.", tools="[f]"
    )
    (pair,) = sharegpt_pair(row).rows
    assert [turn["role"] for turn in pair["prompt"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert (pair["prompt"][0], pair["tools"]) == (SYSTEM, "[f]")


def test_a_system_message_of_the_dialogue_goes_before_the_column() -> None:
    row = published("llama-factory-sharegpt", conversations=spoken(("system", "Long."), ("human", "Hi")))
    (pair,) = sharegpt_pair({**row, "system": "Brief."}).rows
    assert pair["prompt"][0] == {"role": "system", "content": "Long."}
    assert pair["system"] == "Brief."
    assert "system" not in sharegpt_pair({**row, "system": "Long."}).rows[0]


@pytest.mark.parametrize(
    "worse",
    [
        {"rejected_response": "B"},
        {"rejected_response": [OTHER]},
        {"rejected_messages": [SYSTEM, USER, OTHER]},
        {"rejected_response": "B", "rejected_messages": None},
    ],
)
def test_swift_reads_each_form_of_the_worse_answer(worse: dict[str, Any]) -> None:
    (pair,) = swift_pair({"messages": [SYSTEM, USER, ANSWER], **worse, "margin": 0.5}).rows
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([SYSTEM, USER], [ANSWER], [OTHER])
    assert pair["margin"] == 0.5


def test_swift_answers_are_all_that_follows_the_last_question() -> None:
    call, result = {"role": "tool_call", "content": "f()"}, {"role": "tool_response", "content": "3"}
    row = {"messages": [USER, ANSWER, USER, call, result, ANSWER], "rejected_response": "B"}
    (pair,) = swift_pair(row).rows
    assert pair["prompt"] == [USER, ANSWER, USER]
    assert [turn["role"] for turn in pair["chosen"]] == ["assistant", "tool", "assistant"]
    assert pair["rejected"] == [OTHER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ANSWER]}, "rejected_response: is missing — without a worse answer"),
        (
            {"messages": [USER], "rejected_response": "B"},
            "messages: does not end with a message of the assis",
        ),
        ({"messages": [ANSWER], "rejected_response": "B"}, "messages: has no message of the user"),
        ({"messages": [USER, ANSWER], "rejected_response": []}, "rejected_response: does not end with"),
        ({"messages": [USER, ANSWER], "rejected_messages": [SYSTEM, USER, OTHER]}, "has another prompt"),
        (
            {"messages": [USER, ANSWER], "rejected_response": "B", "rejected_messages": [USER, OTHER]},
            "is given together with rejected_response",
        ),
    ],
)
def test_swift_rows_that_say_no_pair(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        swift_pair(row)


def test_openai_keeps_the_settings_of_the_request() -> None:
    row = published("openai")
    row["input"]["tools"] = [{"name": "f"}]
    (pair,) = openai_pair(row).rows
    assert pair["input"] == {"tools": [{"name": "f"}], "parallel_tool_calls": True}


@pytest.mark.parametrize(
    ("chosen", "rejected", "gives"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", "blue.", "green.")),
        ("Q: 2 + 2?\n\nA: 4", "Q: 2 + 2?\n\nA: 45", ("Q: 2 + 2?\n\nA:", "4", "45")),
        ("It is great", "It is grey", ("It is", "great", "grey")),
        ("天空是蓝色的", "天空是绿色的", ("天空是", "蓝色的", "绿色的")),
        ("Why? Because", "Why?", ("Why?", "Because", "")),
    ],
)
def test_an_implicit_prompt_of_two_texts_ends_with_a_word(chosen: str, rejected: str, gives: tuple) -> None:
    (pair,) = preference({"chosen": chosen, "rejected": rejected}).rows
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == gives


def test_texts_that_share_no_beginning_have_no_prompt() -> None:
    with pytest.raises(
        RowError, match="prompt: is missing, and chosen and rejected do not begin with the same"
    ):
        preference({"chosen": "Blue", "rejected": "Black"})


def test_unpaired_answers_of_a_prompt_are_ranked() -> None:
    rows = [published("trl-unpaired", completion=text, label=text == "4") for text in ("5", "4", "22")]
    (row,) = unpaired(rows).rows
    assert [(answer["content"], answer["score"]) for answer in row["responses"]] == [
        ("4", 1.0),
        ("5", 0.0),
        ("22", 0.0),
    ]
    assert unpaired(rows[:1]).rows == []
    rows = [
        {"prompt": [USER], "completion": [answer], "label": answer is ANSWER} for answer in (ANSWER, OTHER)
    ]
    assert unpaired(rows).rows[0]["responses"][0]["messages"] == [ANSWER]
