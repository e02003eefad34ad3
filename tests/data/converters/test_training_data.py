"""UltraFeedback, HelpSteer and pairs of dialogues: rows worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from polar_ft.data.converters.arena import OTHER_HISTORY, arena
from polar_ft.data.converters.dialogues import chat_pairs
from polar_ft.data.converters.format import TIED
from polar_ft.data.converters.helpsteer import ONE_ANSWER, helpsteer2, helpsteer2_ratings, helpsteer3
from polar_ft.data.converters.nectar import nectar
from polar_ft.data.converters.saferlhf import pku_saferlhf
from polar_ft.data.converters.ultrafeedback import ultrafeedback
from polar_ft.data.records import RowError
from tests.data.converters.published import published

SYSTEM, USER, ASKED, ANSWER, OTHER, CALL, RESULT = (
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be brief."),
        ("user", "Hi"),
        ("user", "Well?"),
        ("assistant", "A"),
        ("assistant", "B"),
        ("assistant", "look it up"),
        ("tool", "found"),
    )
)


def test_ultrafeedback_by_hand() -> None:
    row = published("ultrafeedback")
    del row["correct_answers"], row["incorrect_answers"]
    assert ultrafeedback(row).rows == [
        {
            "subset": "flan_v2",
            "prompt": "2 + 2?",
            "responses": [
                {"content": "5", "score": 1.0, "policy": "a"},
                {"content": "4", "score": 9.0, "policy": "b"},
                {"content": "four", "score": 8.0, "policy": "c"},
            ],
        }
    ]
    fine = ultrafeedback(row, score="fine-grained", reference="none").rows[0]
    assert fine["reference"] == ""
    assert [response["score"] for response in fine["responses"]] == [4.0, 4.5, 5.0]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_ultrafeedback_answers_without_a_score_are_left_out(missing: float | None) -> None:
    row = published("ultrafeedback")
    row["completions"][1]["overall_score"] = missing
    with pytest.raises(
        RowError, match="completions: has 2 answers with the score 'overall' — a reference and a"
    ):
        ultrafeedback(row)
    (ranked,) = ultrafeedback(row, reference="none").rows
    assert [response["content"] for response in ranked["responses"]] == ["5", "four"]
    assert len(ultrafeedback(row, score="fine-grained").rows[0]["responses"]) == 3


@pytest.mark.parametrize(
    ("strength", "gives"), [(-2, ("first", "second")), (1, ("second", "first")), (0, None)]
)
def test_helpsteer_strengths_say_which_is_better(strength: int, gives: tuple[str, str] | None) -> None:
    rows = (
        (helpsteer2, published("helpsteer2", response_1="first", response_2="second"), "preference_strength"),
        (helpsteer3, published("helpsteer3", response1="first", response2="second"), "overall_preference"),
    )
    for convert, row, field in rows:
        done = convert(row | {field: strength})
        if gives is None:
            assert (done.rows, done.left_out) == ([], {TIED: 1})
        else:
            (pair,) = done.rows
            assert (pair["chosen"], pair["rejected"], pair["margin"]) == (*gives, abs(strength))
            assert not any("Right" in str(value) or "It is right" in str(value) for value in pair.values())


def test_helpsteer2_ratings_by_hand() -> None:
    rows = [
        published("helpsteer2-ratings", response=text, helpfulness=good, responses="own")
        for text, good in (("4", 4), ("5", 1), ("four", 4))
    ]
    (row,) = helpsteer2_ratings(rows).rows
    assert [(r["content"], r["score"], r["correctness"]) for r in row["responses"]] == [
        ("4", 4.0, 4),
        ("5", 1.0, 4),
        ("four", 4.0, 4),
    ]
    assert row["source_responses"] == "own"
    assert (row["prompt"], row["reference"]) == ([{"role": "user", "content": "2 + 2?"}], "")
    assert helpsteer2_ratings(rows[::2]).left_out == {TIED: 1}
    assert helpsteer2_ratings(rows[:1]).left_out == {ONE_ANSWER: 1}


def test_nectar_by_hand() -> None:
    row = published("nectar")
    row["prompt"] = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: 2 + 2?\n\nAssistant:"
    row["answers"].append({"answer": "none", "model": "d", "rank": None})
    assert nectar(row).rows == [
        {
            "subset": "lmsys-chat-1m",
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "2 + 2?"},
            ],
            "responses": [
                {"content": "5", "rank": 3.0, "policy": "a"},
                {"content": "4", "rank": 1.0, "policy": "b"},
                {"content": "four", "rank": 2.0, "policy": "c"},
            ],
            "good_natured": True,
        }
    ]
    assert nectar(row, reference="none").rows[0]["reference"] == ""
    with pytest.raises(RowError, match="answers: has 2 answers with a rank — a reference and a pair needs 3"):
        nectar(row | {"answers": row["answers"][1:]})
    with pytest.raises(RowError, match="prompt: does not end where the answer begins"):
        nectar(row | {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello!"})


def test_pku_saferlhf_by_hand() -> None:
    row = published("pku-saferlhf")
    (better,) = pku_saferlhf(row).rows
    assert better == {
        "prompt": "2 + 2?",
        "reference": "",
        "chosen": "4",
        "rejected": "5",
        "chosen_policy": "WizardLM-30B-Uncensored",
        "chosen_is_safe": False,
        "chosen_severity_level": 2,
        "chosen_harm_category": {"Privacy Violation": True},
        "chosen_sha256": "4b22",
        "rejected_policy": "Alpaca3-8B",
        "rejected_is_safe": True,
        "rejected_severity_level": 0,
        "rejected_harm_category": {"Privacy Violation": False},
        "rejected_sha256": "ef2d",
        "better_is_safer": False,
        "prompt_source": "Alpaca3-70B",
    }
    (safer,) = pku_saferlhf(row, score="safer").rows
    assert (safer["chosen"], safer["chosen_is_safe"], safer["rejected_policy"]) == (
        "5",
        True,
        "WizardLM-30B-Uncensored",
    )
    del row["safer_response_id"]
    with pytest.raises(RowError, match="safer_response_id: is missing — take --score better"):
        pku_saferlhf(row, score="safer")


@pytest.mark.parametrize(
    ("winner", "gives"),
    [("model_a", "5"), ("model_b", "4"), ("tie", None), ("tie (bothbad)", None), ("both_bad", None)],
)
def test_an_arena_vote_by_hand(winner: str, gives: str | None) -> None:
    done = arena(published("arena", winner=winner))
    if gives is None:
        assert (done.rows, done.left_out) == ([], {TIED: 1})
        return
    (pair,) = done.rows
    policies = ["chatglm-6b", "koala-13b"]
    assert [pair["chosen_policy"], pair["rejected_policy"]] == (policies if gives == "5" else policies[::-1])
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"] != gives) == (gives, True)
    assert {"openai_moderation", "toxic_chat_tag"}.isdisjoint(pair)
    assert (pair["language"], pair["question_id"][:4]) == ("English", "5821")


def test_arena_dialogues_with_other_earlier_answers_are_left_out() -> None:
    first, second = ([USER, answer, ASKED, ANSWER] for answer in (ANSWER, OTHER))
    row = published("arena", conversation_a=first, conversation_b=second)
    assert (arena(row).rows, arena(row).left_out) == ([], {OTHER_HISTORY: 1})
    same = published("arena", conversation_a=first, conversation_b=[*first[:-1], OTHER])
    (pair,) = arena(same).rows
    assert (pair["prompt"], pair["chosen"]) == ([USER, ANSWER, ASKED], [OTHER])
    with pytest.raises(RowError, match="conversation_b: does not end with an answer"):
        arena(published("arena", conversation_b=[USER, ASKED]))


def test_chat_pairs_by_hand() -> None:
    assert chat_pairs(published("ultrafeedback-binarized")).rows == [
        {
            "id": "p1",
            "prompt": [{"role": "user", "content": "2 + 2?"}],
            "reference": "",
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
            "margin": 6.5,
            "chosen_score": 8.5,
            "rejected_score": 2.0,
        }
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "A", "rejected": "B"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": " Hi ", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [OTHER]},
        {"prompt": "Hi ", "chosen": [USER, ANSWER], "rejected": "B"},
    ],
)
def test_chat_pairs_reads_the_forms_that_trl_documents(row: dict[str, Any]) -> None:
    (pair,) = chat_pairs(row).rows
    assert pair["prompt"] in ("Hi", [USER])
    assert (pair["reference"], pair["chosen"], pair["rejected"]) == ("", [ANSWER], [OTHER])
    assert chat_pairs(row | {"reference": "C"}).rows[0]["reference"] == "C"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        # A prompt and answers of several messages: what they share is asked, the rest is answered.
        (
            {"prompt": [USER], "chosen": [CALL, RESULT, ANSWER], "rejected": [CALL, RESULT, OTHER]},
            [USER, CALL, RESULT],
            [ANSWER],
        ),
        (
            {"prompt": "Hi", "chosen": [CALL, RESULT, ANSWER], "rejected": [OTHER]},
            [USER],
            [CALL, RESULT, ANSWER],
        ),
        (
            {"chosen": [USER, CALL, RESULT, ANSWER], "rejected": [USER, OTHER]},
            [USER],
            [CALL, RESULT, ANSWER],
        ),
        # The system message, wherever it is.
        ({"system": "Be brief.", "prompt": "Hi", "chosen": "A", "rejected": "B"}, [SYSTEM, USER], [ANSWER]),
        (
            {"system": "Be brief.", "chosen": [SYSTEM, USER, ANSWER], "rejected": [USER, OTHER]},
            [SYSTEM, USER],
            [ANSWER],
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            [SYSTEM, USER],
            [ANSWER],
        ),
        (
            {"prompt": [SYSTEM], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            [SYSTEM, USER],
            [ANSWER],
        ),
        ({"system": "", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER], [ANSWER]),
        # A text as the last question of a dialogue.
        (
            {"prompt": "Hi", "chosen": [ASKED, OTHER, USER, ANSWER], "rejected": [ASKED, OTHER, USER, OTHER]},
            [ASKED, OTHER, USER],
            [ANSWER],
        ),
    ],
)
def test_chat_pairs_keeps_the_complete_prompt(
    row: dict[str, Any], prompt: list[dict[str, str]], chosen: list[dict[str, str]]
) -> None:
    (pair,) = chat_pairs(row).rows
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (prompt, chosen, [OTHER])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "A", "rejected": "B"}, "prompt: is missing, and chosen is an answer without its prompt"),
        ({"chosen": [USER], "rejected": [USER]}, "chosen: does not end with a message of the assistant"),
        (
            {"chosen": [USER, ANSWER], "rejected": []},
            "rejected: does not end with a message of the assistant",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [OTHER]},
            "rejected: has another prompt than chosen from turn 1",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "score_chosen": 1, "score_rejected": 2},
            "score_rejected: is above score_chosen",
        ),
        (
            {"prompt": "something else", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            "prompt: is not what chosen begins with, which has a prompt of its own",
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, ANSWER], "rejected": [OTHER]},
            "prompt: is not what chosen begins with",
        ),
        (
            {"system": "Be long.", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
            "system: is not the system message of chosen",
        ),
        (
            {"prompt": "Hi", "chosen": [ANSWER, USER, ANSWER], "rejected": [OTHER]},
            "rejected: has another prompt than chosen from turn 2 on",
        ),
    ],
)
def test_chat_pairs_that_say_no_pair(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        chat_pairs(row)


def test_equal_scores_are_a_tie() -> None:
    row = published("ultrafeedback-binarized", score_chosen=2)
    assert chat_pairs(row).left_out == {TIED: 1}
