"""A format: the layout of its rows, and the function that converts them.

A `Layout` lists the fields of rows in a published file. A row with another layout is refused with a message
that says what was expected and what was found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polar_ft.data.messages import plain_message
from polar_ft.data.records import Pairing, RowError, describe

TIED = "of responses that are ranked the same"


@dataclass(frozen=True)
class Converted:
    """The result of converting one row.

    Attributes:
        rows: Pair rows or ranked rows to write.
        left_out: Number of pairs of the row that are dropped, by reason.
        guessed: Whether the row does not say where its prompt ends.
    """

    rows: list[dict[str, Any]]
    left_out: Mapping[str, int] = field(default_factory=dict)
    guessed: bool = False


@dataclass(frozen=True)
class Format:
    """How the rows of a source are converted.

    Attributes:
        convert: Converts a row (with ``gather`` a list of rows), or raises `RowError` if it cannot be used.
            Its keyword arguments are the options of the format.
        summary: The data in a few words.
        hub: Id of the data on the HuggingFace hub; empty if it is not there.
        split: Split that is read if the user names none.
        pairing: Pairing intended for its ranked rows: "all" if answers are only right or wrong.
        of_file: Options that the path of a file gives to its rows; those that the user gives come first.
        gather: Key of a row; rows with the same key, anywhere in the data, are converted together. All rows
            of such a format are held in memory.
        layout: Format whose layout it has; empty for one of its own.
    """

    convert: Callable[..., Converted]
    summary: str
    hub: str = ""
    split: str = "train"
    pairing: Pairing = "adjacent"
    of_file: Callable[[str], Mapping[str, Any]] = lambda path: {}
    gather: Callable[[Mapping[str, Any]], Hashable] | None = None
    layout: str = ""

    @property
    def options(self) -> list[str]:
        """Names of the options."""
        return list(inspect.signature(self.convert).parameters)[1:]

    def options_at(self, place: str) -> Mapping[str, Any]:
        """Options that the file of a row gives, by the row's place "file:line"."""
        return self.of_file(place.rpartition(":")[0])

    def choices(self, option: str) -> tuple[str, ...]:
        """The values that an option can have; empty if it can have any."""
        hint = get_type_hints(self.convert)[option]
        arms = (hint, *get_args(hint))
        return tuple(value for arm in arms if get_origin(arm) is Literal for value in get_args(arm))


# What determines the texts and pairs of a row: a converter writes these, or the row has none of them.
_TEXTS = frozenset(("prompt", "reference", "references", "chosen", "rejected", "responses"))


def with_extras(row: Mapping[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """Adds further fields of the input to a converted row, of which they never change anything.

    A field that the converter wrote, or that would give the row other texts, is kept under another name, with
    "source_" before its own; it is left out if it says the same.

    >>> with_extras({"id": 1, "subset": "chat"}, {"subset": "alpacaeval", "language": "en", "id": 1})
    {'id': 1, 'subset': 'chat', 'source_subset': 'alpacaeval', 'language': 'en'}
    """
    result = dict(row)
    for key, value in extras.items():
        name = key
        while name in row or name in _TEXTS or (name != key and name in extras):
            name = f"source_{name}"
        if name == key or key not in row or row[key] != value:
            result[name] = value
    return result


AnyLayout = TypeVar("AnyLayout", bound="Layout")


class Layout(BaseModel):
    """A row of a published file; the description of a field says what it contains.

    Attributes:
        LAYOUT: Name of the format in `polar_ft.data.converters.CONVERTERS`.
        READ: Where and when the layout was read.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    LAYOUT: ClassVar[str]
    READ: ClassVar[str]

    @classmethod
    def of(cls: type[AnyLayout], row: Mapping[str, Any]) -> AnyLayout:
        """Checks a row.

        Raises:
            RowError: The row has another layout, or holds images, videos or sounds.
        """
        for column in MEDIA:
            if row.get(column):
                raise RowError(column, "is not empty, but only text can be read — leave the row out")
        try:
            return cls.model_validate(row)
        except ValidationError as error:
            raise _layout_error(cls, row, error) from None

    def rest(self, *without: str) -> dict[str, Any]:
        """The fields that the layout does not name, except those in ``without`` and those that are null.

        For `with_extras`, which adds them to the converted row.
        """
        extra = self.model_extra or {}
        return {key: value for key, value in extra.items() if value is not None and key not in without}


# Columns of the files or addresses of what belongs to the texts, in LLaMA-Factory, ms-swift and TRL.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


class Turn(BaseModel):
    """One message of a dialogue, as `plain_message` reads it; other fields (a language) are not kept."""

    model_config = ConfigDict(strict=True)

    role: str
    content: str

    _plain = model_validator(mode="before")(plain_message)


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Converts turns to the messages of a row.

    >>> messages([Turn(role="user", content="Hi")])
    [{'role': 'user', 'content': 'Hi'}]
    """
    return [turn.model_dump() for turn in turns]


def described(description: str, **settings: Any) -> Any:
    """A field of a layout with a description of what it contains; required unless it has a default."""
    return Field(description=description, **settings)


def _layout_error(layout: type[Layout], row: Mapping[str, Any], error: ValidationError) -> RowError:
    problems = error.errors(include_url=False, include_input=False)
    fields = {field.alias or name: field for name, field in layout.model_fields.items()}
    missing = [str(problem["loc"][0]) for problem in problems if problem["type"] == "missing"]
    missing = [name for name in missing if name in fields and name not in row]
    if missing:
        has = ", ".join(list(row)[:12]) + (", …" if len(row) > 12 else "") if row else "no field"
        needs = ", ".join(name for name, field in fields.items() if field.is_required())
        return RowError(
            "",
            f"is not laid out as {layout.LAYOUT}: {', '.join(missing)} missing; expected {needs} "
            f"({layout.READ}), found {has}",
        )
    name = str(problems[0]["loc"][0])
    # A field with several types has a problem for each; the deepest is about the type that is meant.
    problem = max((p for p in problems if p["loc"][0] == name), key=lambda p: len(p["loc"]))
    path = problem["loc"]
    at, value = name, row.get(name)
    for key in path[1:]:  # as deep as the row has values; pydantic's own names follow
        if isinstance(value, Mapping) and key in value:
            at, value = f"{at}.{key}", value[key]  # type: ignore[index]
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            at, value = f"{at}[{key}]", value[key]
    if problem["type"] == "value_error":
        return RowError(at, str(problem["ctx"]["error"]))
    expected = fields[name].description or "something else"
    found = describe(value)
    if problem["type"] == "missing":
        found += f" without {path[-1]!r}"
    return RowError(
        at,
        f"is {found}, but {name} is {expected} in {layout.LAYOUT} ({layout.READ}); has the layout changed?",
    )


def labelled_row(
    common: dict[str, Any], responses: list[dict[str, Any]], reference: Literal["best", "none"]
) -> dict[str, Any]:
    """Makes a ranked row of correct and wrong answers; the reference is empty or the first correct answer.

    Raises:
        RowError: The first correct answer becomes the reference, and there is no other one.
    """
    if reference == "none":
        return common | {"reference": "", "responses": responses}
    first, *others = responses
    if not any(response["correct"] for response in others):
        raise RowError(
            "chosen", "has one answer — a reference and a pair need two (or take --reference none)"
        )
    return common | {"reference": first["content"], "responses": others}
