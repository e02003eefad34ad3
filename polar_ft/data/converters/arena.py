"""Votes of Chatbot Arena (arXiv 2403.04132): two dialogues with the same questions, and which one won."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polar_ft.data.converters.format import TIED, Converted, Layout, Turn, described, messages, with_extras
from polar_ft.data.records import RowError

OTHER_HISTORY = "of dialogues that differ before their last answers"
# What other programs say about a dialogue, longer than the dialogue.
_REMARKS = ("openai_moderation", "toxic_chat_tag", "conv_metadata", "full_conversation")


class ArenaVote(Layout):
    """A row of lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments, or later votes."""

    LAYOUT = "arena"
    READ = (
        "cards of lmsys/chatbot_arena_conversations and lmsys/mt_bench_human_judgments, and code that reads "
        "lmarena-ai/arena-human-preference-140k, 2026-11-24"
    )

    conversation_a: list[Turn] = described("a list of messages", min_length=2)
    conversation_b: list[Turn] = described("a list of messages", min_length=2)
    winner: Literal["model_a", "model_b", "tie", "tie (bothbad)", "both_bad"] = described(
        '"model_a", "model_b", "tie", "tie (bothbad)" or "both_bad"'
    )
    model_a: str | None = described("a string", default=None)
    model_b: str | None = described("a string", default=None)
    question_id: str | int | None = described("a string", default=None)


def arena(row: Mapping[str, Any]) -> Converted:
    """Converts a vote: the last answer of the dialogue that won is chosen; the reference is empty.

    Both kinds of ties are dropped. So are dialogues whose earlier answers differ: the vote is on all answers,
    and no prompt is common to the last ones. Remarks about the dialogue (moderation) are not kept. Written
    from the data cards and from code that reads the data, without access to the files.

    Raises:
        RowError: The row has another layout, or a dialogue does not end with an answer.

    >>> turns = lambda text: [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": text}]
    >>> row = {"question_id": "q", "model_a": "m", "model_b": "n", "winner": "model_b", "language": "English",
    ...        "conversation_a": turns("5"), "conversation_b": turns("4")}
    >>> pair = arena(row).rows[0]
    >>> pair["chosen"], pair["chosen_policy"], pair["rejected"]
    ([{'role': 'assistant', 'content': '4'}], 'n', [{'role': 'assistant', 'content': '5'}])
    >>> arena(row | {"winner": "tie (bothbad)"}).left_out
    {'of responses that are ranked the same': 1}
    """
    vote = ArenaVote.of(row)
    sides = {"model_a": messages(vote.conversation_a), "model_b": messages(vote.conversation_b)}
    for side, turns in sides.items():
        if turns[-1]["role"] != "assistant":
            raise RowError(
                f"conversation_{side[-1]}", "does not end with an answer — there is nothing to compare"
            )
    if vote.winner not in sides:
        return Converted([], {TIED: 1})
    chosen = sides.pop(vote.winner)
    (rejected,) = sides.values()
    if chosen[:-1] != rejected[:-1]:
        return Converted([], {OTHER_HISTORY: 1})
    result: dict[str, Any] = {"prompt": chosen[:-1], "reference": ""}
    result |= {"chosen": chosen[-1:], "rejected": rejected[-1:]}
    policies = (vote.model_a, vote.model_b) if vote.winner == "model_a" else (vote.model_b, vote.model_a)
    for side, policy in zip(("chosen", "rejected"), policies, strict=True):
        if policy is not None:
            result[f"{side}_policy"] = policy
    if vote.question_id is not None:
        result["question_id"] = vote.question_id
    return Converted([with_extras(result, vote.rest(*_REMARKS))])
