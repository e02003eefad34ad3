"""Rows to be scored, in the form of the published quick start: dicts of prompt, reference and output.

    {"prompt": ..., "reference": ..., "output": ..., "wrapper": "sft"}

Each text is a string or a list of ``{"role", "content"}`` messages; ``wrapper`` may be left out. Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from polar_ft.data.records import Text, text_of
from polar_ft.errors import DataError, validation_sentences
from polar_ft.groups import TextGroup, Wrapper


class _Row(BaseModel):
    # Strict: a number where a text belongs is a mistake, not something to convert quietly.
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    reference: Text
    output: Text
    wrapper: Wrapper = "sft"


def parse_score_rows(data: Iterable[Any]) -> Iterator[TextGroup]:
    """Checks rows as they come; each becomes a group of one candidate.

    Raises:
        DataError: A row cannot be scored; names it by its index, and the field.

    >>> rows = [{"prompt": [{"role": "user", "content": "2 + 2?"}], "reference": "4", "output": "four"}]
    >>> next(parse_score_rows(rows))  # doctest: +ELLIPSIS
    TextGroup(prompt='2 + 2?', references=('4',), candidates=('four',), wrapper='sft', ...)
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
            first = validation_sentences(error, leave_out=("string", "messages"))[0]
            raise DataError(f"data[{index}].{first}") from None
        yield TextGroup(
            prompt=text_of(fields.prompt),
            references=(text_of(fields.reference),),
            candidates=(text_of(fields.output),),
            wrapper=fields.wrapper,
        )
