"""What is scored, in the form of the published quick start: dicts of prompt, reference and output.

    {"prompt": ..., "reference": ..., "output": ..., "wrapper": "sft"}

Each text is a string or a list of ``{"role", "content"}`` messages; ``wrapper`` may be left out. Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from polar_ft.data.records import Text, Wrapper, text_of
from polar_ft.errors import DataError
from polar_ft.template import Fields


class _Row(BaseModel):
    # Strict: a number where a text belongs is a mistake, not something to convert quietly.
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    reference: Text
    output: Text
    wrapper: Wrapper = "sft"


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One candidate of one (prompt, reference), as texts."""

    prompt: str
    reference: str
    output: str
    wrapper: Wrapper = "sft"

    @property
    def chars(self) -> int:
        """Characters that the model reads: the prompt stands before the reference and before the output."""
        return 2 * len(self.prompt) + len(self.reference) + len(self.output)


def parse_score_rows(data: Iterable[Any]) -> Iterator[ScoreRow]:
    """Checks rows as they come.

    Raises:
        DataError: A row cannot be scored; names it by its index, and the field.

    >>> rows = [{"prompt": [{"role": "user", "content": "2 + 2?"}], "reference": "4", "output": "four"}]
    >>> next(parse_score_rows(rows))
    ScoreRow(prompt='2 + 2?', reference='4', output='four', wrapper='sft')
    >>> next(parse_score_rows([{"prompt": "2 + 2?", "reference": "4"}]))
    Traceback (most recent call last):
    ...
    polar_ft.errors.DataError: data[0].output: Field required
    """
    for index, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise DataError(
                f'data[{index}]: is a {type(row).__name__}, not a dict of "prompt", "reference" and "output"'
            )
        try:
            fields = _Row.model_validate(row)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            # The names that pydantic gives the arms of Text are not in the row.
            path = [part for part in problem["loc"] if part not in ("string", "messages")]
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
            # pydantic would name a function of ours.
            tag = problem["type"].startswith("union_tag")
            reason = "must be a string or a list of messages" if tag else problem["msg"]
            raise DataError(f"data[{index}]{where}: {reason}") from None
        yield ScoreRow(
            text_of(fields.prompt), text_of(fields.reference), text_of(fields.output), fields.wrapper
        )


def windows(rows: Iterable[ScoreRow], chars: int) -> Iterator[list[ScoreRow]]:
    """Rows in order, cut where a window has ``chars`` characters, so that memory does not grow with the data.

    >>> rows = [ScoreRow("", "", text) for text in ("abc", "de", "f")]
    >>> [[row.output for row in window] for window in windows(rows, 4)]
    [['abc', 'de'], ['f']]
    """
    window: list[ScoreRow] = []
    size = 0
    for row in rows:
        window.append(row)
        size += row.chars
        if size >= chars:
            yield window
            window, size = [], 0
    if window:
        yield window


def groups_of(rows: Iterable[ScoreRow]) -> tuple[list[Fields], list[list[int]]]:
    """Rows of one (prompt, reference) together.

    Returns:
        The fields that a template encodes, and for each the indices of the rows that its candidates are.

    >>> rows = [ScoreRow("p", "r", "a"), ScoreRow("q", "r", "b"), ScoreRow("p", "r", "c")]
    >>> groups_of(rows)
    ([('p', 'r', ['a', 'c'], 'sft'), ('q', 'r', ['b'], 'sft')], [[0, 2], [1]])
    """
    members: dict[tuple[str, str, Wrapper], list[tuple[int, str]]] = {}
    for index, row in enumerate(rows):
        members.setdefault((row.prompt, row.reference, row.wrapper), []).append((index, row.output))
    fields: list[Fields] = [
        (prompt, reference, [text for _, text in group], wrapper)
        for (prompt, reference, wrapper), group in members.items()
    ]
    return fields, [[index for index, _ in group] for group in members.values()]
