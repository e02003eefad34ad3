"""Decisions of labellers, and the rows in which they are written.

A decision for an answer is a pair row; a tie or a skip is a ranked row of equal answers, which has no pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from polar_ft.data.problems import RowProblem
from polar_ft.data.reading import read_rows
from polar_ft.data.records import RankedRow, RowError, parse_row
from polar_ft.errors import PolarError
from polar_ft.labelling.pairs import Pair, pair_key

Choice = Literal["left", "right", "tie", "skip"]

# Sub-folder of a folder of decisions for what is not trained on; who reads the folder leaves it out.
OTHER_FOLDER = "repeats_and_skips"


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision of a labeller.

    Attributes:
        labeller: Who decided.
        pair: Key of the pair.
        winner: 0 or 1, of the answers in the order of their texts; None for a tie or a skip.
        left: Which of the two was shown on the left; None where it is not known.
        choice: What was chosen.
        repeat: Whether the labeller had decided on the pair before.
        number: Number of the decision of this labeller, from 1.
        seconds: How long it took; None where it is not known.
        model_margin: The model's reward of the chosen answer minus that of the other, if a model was asked.
        row: The row in which it was read; empty in a running server.
    """

    labeller: str
    pair: str
    winner: int | None
    left: int | None
    choice: Choice
    repeat: bool = False
    number: int = 0
    seconds: float | None = None
    model_margin: float | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


def row_of(pair: Pair, decision: Decision) -> dict[str, Any]:
    """Makes the row that is written of a decision.

    >>> from polar_ft.labelling.pairs import parse_task
    >>> (pair,) = parse_task({"prompt": "2 + 2?", "candidates": ["5", "4"]}, "in.jsonl:1").pairs(1)
    >>> row = row_of(pair, Decision("alice", pair.key, winner=0, left=1, choice="right", number=1))
    >>> {name: row[name] for name in ("chosen", "rejected", "decision", "chosen_source")}
    {'chosen': '4', 'rejected': '5', 'decision': 'right', 'chosen_source': 'candidates[1]'}
    """
    row: dict[str, Any] = {"id": pair.fields["id"], "prompt": pair.prompt}
    row |= {name: value for name, value in pair.fields.items() if name != "id"}
    if decision.winner is None:
        assert decision.left is not None
        shown = pair.answers[decision.left], pair.answers[1 - decision.left]
        row["responses"] = [
            {"content" if isinstance(answer.value, str) else "messages": answer.value, "rank": 1}
            | {"source": answer.source}
            | ({} if answer.policy is None else {"policy": answer.policy})
            for answer in shown
        ]
    else:
        sides = {"chosen": pair.answers[decision.winner], "rejected": pair.answers[1 - decision.winner]}
        row |= {name: answer.value for name, answer in sides.items()}
        for name, answer in sides.items():
            row[f"{name}_source"] = answer.source
            if answer.policy is not None:
                row[f"{name}_policy"] = answer.policy
        if pair.margin is not None:
            row["model_margin"] = pair.margin if decision.winner == 0 else -pair.margin
    row |= {"labeller": decision.labeller, "decision": decision.choice, "number": decision.number}
    row |= {"repeat": True} if decision.repeat else {}
    at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return row | {"seconds": decision.seconds, "labelled_at": at}


def decision_of(row: Mapping[str, Any]) -> Decision:
    """Reads a decision from a row: one of `row_of`, or any pair row with a ``labeller``.

    Raises:
        RowError: It is neither.
    """
    parsed = parse_row(row)
    labeller = row.get("labeller")
    if labeller is None:
        raise RowError("labeller", "is missing — this is no row of a decision")
    example = parsed.to_example("")
    first, second = example.candidates[:2]
    choice: Choice = row.get("decision", "tie" if isinstance(parsed, RankedRow) else "left")
    if isinstance(parsed, RankedRow):
        winner, left = None, int(second < first)
    else:
        winner, left = int(second < first), None
        if row.get("decision") in ("left", "right"):
            left = winner if choice == "left" else 1 - winner
    return Decision(
        labeller=str(labeller),
        pair=pair_key(example, (first, second)),
        winner=winner,
        left=left,
        choice=choice,
        repeat=bool(row.get("repeat")),
        number=int(row.get("number") or 0),
        seconds=row.get("seconds"),
        model_margin=row.get("model_margin"),
        row=row,
    )


def read_decisions(paths: Iterable[str | Path]) -> list[Decision]:
    """Reads the decisions of files, or of the folders that `polar-ft label` writes.

    Raises:
        PolarError: A file does not exist, or a row is no decision.
    """
    decisions = []
    for path in map(Path, paths):
        beside = path.with_name(OTHER_FOLDER) / path.name if path.is_file() else path / OTHER_FOLDER
        decisions += decisions_in(path)
        if beside.is_file() or any(beside.glob("*.jsonl")):
            decisions += decisions_in(beside)
    return decisions


def decisions_in(path: Path) -> list[Decision]:
    """Reads the decisions of a file, or of a folder without its sub-folders.

    Raises:
        PolarError: As `read_decisions`.
    """
    decisions = []
    for place, row in read_rows(path):
        try:
            if isinstance(row, RowProblem):
                raise PolarError(str(row))
            decisions.append(decision_of(row))
        except RowError as error:
            raise PolarError(f"{RowProblem.at(place, error)}; name what holds only decisions") from None
    return decisions
