"""What a caller gives, as token ids; and the strings that `RewardModelClient.encode` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import numpy as np

from polar_ft.data.score_rows import parse_score_rows
from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup, merge_texts
from polar_ft.template import EncodeError, PolarTemplate


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
        group: Its texts, where it is a dict; of a string empty.
    """

    number: int
    text: str | None
    group: TextGroup


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


@dataclass(frozen=True, slots=True)
class EncodedElement:
    """An element of the data as token ids.

    Attributes:
        ids: From BOS to the reward token, int32 array [tokens].
        spelled: The same as text, see `PolarTemplate.spell`.
        is_cut: Whether something was cut off.
    """

    ids: np.ndarray
    spelled: Callable[[], str]
    is_cut: bool = False

    @property
    def text(self) -> EncodedText:
        """The text with its ids."""
        return EncodedText(self.spelled(), self.ids)


def encode(template: PolarTemplate, elements: Sequence[Checked]) -> list[EncodedElement]:
    """Encodes what `check` gave, in the same order.

    Raises:
        PolarError: An element cannot be encoded; names it.
    """
    placed: dict[int, EncodedElement] = {}
    dicts = [place for place, element in enumerate(elements) if element.text is None]
    merged = merge_texts([elements[place].group for place in dicts])
    try:
        encoded = template.encode([texts.group for texts in merged])
    except EncodeError as error:
        first, _ = merged[error.index].members[0]
        raise PolarError(f"data[{elements[dicts[first]].number}]: {error}") from None
    for texts, group in zip(merged, encoded, strict=True):
        sequences, cut = group.sequences, group.cut
        for number, (candidate,) in texts.members:
            placed[dicts[number]] = EncodedElement(
                sequences[candidate],
                partial(template.spell, texts.group, group, candidate),
                is_cut=bool(cut.prompt or cut.reference or cut.candidates[candidate]),
            )
    for place, element in enumerate(elements):
        if element.text is not None:
            ids = _ids_of_text(template, element.text, element.number)
            placed[place] = EncodedElement(ids, partial(str, element.text))
    return [placed[place] for place in range(len(elements))]


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
