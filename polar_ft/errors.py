"""The errors that a user can act on.

Everything that is the user's to mend (a file, a row, a setting) is raised as `PolarError`; the commands print
its message without a traceback and exit with status 1. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
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
