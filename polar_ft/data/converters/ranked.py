"""Converts ranked rows to pair rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polar_ft.data.converters.format import TIED, Converted, with_extras
from polar_ft.data.records import (
    Message,
    Pairing,
    PairRow,
    RankedRow,
    Response,
    parse_row,
)


def ranked(
    row: Mapping[str, Any],
    *,
    pairing: Pairing = "adjacent",
    reference: Literal["best", "none"] = "best",
) -> Converted:
    """Converts a ranked row (see `polar_ft.data.records.RankedRow`) to pair rows; a pair row stays as it is.

    Each pair keeps the policy of its texts and, as ``margin``, the difference of their scores.

    Args:
        row: The row.
        pairing: "adjacent" pairs every response with the next worse one, "all" with every worse one.
        reference: For a row without reference: "best" makes its best response the reference, "none" leaves
            the reference empty and pairs all the responses.

    Raises:
        RowError: The row cannot be used.

    >>> responses = [{"content": text, "rank": rank} for rank, text in enumerate("ABC", start=1)]
    >>> for pair in ranked({"id": 7, "prompt": "Which?", "responses": responses}).rows:
    ...     print(pair)
    {'id': '7-1', 'prompt': 'Which?', 'reference': 'A', 'chosen': 'B', 'rejected': 'C'}
    """
    if reference == "none" and row.get("reference") is None and row.get("references") is None:
        row = {**row, "reference": ""}
    checked = parse_row(row)
    if isinstance(checked, PairRow):
        return Converted([dict(row)])
    ranking = checked.ranking(pairing)
    best = ranking.reference
    own = "reference" if row.get("references") is None else "references"
    common = {
        key: value
        for key, value in row.items()
        if key not in ("id", "prompt", "reference", "references", "responses")
    }
    rows = []
    for number, ((a, b), margin) in enumerate(zip(ranking.pairs, ranking.margins, strict=True), start=1):
        chosen, rejected = ranking.candidates[a], ranking.candidates[b]
        pair: dict[str, Any] = {} if checked.id is None else {"id": f"{checked.id}-{number}"}
        pair["prompt"] = row["prompt"]
        if best is None:
            pair[own] = row[own]
        else:
            pair["reference"] = _field(best, checked)
        pair |= {"chosen": _field(chosen, checked), "rejected": _field(rejected, checked)}
        if margin is not None:
            pair["margin"] = margin
        for name, response in (("reference", best), ("chosen", chosen), ("rejected", rejected)):
            info = {} if response is None else response.info()
            # Chosen and rejected give the order, the margin gives the difference of the scores.
            pair |= {f"{name}_{key}": value for key, value in info.items() if key != "rank"}
        rows.append(with_extras(pair, common))
    return Converted(rows, {TIED: ranking.n_ties} if ranking.n_ties else {})


def _field(response: Response, row: RankedRow) -> Any:
    """The response as text or messages, like the row's prompt, so that a file does not mix the two."""
    if response.messages is not None:
        return [message.model_dump() for message in response.messages]
    if isinstance(row.prompt, str):
        return response.text
    return [Message(role="assistant", content=response.text).model_dump()]
