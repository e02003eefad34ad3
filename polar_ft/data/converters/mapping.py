"""Names of fields that a user gives: ``--map prompt=question`` reads the field ``question`` as ``prompt``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polar_ft.data.records import RowError, describe
from polar_ft.data.tables import cell_value
from polar_ft.errors import PolarError

# What others call these fields, for a proposal where no format fits.
_OTHER_NAMES = {
    "prompt": "question query instruction input problem context user_prompt request conversation",
    "chosen": "better preferred good positive winner win accepted best choice_a answer_a response_a "
    "chosen_response",
    "rejected": "worse dispreferred bad negative loser lose worst choice_b answer_b response_b "
    "rejected_response",
    "reference": "gold ground_truth solution target reference_answer ideal",
}


_NUMBERS = {"margin", "weight", "score_chosen", "score_rejected"}


def parse_mapping(entries: Sequence[str]) -> dict[str, str]:
    """Parses the values of ``--map``: several after commas, and a path into a field with dots.

    Raises:
        PolarError: An entry is not "ours=theirs", or a field is given twice.

    >>> parse_mapping(["prompt=question,chosen=answers.0", "rejected=answers.1"])
    {'prompt': 'question', 'chosen': 'answers.0', 'rejected': 'answers.1'}
    """
    mapping: dict[str, str] = {}
    # A name in the file may have a comma; what follows one begins an entry only if it is "ours=".
    for entry in (part for text in entries for part in re.split(r",(?=\s*\w+\s*=)", text)):
        ours, equals, theirs = (part.strip() for part in entry.partition("="))
        if not (ours and equals and theirs):
            raise PolarError(f"--map {entry}: write the name that is wanted = the name in the file")
        if ours in mapping:
            raise PolarError(f"--map {entry}: {ours} is given twice")
        mapping[ours] = theirs
    return mapping


def mapped(row: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Renames the fields of a row; a part of a field is copied.

    A field of the row that already has the name is kept under "source_" and its name.

    Raises:
        RowError: The row has no such field.

    >>> row = {"question": "2 + 2?", "answers": ["4", "5"]}
    >>> mapped(row, {"prompt": "question", "chosen": "answers.0"})
    {'prompt': '2 + 2?', 'chosen': '4', 'answers': ['4', '5']}
    """
    taken = {ours: _at(row, ours, theirs) for ours, theirs in mapping.items()}
    for ours in _NUMBERS & taken.keys():
        if isinstance(taken[ours], str):  # of a table, whose own column does not say that it is a number
            taken[ours] = cell_value(ours, taken[ours])
    moved = set(mapping.values())
    rest = {key: value for key, value in row.items() if key not in moved}
    return taken | {f"source_{key}" if key in taken else key: value for key, value in rest.items()}


def _at(row: Mapping[str, Any], ours: str, path: str) -> Any:
    if path in row:
        return row[path]
    here: Any = row
    for step in path.split("."):
        if isinstance(here, Mapping) and step in here:
            here = here[step]
        elif isinstance(here, list) and step.isdigit() and int(step) < len(here):
            here = here[int(step)]
        else:
            where = (
                "the row has " + (", ".join(map(str, row)) or "no field") if here is row else describe(here)
            )
            raise RowError(path, f"is missing, but --map {ours}={path} names it — {where}")
    return here


def proposal(fields: Sequence[str]) -> str:
    """The ``--map`` that the names of fields suggest; empty if they suggest no complete pair.

    >>> proposal(["question", "better", "worse"])
    '--map prompt=question,chosen=better,rejected=worse'
    """
    found = {}
    for ours, names in _OTHER_NAMES.items():
        known = {ours, *names.split()}
        theirs = [field for field in fields if field.lower() in known]
        if theirs:
            found[ours] = theirs[0]
    if not {"prompt", "chosen", "rejected"} <= found.keys():
        return ""
    return "--map " + ",".join(f"{ours}={theirs}" for ours, theirs in found.items() if ours != theirs)
