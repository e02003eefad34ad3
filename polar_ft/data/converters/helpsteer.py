"""NVIDIA's HelpSteer2 (arXiv 2406.08673, preferences 2410.01257) and HelpSteer3 (arXiv 2505.11475)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from polar_ft.data.converters.format import TIED, Converted, Layout, Turn, described, messages, with_extras

ONE_ANSWER = "of prompts with one answer"
_STRENGTH = "a number from -3 (the first response is much better) to 3 (the second is)"
_REMARKS = (
    "preference_statement",
    "preference_elaboration",
    "three_most_similar_preferences",
    "all_preferences_unprocessed",
)
# How HelpSteer2 writes a prompt of several turns into one string.
_SPEAKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


class HelpSteer2Row(Layout):
    """A row of preference/preference.jsonl.gz of nvidia/HelpSteer2."""

    LAYOUT = "helpsteer2"
    READ = "card of nvidia/HelpSteer2, 2026-11-21"

    prompt: str = described("a text")
    response_1: str = described("a text")
    response_2: str = described("a text")
    preference_strength: float = described(_STRENGTH)


class HelpSteer2Rating(Layout):
    """A row of train.jsonl.gz or validation.jsonl.gz of nvidia/HelpSteer2: one answer with its ratings."""

    LAYOUT = "helpsteer2-ratings"
    READ = "card of nvidia/HelpSteer2, 2026-11-24"

    prompt: str = described("a text")
    response: str = described("a text")
    helpfulness: float = described("a number from 0 to 4")
    correctness: float | None = described("a number from 0 to 4", default=None)
    coherence: float | None = described("a number from 0 to 4", default=None)
    complexity: float | None = described("a number from 0 to 4", default=None)
    verbosity: float | None = described("a number from 0 to 4", default=None)


class HelpSteer3Row(Layout):
    """A row of the configuration preference of nvidia/HelpSteer3."""

    LAYOUT = "helpsteer3"
    READ = "card of nvidia/HelpSteer3, 2026-11-21"

    context: list[Turn] = described("a list of messages")
    response1: str = described("a text")
    response2: str = described("a text")
    overall_preference: float = described(_STRENGTH)
    domain: str | None = described("a string", default=None)


def helpsteer2(row: Mapping[str, Any]) -> Converted:
    r"""Converts a preference of HelpSteer2; the reference is empty, and a strength of 0 is a tie, dropped.

    The strength is the margin; the remarks of the annotators are not kept. Written from the data card,
    without access to the file.

    Raises:
        RowError: The row has another layout.

    >>> prompt = "Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\n2+2?"
    >>> row = {"prompt": prompt, "response_1": "4", "response_2": "5", "preference_strength": -2}
    >>> pair = helpsteer2(row).rows[0]
    >>> [turn["content"] for turn in pair["prompt"]], pair["chosen"], pair["margin"]
    (['Hi', 'Hello!', '2+2?'], '4', 2.0)
    """
    pair = HelpSteer2Row.of(row)
    prompt = _turns(pair.prompt)
    return _pair(prompt, pair.response_1, pair.response_2, pair.preference_strength, pair.rest(*_REMARKS))


def same_question(row: Mapping[str, Any]) -> Hashable:
    """Key that is equal for the rated answers of one prompt.

    Raises:
        RowError: The row has another layout.
    """
    return HelpSteer2Rating.of(row).prompt


def helpsteer2_ratings(rows: Sequence[Mapping[str, Any]]) -> Converted:
    """Converts the rated answers of one prompt of HelpSteer2 to a ranked row; the reference is empty.

    Helpfulness is the score; the other ratings of an answer are kept, and further fields of the first row. A
    prompt whose answers are equally helpful, or that has only one, gives nothing. HelpSteer has the same
    layout. Written from the data card, without access to the files.

    Args:
        rows: All rows of the prompt.

    Raises:
        RowError: A row has another layout.

    >>> rows = [{"prompt": "2+2?", "response": text, "helpfulness": good, "verbosity": 1}
    ...         for text, good in (("4", 4), ("5", 0))]
    >>> done = helpsteer2_ratings(rows).rows[0]
    >>> done["responses"][0]
    {'content': '4', 'score': 4.0, 'verbosity': 1.0}
    >>> helpsteer2_ratings(rows[:1]).left_out
    {'of prompts with one answer': 1}
    """
    answers = [HelpSteer2Rating.of(row) for row in rows]
    if len(answers) < 2:
        return Converted([], {ONE_ANSWER: 1})
    if len({answer.helpfulness for answer in answers}) == 1:
        return Converted([], {TIED: len(answers) - 1})
    ratings = {"correctness", "coherence", "complexity", "verbosity"}
    responses = [
        {"content": answer.response, "score": answer.helpfulness}
        | answer.model_dump(include=ratings, exclude_none=True)
        for answer in answers
    ]
    result = {"prompt": _turns(answers[0].prompt), "reference": "", "responses": responses}
    return Converted([with_extras(result, answers[0].rest())])


def _turns(prompt: str) -> list[dict[str, str]]:
    first, *others = _SPEAKER.split(prompt)
    return [{"role": "user", "content": first}] + [
        {"role": speaker.lower(), "content": content}
        for speaker, content in zip(others[::2], others[1::2], strict=True)
    ]


def helpsteer3(row: Mapping[str, Any]) -> Converted:
    """Converts a preference of HelpSteer3; the reference is empty, and a preference of 0 is a tie, dropped.

    The strength is the margin, the domain the subset; the remarks of the annotators are not kept. Written
    from the data card, without access to the files.

    Raises:
        RowError: The row has another layout.

    >>> row = {"context": [{"role": "user", "content": "2+2?"}], "response1": "5", "response2": "4",
    ...        "overall_preference": 3, "domain": "stem", "language": "english"}
    >>> pair = helpsteer3(row).rows[0]
    >>> pair["chosen"], pair["subset"], pair["language"]
    ('4', 'stem', 'english')
    """
    pair = HelpSteer3Row.of(row)
    return _pair(
        messages(pair.context),
        pair.response1,
        pair.response2,
        pair.overall_preference,
        pair.rest("individual_preference"),
        subset=pair.domain,
    )


def _pair(
    prompt: list[dict[str, str]],
    first: str,
    second: str,
    strength: float,
    extras: dict[str, Any],
    subset: str | None = None,
) -> Converted:
    if strength == 0:
        return Converted([], {TIED: 1})
    chosen, rejected = (first, second) if strength < 0 else (second, first)
    pair: dict[str, Any] = {} if subset is None else {"subset": subset}
    pair |= {"prompt": prompt, "reference": "", "chosen": chosen, "rejected": rejected}
    return Converted([with_extras(pair | {"margin": abs(strength)}, extras)])
