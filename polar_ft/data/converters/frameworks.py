"""Preference data of other training frameworks: LLaMA-Factory, ms-swift, OpenAI, OpenRLHF and TRL.

All layouts were read in the documents and loaders of the frameworks on 2026-11-24.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from polar_ft.data.converters.dialogues import ChatPair, chat_pairs
from polar_ft.data.converters.format import (
    Converted,
    Layout,
    Turn,
    described,
    messages,
    with_extras,
)
from polar_ft.data.records import RowError

_AN_ANSWER = "a text, or a message or list of messages"


class AlpacaPair(Layout):
    """A row of LLaMA-Factory's alpaca layout, "ranking": true."""

    LAYOUT = "llama-factory-alpaca"
    READ = "data/README.md of LLaMA-Factory, 2026-11-24"

    instruction: str = described("a text")
    chosen: str = described("a text")
    rejected: str = described("a text")
    input: str | None = described("a text", default=None)
    system: str | None = described("a text", default=None)
    history: list[list[str]] | None = described("a list of [question, answer]", default=None)


def alpaca_pair(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of LLaMA-Factory's alpaca layout; the reference is empty.

    As there, the question is ``instruction`` and ``input`` with a line break between them, after the turns of
    ``history``.

    Raises:
        RowError: The row has another layout.

    >>> row = {"instruction": "Add.", "input": "2 + 2", "chosen": "4", "rejected": "5"}
    >>> alpaca_pair(row).rows[0]["prompt"]
    [{'role': 'user', 'content': 'Add.\\n2 + 2'}]
    """
    pair = AlpacaPair.of(row)
    turns = []
    for exchange in pair.history or []:
        if len(exchange) != 2:
            raise RowError("history", "has an entry that is not [question, answer]")
        turns += [_turn("user", exchange[0]), _turn("assistant", exchange[1])]
    turns.append(_turn("user", "\n".join(text for text in (pair.instruction, pair.input) if text)))
    return _pair(pair, turns, [_turn("assistant", pair.chosen)], [_turn("assistant", pair.rejected)])


class SharegptPair(Layout):
    """A row of LLaMA-Factory's sharegpt layout, "ranking": true."""

    LAYOUT = "llama-factory-sharegpt"
    READ = "data/README.md and data/dpo_en_demo.json of LLaMA-Factory, 2026-11-24"

    conversations: list[Turn] = described("a list of messages with from and value")
    chosen: Turn = described("a message with from and value")
    rejected: Turn = described("a message with from and value")
    system: str | None = described("a text", default=None)


def sharegpt_pair(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of LLaMA-Factory's sharegpt layout; the reference is empty.

    Raises:
        RowError: The row has another layout.

    >>> turn = lambda speaker, text: {"from": speaker, "value": text}
    >>> row = {"conversations": [turn("human", "Hi")], "chosen": turn("gpt", "Hello!"),
    ...        "rejected": turn("gpt", "Go.")}
    >>> sharegpt_pair(row).rows[0]["chosen"]
    [{'role': 'assistant', 'content': 'Hello!'}]
    """
    pair = SharegptPair.of(row)
    return _pair(pair, messages(pair.conversations), messages([pair.chosen]), messages([pair.rejected]))


class FactoryPair(Layout):
    """A row of LLaMA-Factory's v1 layout."""

    LAYOUT = "llama-factory-v1"
    READ = "data/v1_dpo_demo.jsonl of LLaMA-Factory, 2026-11-24"

    chosen_messages: list[Turn] = described("a list of messages that ends with the better answer")
    rejected_messages: list[Turn] = described("a list of messages that ends with the worse answer")


def factory_pair(row: Mapping[str, Any]) -> Converted:
    """Converts two dialogues of LLaMA-Factory's v1 layout as `chat_pairs` does; the reference is empty.

    Raises:
        RowError: The row has another layout, or the dialogues have not the same prompt.

    >>> dialogue = lambda answer: [{"role": "user", "content": [{"type": "text", "value": "Hi"}]},
    ...                            {"role": "assistant", "content": [{"type": "text", "value": answer}]}]
    >>> row = {"chosen_messages": dialogue("Hello!"), "rejected_messages": dialogue("Go.")}
    >>> factory_pair(row).rows[0]["rejected"]
    [{'role': 'assistant', 'content': 'Go.'}]
    """
    pair = FactoryPair.of(row)
    dialogues = {"chosen": messages(pair.chosen_messages), "rejected": messages(pair.rejected_messages)}
    (converted,) = chat_pairs(dialogues).rows
    return Converted([with_extras(converted, pair.rest())])


class SwiftPair(Layout):
    """A row of ms-swift for DPO or a reward model."""

    LAYOUT = "ms-swift"
    READ = "Custom-dataset.md and swift/template/template_inputs.py of ms-swift, 2026-11-24"

    messages: list[Turn] = described("a list of messages that ends with the better answer")
    rejected_response: str | list[Turn] | None = described(_AN_ANSWER, default=None)
    rejected_messages: list[Turn] | None = described(
        "a list of messages that ends with the worse answer", default=None
    )
    system: str | None = described("a text", default=None)


def swift_pair(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of ms-swift; the reference is empty.

    As there, the better answer is all that follows the last question in ``messages``, and
    ``rejected_response`` (a text, or messages) stands in its place. ``rejected_messages`` is a complete
    dialogue.

    Raises:
        RowError: The row has another layout, or has no answer.

    >>> dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> pair = swift_pair({"messages": dialogue, "rejected_response": "Go."}).rows[0]
    >>> pair["prompt"], pair["rejected"]
    ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Go.'}])
    """
    pair = SwiftPair.of(row)
    turns = messages(pair.messages)
    at = _after_last_question(turns)
    if pair.rejected_messages is not None:
        if pair.rejected_response is not None:
            raise RowError("rejected_messages", "is given together with rejected_response — keep one of them")
        rejected = messages(pair.rejected_messages)
        if rejected[:at] != turns[:at]:
            raise RowError("rejected_messages", "has another prompt than messages — correct or drop it")
        rejected = rejected[at:]
    elif pair.rejected_response is None:
        raise RowError("rejected_response", "is missing — without a worse answer there is no pair")
    else:
        answer = pair.rejected_response
        rejected = [_turn("assistant", answer)] if isinstance(answer, str) else messages(answer)
    for key, side in (("messages", turns[at:]), ("rejected_response", rejected)):
        if not side or side[-1]["role"] != "assistant":
            raise RowError(key, "does not end with a message of the assistant — there is no answer to rank")
    return _pair(pair, turns[:at], turns[at:], rejected)


def _after_last_question(turns: Sequence[Mapping[str, str]]) -> int:
    questions = [at for at, turn in enumerate(turns) if turn["role"] == "user"]
    if not questions:
        raise RowError("messages", "has no message of the user — there is no prompt")
    return questions[-1] + 1


class OpenaiPair(Layout):
    """A line of a preference file for OpenAI's fine-tuning."""

    LAYOUT = "openai"
    READ = "OpenAI's guide to direct preference optimization, 2026-11-24"

    input: dict[str, Any] = described('an object with "messages"')
    preferred_output: list[Turn] = described("a list of messages")
    non_preferred_output: list[Turn] = described("a list of messages")


class _Prompt(Layout):
    LAYOUT = "the input of openai"
    READ = OpenaiPair.READ

    messages: list[Turn] = described("a list of messages")


def openai_pair(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of OpenAI's preference fine-tuning; the reference is empty.

    Raises:
        RowError: The row has another layout.

    >>> answer = lambda text: [{"role": "assistant", "content": text}]
    >>> row = {"input": {"messages": [{"role": "user", "content": "Hi"}]},
    ...        "preferred_output": answer("Hello!"), "non_preferred_output": answer("Go.")}
    >>> openai_pair(row).rows[0]["chosen"]
    [{'role': 'assistant', 'content': 'Hello!'}]
    """
    pair = OpenaiPair.of(row)
    prompt = _Prompt.of(pair.input)
    answers = messages(pair.preferred_output), messages(pair.non_preferred_output)
    (converted,) = _pair(pair, messages(prompt.messages), *answers).rows
    settings = {key: value for key, value in prompt.rest().items() if value != []}  # such as its tools
    return Converted([with_extras(converted, {"input": settings} if settings else {})])


def preference(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of TRL or OpenRLHF, in every form that they read; the reference is the row's, or empty.

    Lists of messages, or texts after a ``prompt``, are read as `chat_pairs` reads them. Of two texts without
    a prompt the prompt is what both begin with, up to the end of a word.

    Raises:
        RowError: The row has another layout, or there is no prompt.

    >>> pair = preference({"chosen": "The sky is great.", "rejected": "The sky is grey."}).rows[0]
    >>> pair["prompt"], pair["chosen"], pair["rejected"]
    ('The sky is', 'great.', 'grey.')
    """
    pair = ChatPair.of(row)
    if pair.prompt is not None or not (isinstance(pair.chosen, str) and isinstance(pair.rejected, str)):
        return chat_pairs(row)
    at = _end_of_prompt(pair.chosen, pair.rejected)
    prompt, chosen, rejected = pair.chosen[:at], pair.chosen[at:], pair.rejected[at:]
    if not prompt.strip():
        raise RowError(
            "prompt", "is missing, and chosen and rejected do not begin with the same one — add it"
        )
    result: dict[str, Any] = {"prompt": prompt.rstrip(), "reference": pair.reference or ""}
    result |= {"chosen": chosen.lstrip(), "rejected": rejected.lstrip()}
    return Converted([with_extras(result, pair.rest())], guessed=True)


def _end_of_prompt(chosen: str, rejected: str) -> int:
    """Number of characters that two texts share, without the beginning of a word that differs later."""
    shortest = min(len(chosen), len(rejected))
    at = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    while at and any(_in_a_word(text, at) for text in (chosen, rejected)):
        at -= 1
    return at


def _in_a_word(text: str, at: int) -> bool:
    # Scripts from Chinese on are written without spaces: a word can end after every character.
    return at < len(text) and all(char.isalnum() and char < "\u2e80" for char in text[at - 1 : at + 1])


class UnpairedAnswer(Layout):
    """A row of TRL's unpaired preferences: one answer, which is good or bad."""

    LAYOUT = "trl-unpaired"
    READ = "docs/source/dataset_formats.md of TRL, 2026-11-24"

    prompt: str | list[Turn] = described("a text or a list of messages")
    completion: str | list[Turn] = described("a text, or a list of messages")
    label: bool = described("true or false")


def unpaired(rows: Sequence[Mapping[str, Any]]) -> Converted:
    """Converts the answers to one prompt, each labelled good or bad, to a ranked row; the reference is empty.

    Raises:
        RowError: A row has another layout.

    >>> rows = [{"prompt": "2 + 2?", "completion": text, "label": text == "4"} for text in "45"]
    >>> [(answer["content"], answer["score"]) for answer in unpaired(rows).rows[0]["responses"]]
    [('4', 1.0), ('5', 0.0)]
    """
    answers = [UnpairedAnswer.of(row) for row in rows]
    good, bad = ([answer for answer in answers if answer.label is wanted] for wanted in (True, False))
    if not good or not bad:
        return Converted([], {})
    responses = []
    for answer in good + bad:
        text = answer.completion
        of_text = {"content": text} if isinstance(text, str) else {"messages": messages(text)}
        responses.append({**of_text, "score": float(answer.label), "correct": answer.label})
    prompt = answers[0].prompt
    row = {"prompt": prompt if isinstance(prompt, str) else messages(prompt), "reference": ""}
    return Converted([with_extras(row | {"responses": responses}, answers[0].rest())])


def unpaired_prompt(row: Mapping[str, Any]) -> Hashable:
    """The prompt of a row of unpaired preferences."""
    return json.dumps(row.get("prompt"), sort_keys=True)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _pair(
    layout: Layout, prompt: list[dict[str, str]], chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> Converted:
    """A pair row with an empty reference; the layout's text in ``system`` becomes the first message."""
    system, extras = getattr(layout, "system", None), layout.rest()
    # As in LLaMA-Factory and ms-swift, a system message of the dialogue goes before the column.
    if system and not (prompt and prompt[0]["role"] == "system"):
        prompt = [_turn("system", system), *prompt]
    elif system and system != prompt[0]["content"]:
        extras["system"] = system
    if not prompt:
        raise RowError("", "has no prompt — add it, or leave the row out")
    pair = {"prompt": prompt, "reference": "", "chosen": chosen, "rejected": rejected}
    return Converted([with_extras(pair, extras)])
