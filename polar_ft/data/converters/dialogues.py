"""Pairs of dialogues that differ in their last turn: hh-rlhf, and lists of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from polar_ft.data.converters.format import TIED, Converted, Layout, Turn, described, messages
from polar_ft.data.records import RowError

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_rlhf(row: Mapping[str, Any]) -> Converted:
    r"""Converts a pair of dialogues of Anthropic's hh-rlhf; the reference is empty.

    The prompt is everything before the last turn. White space around a turn is not kept.

    Raises:
        RowError: A dialogue cannot be parsed, or the two do not have the same prompt.

    >>> row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."}
    >>> pair = hh_rlhf(row).rows[0]
    >>> pair["prompt"], pair["chosen"]
    ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Hello!'}])
    """
    chosen = _parse_dialogue(row, "chosen")
    rejected = _parse_dialogue(row, "rejected")
    _refuse_other_prompt(chosen, rejected)
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    pair = {"prompt": chosen[:-1], "reference": "", "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return Converted([pair | rest])


class ChatPair(Layout):
    """A row of UltraFeedback Binarized, Skywork-Reward-Preference, or data made for TRL."""

    LAYOUT = "chat-pairs"
    READ = "cards of HuggingFaceH4/ultrafeedback_binarized and Skywork-Reward-Preference-80K-v0.2, 2026-11-21"

    chosen: str | list[Turn] = described("a text, or a list of messages that ends with the better answer")
    rejected: str | list[Turn] = described("a text, or a list of messages that ends with the worse answer")
    prompt: str | list[Turn] | None = described("a text or a list of messages", default=None)
    messages: Any = described("the same as chosen", default=None)
    prompt_id: str | None = described("a string", default=None)
    score_chosen: float | None = described("a number", default=None)
    score_rejected: float | None = described("a number", default=None)


def chat_pairs(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of dialogues as lists of messages; the reference is the row's own, else empty.

    The prompt is all turns except the last; if chosen and rejected are only answers, it is the field
    ``prompt``. A pair of equal scores is dropped as a tie.

    Reads HuggingFaceH4/ultrafeedback_binarized (splits train_prefs and test_prefs), Skywork's
    Skywork-Reward-Preference-80K, and the forms that TRL documents. Written from the data cards, without
    access to these files.

    Raises:
        RowError: The row has another layout, the two dialogues do not have the same prompt, or the rejected
            answer has the higher score.

    >>> turns = lambda answer: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    >>> pair = chat_pairs({"chosen": turns("Hello!"), "rejected": turns("Go."), "source": "mine"}).rows[0]
    >>> pair["prompt"], pair["rejected"], pair["source"]
    ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Go.'}], 'mine')
    """
    pair = ChatPair.of(row)
    prompt: Any = (
        pair.prompt if isinstance(pair.prompt, str) or pair.prompt is None else messages(pair.prompt)
    )
    chosen, rejected = _turns(pair.chosen, "chosen"), _turns(pair.rejected, "rejected")
    _refuse_other_prompt(chosen, rejected)
    if len(chosen) > 1:
        prompt = chosen[:-1]
    elif prompt is None:
        raise RowError("prompt", "is missing, and chosen is an answer without its prompt — add it")
    result: dict[str, Any] = {} if pair.prompt_id is None else {"id": pair.prompt_id}
    result |= {"prompt": prompt, "reference": "", "chosen": chosen[-1:], "rejected": rejected[-1:]}
    if pair.score_chosen is not None and pair.score_rejected is not None:
        margin = pair.score_chosen - pair.score_rejected
        if margin < 0:
            raise RowError("score_rejected", "is above score_chosen — which answer is the better one?")
        if margin == 0:
            return Converted([], {TIED: 1})
        result |= {"margin": margin, "chosen_score": pair.score_chosen, "rejected_score": pair.score_rejected}
    return Converted([result | pair.rest()])


def _turns(answer: str | list[Turn], key: str) -> list[dict[str, str]]:
    turns = messages([Turn(role="assistant", content=answer)] if isinstance(answer, str) else answer)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError(key, "does not end with a message of the assistant — there is no answer to rank")
    return turns


def _refuse_other_prompt(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> None:
    if chosen[:-1] == rejected[:-1]:
        return
    turn = next(
        (i for i, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if a != b),
        min(len(chosen), len(rejected)) - 1,
    )
    raise RowError(
        "rejected",
        f"has another prompt than chosen from turn {turn + 1} on — mend it or leave the row out",
    )


def _parse_dialogue(row: Mapping[str, Any], key: str) -> list[dict[str, str]]:
    text = row.get(key)
    if not isinstance(text, str):
        raise RowError(
            key, "is missing or not a string — an hh-rlhf row has a dialogue in chosen and rejected"
        )
    before, *parts = _SPEAKER.split(text if text.startswith("\n") else f"\n\n{text}")
    if before.strip() or not parts:
        raise RowError(key, r'does not begin with "\n\nHuman:" — is this an hh-rlhf dialogue?')
    turns = [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(
            key, r'does not end with a turn of "\n\nAssistant:" after a prompt — there is no answer to rank'
        )
    return turns
