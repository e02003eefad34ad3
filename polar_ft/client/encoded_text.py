"""What a caller gives, as token ids; and the strings that `RewardModelClient.encode` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any, TypeVar

import numpy as np

from polar_ft.errors import PolarError
from polar_ft.scoring.rows import ScoreRow, groups_of, parse_score_rows
from polar_ft.template import EncodedParts, Fields, PolarTemplate


class EncodedText(str):
    """A text to be scored, spelled as the published client spells it, that carries its token ids.

    The ids are what the client sends. The spelling is for reading, and for a tokenizer that is called by
    hand; there a text that spells a control token becomes one, among the ids it does not. String operations
    give a plain string, without ids.

    >>> text = EncodedText("2 + 2?\\n4<|reward|>2 + 2?\\nfour[UNUSED_TOKEN_130]", np.array([1, 7, 9]))
    >>> text.ids, type(text.strip()).__name__
    ([1, 7, 9], 'str')
    """

    array: np.ndarray

    def __new__(cls, text: str, array: np.ndarray) -> EncodedText:
        """A text with its ids, `[tokens]`."""
        self = super().__new__(cls, text)
        self.array = array
        return self

    @property
    def ids(self) -> list[int]:
        """Token ids, from BOS to the reward token."""
        return self.array.tolist()

    def __reduce__(self) -> tuple[type[EncodedText], tuple[str, np.ndarray]]:
        return type(self), (str(self), self.array)


@dataclass(frozen=True, slots=True)
class Checked:
    """An element of the data that has the right form.

    Attributes:
        number: Its index in the data.
        text: The element, where it is a string.
        row: Its fields, where it is a dict; of a string empty.
    """

    number: int
    text: str | None
    row: ScoreRow


def check(data: Iterable[Any]) -> Iterator[Checked]:
    """Checks the elements of the data as they come.

    Args:
        data: Dicts of prompt, reference, output and perhaps wrapper; strings that are an `EncodedText` or are
            spelled like one; or both.

    Raises:
        DataError: An element is neither; names it and the field.
    """
    elements, others = tee(data)
    # A string keeps its place among the rows, so that an error names an element by its index.
    nothing = {"prompt": "", "reference": "", "output": ""}
    rows = parse_score_rows(nothing if isinstance(element, str) else element for element in elements)
    for number, (row, element) in enumerate(zip(rows, others, strict=True)):
        yield Checked(number, element if isinstance(element, str) else None, row)


def encode_texts(template: PolarTemplate, elements: Sequence[Checked]) -> tuple[list[EncodedText], int]:
    """Texts with ids; otherwise as `encode_ids`."""

    def spell(fields: Fields, parts: EncodedParts, candidate: int, ids: np.ndarray) -> EncodedText:
        prompt, reference, candidates, wrapper = fields

        def join(response: str) -> str:
            return f"{prompt}{response}" if wrapper == "pretrain" or not response else f"{prompt}\n{response}"

        left, right = join(reference), join(candidates[candidate])
        if parts.cut:
            left = template.decode(parts.head[len(template.bos_ids) : -1].tolist())
            right = template.decode(parts.tails[candidate][:-1].tolist())
        return EncodedText(f"{left}{template.separator}{right}{template.reward_token}", ids)

    return _encode(template, elements, spell, EncodedText)


def encode_ids(template: PolarTemplate, elements: Sequence[Checked]) -> tuple[list[np.ndarray], int]:
    """Token ids of what `check` gave.

    Returns:
        Int32 arrays, `[inputs][tokens]`, in the order of the elements; and of how many something was cut.

    Raises:
        PolarError: An element cannot be encoded; names it.
    """
    return _encode(
        template, elements, lambda fields, parts, candidate, ids: ids, lambda text, ids: np.asarray(ids)
    )


Item = TypeVar("Item")


def _encode(
    template: PolarTemplate,
    elements: Sequence[Checked],
    of_fields: Callable[[Fields, EncodedParts, int, np.ndarray], Item],
    of_text: Callable[[str, np.ndarray], Item],
) -> tuple[list[Item], int]:
    placed: dict[int, Item] = {}
    dicts = [place for place, element in enumerate(elements) if element.text is None]
    fields, members = groups_of(elements[place].row for place in dicts)
    n_cut = 0
    for group, indices, parts in zip(
        fields,
        members,
        _parts(template, fields, [elements[dicts[m[0]]].number for m in members]),
        strict=True,
    ):
        for candidate, (index, tail) in enumerate(zip(indices, parts.tails, strict=True)):
            ids = np.concatenate([parts.head, tail])
            placed[dicts[index]] = of_fields(group, parts, candidate, ids)
            n_cut += bool(parts.cut.prompt or parts.cut.reference or parts.cut.candidates[candidate])
    for place, element in enumerate(elements):
        if element.text is not None:
            placed[place] = of_text(element.text, _ids_of_text(template, element.text, element.number))
    return [placed[place] for place in range(len(elements))], n_cut


def _parts(template: PolarTemplate, fields: Sequence[Fields], numbers: Sequence[int]) -> list[EncodedParts]:
    try:
        return template.encode_parts(fields)
    except PolarError:
        # The template knows texts, not elements: one by one shows which it is.
        for field, number in zip(fields, numbers, strict=True):
            try:
                template.encode_parts([field])
            except PolarError as error:
                raise PolarError(f"data[{number}]: {error}") from None
        raise


def _ids_of_text(template: PolarTemplate, text: str, number: int) -> np.ndarray:
    """Ids of a text that `encode` gave, or of one that is spelled like it.

    A plain string has lost its ids (it was stored, or changed). It is tokenized as an engine would, so that
    control tokens spelled in it become control tokens; it has to have those of a POLAR input, and no more of
    them.
    """
    if isinstance(text, EncodedText):
        return text.array
    ids = template.tokenizer.encode(text, add_special_tokens=True).ids
    if ids.count(template.separator_id) != 1 or ids[-1:] != [template.reward_token_id]:
        raise PolarError(
            f"data[{number}]: is no encoded text, which has {template.separator!r} once and ends in "
            f"{template.reward_token!r}; give a dict with prompt, reference and output, or what encode() gave"
        )
    if len(ids) > template.max_length:
        raise PolarError(
            f"data[{number}]: has {len(ids)} tokens, more than max_length={template.max_length}; give a dict "
            f"with prompt, reference and output, which is cut as in training"
        )
    return np.array(ids, dtype=np.int32)
