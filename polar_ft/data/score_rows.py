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
from polar_ft.errors import DataError
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
            problem = error.errors(include_url=False, include_input=False)[0]
            # The names that pydantic gives the arms of Text are not in the row.
            path = [part for part in problem["loc"] if part not in ("string", "messages")]
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
            # pydantic would name a function of ours.
            tag = problem["type"].startswith("union_tag")
            reason = "must be a string or a list of messages" if tag else problem["msg"]
            raise DataError(f"data[{index}]{where}: {reason}") from None
        yield TextGroup(
            prompt=text_of(fields.prompt),
            references=(text_of(fields.reference),),
            candidates=(text_of(fields.output),),
            wrapper=fields.wrapper,
        )
