"""Errors that the user can fix.

What the user can fix (a file, a row, a setting) raises a `PolarError`; commands print its message without a
traceback and exit with status 1. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

# Control characters (but tab and line end), halves of surrogate pairs, and what turns the direction of text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class PolarError(Exception):
    """An error that the user can fix; the message names the file, line or field and says what to do."""


class DataError(PolarError):
    """Rows that cannot be used.

    Attributes:
        problems: What is wrong, one entry per row, in the order of the file.
    """

    def __init__(self, message: str, problems: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


def validation_sentences(error: Any, leave_out: Collection[str] = ()) -> list[str]:
    """Turns a pydantic ValidationError into a sentence for each field, without the user's values.

    Args:
        error: The error.
        leave_out: Parts of paths to omit: pydantic's names for the arms of a union.

    >>> from pydantic import BaseModel, ValidationError
    >>> class Turn(BaseModel):
    ...     role: str
    >>> class Row(BaseModel):
    ...     turns: list[Turn]
    >>> try:
    ...     Row.model_validate({"turns": [{"role": 7}]})
    ... except ValidationError as error:
    ...     validation_sentences(error)
    ['turns[0].role: Input should be a valid string']
    """
    sentences = []
    for problem in error.errors():
        path = [part for part in problem["loc"] if part not in leave_out]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"].startswith("union_tag"):  # pydantic would name a function of ours
            reason = "must be a string or a list of messages"
        sentences.append(f"{where}: {reason}" if where else reason)
    return list(dict.fromkeys(sentences))


def printable(text: str) -> str:
    r"""Escapes what must not reach a terminal, or cannot: control characters and halves of surrogate pairs.

    Data and file names may hold either: ESC begins commands to the terminal, and the bytes of a file name
    that is not UTF-8 are halves of surrogate pairs, which no output can encode.

    >>> print(printable("plain \x1b[31mred\x1b[0m, caf\udce9.jsonl"))
    plain \x1b[31mred\x1b[0m, caf\udce9.jsonl
    """
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)
