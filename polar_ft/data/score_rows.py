"""Rows to score, in the form of the published quick start: dicts of prompt, reference and output.

    {"prompt": ..., "reference": ..., "output": ..., "wrapper": "sft"}

Each text is a string or a list of ``{"role", "content"}`` messages; ``wrapper`` is optional.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from polar_ft.data.records import RowError, Text, text_of
from polar_ft.errors import DataError, validation_sentences
from polar_ft.groups import TextGroup, Wrapper

# Fields of rows to train on, which have several answers.
_OTHER_FORMS = ("chosen", "rejected", "candidates", "responses")


class _Row(BaseModel):
    # Strict: a number in place of a text is a mistake and is not converted silently.
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    reference: Text
    output: Text
    wrapper: Wrapper = "sft"


def parse_score_row(row: Any) -> TextGroup:
    """Checks a row and makes a group of one candidate from it.

    Raises:
        RowError: The row cannot be scored; names the field.

    >>> row = {"prompt": [{"role": "user", "content": "2 + 2?"}], "reference": "4", "output": "four"}
    >>> parse_score_row(row)  # doctest: +ELLIPSIS
    TextGroup(prompt='2 + 2?', references=('4',), candidates=('four',), wrapper='sft', ...)
    """
    if not isinstance(row, Mapping):
        raise RowError("", f'is a {type(row).__name__}, not a dict of "prompt", "reference" and "output"')
    if "output" not in row and (others := [name for name in _OTHER_FORMS if name in row]):
        raise RowError(
            "",
            f"has {' and '.join(others)}; a row to score has one answer, as output: make a row of prompt, "
            f"reference and output of each answer",
        )
    try:
        fields = _Row.model_validate(dict(row))
    except ValidationError as error:
        first = validation_sentences(error, leave_out=("string", "messages"))[0]
        field, _, reason = first.partition(": ")
        raise RowError(field, reason) from None
    return TextGroup(
        prompt=text_of(fields.prompt),
        references=(text_of(fields.reference),),
        candidates=(text_of(fields.output),),
        wrapper=fields.wrapper,
    )


def parse_element(index: int, element: Any) -> TextGroup:
    """Checks an element of the data that a caller gave, as `parse_score_row` does.

    Raises:
        DataError: The element cannot be scored; names it by its index, and the field.

    >>> parse_element(7, {"prompt": "2 + 2?", "reference": "4"})
    Traceback (most recent call last):
    ...
    polar_ft.errors.DataError: data[7].output: Field required
    """
    try:
        return parse_score_row(element)
    except RowError as error:
        name = f"data[{index}].{error.field}" if error.field else f"data[{index}]"
        raise DataError(f"{name}: {error.reason}") from None


def parse_score_rows(data: Iterable[Any]) -> Iterator[TextGroup]:
    """Checks rows one by one as they are read; each becomes a group of one candidate.

    Raises:
        DataError: A row cannot be scored; names it by its index, and the field.
    """
    return (parse_element(index, row) for index, row in enumerate(data))
