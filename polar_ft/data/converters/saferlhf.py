"""PKU-SafeRLHF (arXiv 2406.15513): two answers, which of them is more helpful and which is safer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polar_ft.data.converters.format import Converted, Layout, described, with_extras
from polar_ft.data.records import RowError

# Of each answer: the field of the row, {} being 0 or 1, and what a side's field is called.
_OF_SIDE = {
    "response_{}_source": "policy",
    "is_response_{}_safe": "is_safe",
    "response_{}_severity_level": "severity_level",
    "response_{}_harm_category": "harm_category",
    "response_{}_sha256": "sha256",
}


class SafeRLHFRow(Layout):
    """A row of PKU-Alignment/PKU-SafeRLHF, or of its earlier and smaller versions."""

    LAYOUT = "pku-saferlhf"
    READ = "files of PKU-Alignment/PKU-SafeRLHF as code reads them, 2026-11-24"

    prompt: str = described("a text")
    response_0: str = described("a text")
    response_1: str = described("a text")
    better_response_id: Literal[0, 1] = described("0 or 1")
    safer_response_id: Literal[0, 1] | None = described("0 or 1", default=None)


def pku_saferlhf(row: Mapping[str, Any], *, score: Literal["better", "safer"] = "better") -> Converted:
    """Converts a row of PKU-SafeRLHF; the reference is empty.

    What the row says of each answer is kept as ``chosen_policy``, ``chosen_is_safe``,
    ``chosen_severity_level``, ``chosen_harm_category`` and so on. Written from code that reads the data,
    without access to the files.

    Args:
        row: The row.
        score: "better" chooses the more helpful answer, "safer" the safer one; they differ in some rows.

    Raises:
        RowError: The row has another layout, or does not say which answer is the safer one.

    >>> row = {"prompt": "Hi", "response_0": "Go.", "response_1": "Hello!", "is_response_0_safe": True,
    ...        "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0}
    >>> pair = pku_saferlhf(row).rows[0]
    >>> pair["chosen"], pair["chosen_is_safe"]
    ('Hello!', False)
    >>> pku_saferlhf(row, score="safer").rows[0]["chosen"]
    'Go.'
    """
    pair = SafeRLHFRow.of(row)
    chosen = pair.better_response_id if score == "better" else pair.safer_response_id
    if chosen is None:
        raise RowError("safer_response_id", "is missing — take --score better")
    extras = pair.rest()
    texts = (pair.response_0, pair.response_1)
    result: dict[str, Any] = {"prompt": pair.prompt, "reference": ""}
    result |= {"chosen": texts[chosen], "rejected": texts[1 - chosen]}
    for side, answer in (("chosen", chosen), ("rejected", 1 - chosen)):
        for field, name in _OF_SIDE.items():
            value = extras.pop(field.format(answer), None)
            if value is not None:
                result[f"{side}_{name}"] = value
    if pair.safer_response_id is not None:
        result["better_is_safer"] = pair.better_response_id == pair.safer_response_id
    return Converted([with_extras(result, extras)])
