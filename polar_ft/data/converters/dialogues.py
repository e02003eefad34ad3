"""Pairs of dialogues that differ in their last turn: hh-rlhf, and lists of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from polar_ft.data.converters.format import TIED, Converted, Layout, Turn, described, messages, with_extras
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
    chosen = parse_dialogue(row, "chosen")
    rejected = parse_dialogue(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise _other_prompt(_first_difference(chosen, rejected))
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    pair = {"prompt": chosen[:-1], "reference": "", "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return Converted([with_extras(pair, rest)])


class ChatPair(Layout):
    """A row of UltraFeedback Binarized, Skywork-Reward-Preference, or data made for TRL."""

    LAYOUT = "chat-pairs"
    READ = "cards of HuggingFaceH4/ultrafeedback_binarized and Skywork-Reward-Preference-80K-v0.2, 2026-11-21"

    chosen: str | list[Turn] = described("a text, or a list of messages that ends with the better answer")
    rejected: str | list[Turn] = described("a text, or a list of messages that ends with the worse answer")
    prompt: str | list[Turn] | None = described("a text or a list of messages", default=None)
    system: str | None = described("a text", default=None)
    reference: Any = described("a text or a list of messages", default=None)
    references: Any = described("a list of texts or of lists of messages", default=None)
    messages: Any = described("the same as chosen", default=None)
    prompt_id: str | None = described("a string", default=None)
    score_chosen: float | None = described("a number", default=None)
    score_rejected: float | None = described("a number", default=None)


def chat_pairs(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of dialogues as lists of messages; the reference is the row's own, else empty.

    The prompt is what both dialogues begin with. A field ``prompt`` is put before dialogues that do not begin
    with it, a text in ``system`` becomes the first message. An answer is the last message of the assistant;
    where the dialogues differ earlier, it is all messages from there on (such as a tool call, its result and
    what follows), without one of the user. A pair of equal scores is dropped as a tie.

    Reads HuggingFaceH4/ultrafeedback_binarized (splits train_prefs and test_prefs), Skywork's
    Skywork-Reward-Preference-80K, and the forms that TRL documents. Written from the data cards, without
    access to these files.

    Raises:
        RowError: The row has another layout, the two dialogues do not have the same prompt, ``prompt`` or
            ``system`` contradicts them, or the rejected answer has the higher score.

    >>> turns = lambda answer: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    >>> pair = chat_pairs({"chosen": turns("Hello!"), "rejected": turns("Go."), "source": "mine"}).rows[0]
    >>> pair["prompt"], pair["rejected"], pair["source"]
    ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Go.'}], 'mine')
    >>> row = {"prompt": "Hi", "system": "Be brief.", "chosen": "Hello!", "rejected": "Go."}
    >>> [turn["content"] for turn in chat_pairs(row).rows[0]["prompt"]]
    ['Be brief.', 'Hi']
    """
    pair = ChatPair.of(row)
    chosen, rejected = _dialogue(pair, pair.chosen, "chosen"), _dialogue(pair, pair.rejected, "rejected")
    at = _first_difference(chosen, rejected)
    if any(turn["role"] in ("user", "system") for turn in (*chosen[at:], *rejected[at:])):
        raise _other_prompt(at)
    if at == 0:
        raise RowError("prompt", "is missing, and chosen is an answer without its prompt — add it")
    result: dict[str, Any] = {} if pair.prompt_id is None else {"id": pair.prompt_id}
    result["prompt"] = chosen[:at]
    own = {"reference": pair.reference, "references": pair.references}
    result |= {key: value for key, value in own.items() if value is not None} or {"reference": ""}
    result |= {"chosen": chosen[at:], "rejected": rejected[at:]}
    if pair.score_chosen is not None and pair.score_rejected is not None:
        margin = pair.score_chosen - pair.score_rejected
        if margin < 0:
            raise RowError("score_rejected", "is above score_chosen — which answer is the better one?")
        if margin == 0:
            return Converted([], {TIED: 1})
        result |= {"margin": margin, "chosen_score": pair.score_chosen, "rejected_score": pair.score_rejected}
    return Converted([with_extras(result, pair.rest())])


Turns = list[dict[str, str]]


def _dialogue(pair: ChatPair, answer: str | list[Turn], key: str) -> Turns:
    """A complete dialogue: the system message, the prompt and the answer of one side, each once."""
    turns = messages([Turn(role="assistant", content=answer)] if isinstance(answer, str) else answer)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError(key, "does not end with a message of the assistant — there is no answer to rank")
    if pair.prompt is not None:
        turns = _after_prompt(pair.prompt, turns, key)
    if not pair.system:
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": pair.system}, *turns]
    if turns[0]["content"].strip() != pair.system.strip():
        raise RowError("system", f"is not the system message of {key} — which of the two is meant? Keep one")
    return turns


def _after_prompt(given: str | list[Turn], turns: Turns, key: str) -> Turns:
    """Puts the prompt before the turns of a side, unless they begin with it."""
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else messages(given)
    system = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
    if _begins_with(turns, prompt) or not prompt:
        return turns
    if _begins_with(turns[1:], prompt) and turns[0]["role"] == "system":
        return turns
    if system and _begins_with(turns, prompt[1:]):
        return [*system, *turns]
    if isinstance(given, str) and turns[0]["role"] != "assistant" and any(_same(t, prompt[0]) for t in turns):
        return turns  # a text can be a later question of the dialogue
    # A prompt of only a system message, or one that ends with an answer, is followed by a question.
    if turns[0]["role"] == "system" or (turns[0]["role"] == "user" and prompt[-1]["role"] == "user"):
        raise RowError(
            "prompt",
            f"is not what {key} begins with, which has a prompt of its own — which of the two is meant? "
            "Keep one of them",
        )
    return [*prompt, *turns]


def _begins_with(turns: Turns, prompt: Turns) -> bool:
    """Whether the first turns are the prompt."""
    return 0 < len(prompt) <= len(turns) and all(map(_same, turns, prompt))


def _same(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two turns say the same; white space around them does not matter."""
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def _first_difference(chosen: Turns, rejected: Turns) -> int:
    """Number of turns that two dialogues share, at most all but the last of each."""
    shared = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(shared) if not _same(chosen[i], rejected[i])), shared)


def _other_prompt(at: int) -> RowError:
    return RowError(
        "rejected", f"has another prompt than chosen from turn {at + 1} on — correct it or leave the row out"
    )


def parse_dialogue(row: Mapping[str, Any], key: str) -> Turns:
    r"""The turns of a dialogue in one string, which ends with a turn of the assistant (it may be empty).

    Raises:
        RowError: It is no such dialogue.

    >>> parse_dialogue({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, "prompt")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': ''}]
    """
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
