"""The elements of a caller's data as token ids, and the strings that `RewardModelClient.encode` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from polar_ft.data.score_rows import parse_element
from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup, merge_texts
from polar_ft.template import EncodeError, PolarTemplate


class EncodedText(str):
    """A text to score, spelled as the published client spells it, together with its token ids.

    The client sends the ids. The spelling is for reading and for calling a tokenizer by hand; such a
    tokenizer would make a control token of a text that spells one, which the ids never do. String operations
    return a plain string, without ids.

    >>> text = EncodedText("2 + 2?\\n4<|reward|>2 + 2?\\nfour[UNUSED_TOKEN_130]", np.array([1, 7, 9]))
    >>> text.ids, type(text.strip()).__name__
    ([1, 7, 9], 'str')
    """

    array: np.ndarray

    def __new__(cls, text: str, array: np.ndarray) -> EncodedText:
        """Makes a text with its ids, int32 array [tokens]."""
        self = super().__new__(cls, text)
        self.array = array
        return self

    @property
    def ids(self) -> list[int]:
        """Token ids, from BOS to the reward token."""
        return self.array.tolist()

    def __reduce__(self) -> tuple[type[EncodedText], tuple[str, np.ndarray]]:
        return type(self), (str(self), self.array)


def parse_elements(data: Iterable[Any]) -> Iterator[str | TextGroup]:
    """Checks the elements of the data as they are read.

    Args:
        data: Dicts of prompt, reference, output and an optional wrapper; strings, which are an `EncodedText`
            or are spelled like one; or both.

    Yields:
        For a dict its texts, a group of one candidate; a string as it is.

    Raises:
        DataError: An element is neither; names it by its index, and the field.

    >>> list(parse_elements(["a<|reward|>b[UNUSED_TOKEN_130]"]))
    ['a<|reward|>b[UNUSED_TOKEN_130]']
    """
    for index, element in enumerate(data):
        yield element if isinstance(element, str) else parse_element(index, element)


@dataclass(frozen=True, slots=True)
class EncodedElement:
    """An element of the data as token ids.

    Attributes:
        ids: From BOS to the reward token, int32 array [tokens].
        spell: Gives the same as text; see `PolarTemplate.spell`.
        is_cut: Whether something was cut off.
    """

    ids: np.ndarray
    spell: Callable[[], str]
    is_cut: bool

    @property
    def text(self) -> EncodedText:
        """The text with its ids."""
        return EncodedText(self.spell(), self.ids)


def encode_elements(
    template: PolarTemplate, elements: Sequence[str | TextGroup], first: int = 0
) -> list[EncodedElement]:
    """Encodes what `parse_elements` gave, in the same order.

    Args:
        template: The model's template.
        elements: What to encode.
        first: Index of the first of them in the data, for errors.

    Raises:
        PolarError: An element cannot be encoded; names it.
    """
    placed: dict[int, EncodedElement] = {}
    groups = {place: element for place, element in enumerate(elements) if isinstance(element, TextGroup)}
    places = list(groups)
    merged = merge_texts(list(groups.values()))
    try:
        encoded = template.encode([texts.group for texts in merged])
    except EncodeError as error:
        number, _ = merged[error.index].members[0]
        raise PolarError(f"data[{first + places[number]}]: {error}") from None
    for texts, group in zip(merged, encoded, strict=True):
        sequences = group.sequences
        for number, (candidate,) in texts.members:
            placed[places[number]] = EncodedElement(
                ids=sequences[candidate],
                spell=partial(template.spell, texts.group, group, candidate),
                is_cut=group.cut.of(candidate),
            )
    for place, element in enumerate(elements):
        if isinstance(element, str):
            ids = _ids_of_text(template, element, first + place)
            placed[place] = EncodedElement(ids, partial(str, element), is_cut=False)
    return [placed[place] for place in range(len(elements))]


def _ids_of_text(template: PolarTemplate, text: str, number: int) -> np.ndarray:
    """Ids of an `EncodedText`, or of a plain string that is spelled like one.

    A plain string has lost its ids, as it was stored or changed. It is tokenized as an engine would do it:
    what spells a control token becomes one. It must have the control tokens of a POLAR input, each once.
    """
    if isinstance(text, EncodedText):
        return text.array
    ids = template.tokenizer.encode(text, add_special_tokens=True).ids
    if ids.count(template.separator_id) != 1 or ids[-1:] != [template.reward_token_id]:
        raise PolarError(
            f"data[{number}]: is no encoded text, which has {template.separator!r} once and ends in "
            f"{template.reward_token!r}; give a dict with prompt, reference and output, or what encode() "
            f"returned"
        )
    if len(ids) > template.max_length:
        raise PolarError(
            f"data[{number}]: has {len(ids)} tokens, more than max_length={template.max_length}; give a dict "
            f"with prompt, reference and output, which is cut as in training"
        )
    return np.array(ids, dtype=np.int32)
