"""The errors that a user can act on.

Everything that is the user's to mend (a file, a row, a setting) is raised as `PolarError`; the commands print
its message without a traceback and exit with status 1. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


class PolarError(Exception):
    """Something the user can mend; the message names the file, line or field and says what to do."""


class DataError(PolarError):
    """Rows that cannot be used.

    Attributes:
        problems: What is wrong, one entry a row, in the order of the file.
    """

    def __init__(self, message: str, problems: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


def validation_sentences(error: Any, leave_out: Collection[str] = ()) -> list[str]:
    """What a pydantic ValidationError found, a sentence for each field, without what the user gave.

    Args:
        error: The error.
        leave_out: Parts of paths that are pydantic's names for the arms of a union.

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
