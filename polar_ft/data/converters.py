"""Other people's preference data as rows of ours: one small function for each format.

A converter takes one row and returns the pair rows that it gives, or raises `RowError` where it gives none;
its keyword arguments are the options of its format. To add a format, write such a function and put it into
`CONVERTERS`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polar_ft.data.reading import MAX_LINE_MB, OnBytes, RowProblem, raise_problems, read_rows
from polar_ft.data.records import (
    Message,
    Pairing,
    PairRow,
    RankedRow,
    Response,
    RowError,
    parse_row,
)
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError


@dataclass(frozen=True)
class Converted:
    """What one row gives.

    Attributes:
        rows: Pair rows, as they are written.
        n_ties: Pairs left out because both responses are ranked the same.
    """

    rows: list[dict[str, Any]]
    n_ties: int = 0


Converter = Callable[..., Converted]

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_rlhf(row: Mapping[str, Any]) -> Converted:
    r"""A pair of whole dialogues, as Anthropic's hh-rlhf has them; the reference is empty.

    The prompt is all that comes before the last turn. White space around a turn is not kept.

    Raises:
        RowError: A dialogue does not parse, or the two do not have the same prompt.

    >>> row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."}
    >>> pair = hh_rlhf(row).rows[0]
    >>> pair["prompt"], pair["chosen"]
    ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Hello!'}])
    """
    chosen = _parse_dialogue(row, "chosen")
    rejected = _parse_dialogue(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        turn = next(
            (i for i, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if a != b),
            min(len(chosen), len(rejected)) - 1,
        )
        raise RowError(
            "rejected",
            f"has another prompt than chosen from turn {turn + 1} on — mend it or leave the row out",
        )
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    pair = {"prompt": chosen[:-1], "reference": "", "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return Converted([pair | rest])


def ranked(
    row: Mapping[str, Any],
    *,
    pairing: Pairing = "adjacent",
    reference: Literal["best", "none"] = "best",
) -> Converted:
    """A ranked row (see `polar_ft.data.records.RankedRow`) as pair rows; a pair row stays as it is.

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
    if reference == "none" and row.get("reference") is None:
        row = {**row, "reference": ""}
    checked = parse_row(row)
    if isinstance(checked, PairRow):
        return Converted([dict(row)])
    ranking = checked.ranking(pairing)
    best = ranking.reference
    common = {
        key: value for key, value in row.items() if key not in ("id", "prompt", "reference", "responses")
    }
    rows = []
    for number, ((a, b), margin) in enumerate(zip(ranking.pairs, ranking.margins, strict=True), start=1):
        chosen, rejected = ranking.candidates[a], ranking.candidates[b]
        pair: dict[str, Any] = {} if checked.id is None else {"id": f"{checked.id}-{number}"}
        pair |= {
            "prompt": row["prompt"],
            "reference": row["reference"] if best is None else _field(best, checked),
            "chosen": _field(chosen, checked),
            "rejected": _field(rejected, checked),
        }
        if margin is not None:
            pair["margin"] = margin
        for name, response in (("reference", best), ("chosen", chosen), ("rejected", rejected)):
            info = {} if response is None else response.info()
            # The order is said by chosen and rejected now; the score differences by the margin.
            pair |= {f"{name}_{key}": value for key, value in info.items() if key != "rank"}
        rows.append(pair | {key: value for key, value in common.items() if key not in pair})
    return Converted(rows, ranking.n_ties)


CONVERTERS: dict[str, Converter] = {"hh-rlhf": hh_rlhf, "ranked": ranked}


@dataclass
class Conversion:
    """What became of a file.

    Attributes:
        rows_in: Rows read.
        rows_out: Pair rows written.
        n_ties: Pairs left out because both responses are ranked the same.
        problems: The rows that gave nothing because they could not be used.
        without_pairs: Rows that gave nothing because all their responses are tied.
    """

    rows_in: int = 0
    rows_out: int = 0
    n_ties: int = 0
    without_pairs: int = 0
    problems: list[RowProblem] = field(default_factory=list)


def convert_file(
    name: str,
    source: str,
    target: Path,
    *,
    split: str = "train",
    max_line_mb: float = MAX_LINE_MB,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    on_bytes: OnBytes | None = None,
) -> Conversion:
    """Converts a file; rows that cannot be used are left out and named in what is returned.

    A row without an id gets its place in the source as id, so that it can be found again.

    Args:
        name: One of `CONVERTERS`.
        source: What is read; see `polar_ft.data.reading.DataSource.path`.
        target: The .jsonl or .jsonl.gz file to be written; replaced where it exists.
        split: Which split of a HuggingFace data set.
        max_line_mb: Longest line that is read.
        options: Keyword arguments of the converter.
        strict: Write nothing where a row cannot be used.
        on_bytes: See `read_rows`.

    Raises:
        DataError: A row cannot be used, and ``strict`` was given.
        PolarError: No such converter, option or file, or not one row could be used: then nothing is written.
    """
    if name not in CONVERTERS:
        raise PolarError(f"{name}: no such format; there is {', '.join(sorted(CONVERTERS))}")
    converter, options = CONVERTERS[name], options or {}
    known = list(inspect.signature(converter).parameters)[1:]
    for option in options:
        if option not in known:
            raise PolarError(f"--{option} says nothing to the format {name}; leave it away")

    done = Conversion()
    rows = read_rows(source, split, max_line_mb=max_line_mb, on_bytes=on_bytes)
    with open_rows(target) as out:
        for place, row in rows:
            done.rows_in += 1
            if isinstance(row, RowProblem):
                done.problems.append(row)
                continue
            try:
                converted = converter(row, **options)
            except RowError as error:
                done.problems.append(RowProblem.at(place, error))
                continue
            done.n_ties += converted.n_ties
            done.without_pairs += not converted.rows
            for number, pair in enumerate(converted.rows, start=1):
                if pair.get("id") is None:
                    at = Path(place).name
                    pair = {"id": at if len(converted.rows) == 1 else f"{at}-{number}"} | pair
                out.write(pair)
        done.rows_out = out.count
        if strict:
            raise_problems(done.problems)
        if not out.count:
            raise PolarError(_why_nothing(source, name, done))
    return done


def _why_nothing(source: str, name: str, done: Conversion) -> str:
    first = f"; the first: {done.problems[0]}" if done.problems else ""
    return (
        f"{source}: none of its {done.rows_in:,} rows gives a pair as {name} "
        f"({len(done.problems):,} cannot be used, {done.without_pairs:,} are all ties){first}"
    )


def _parse_dialogue(row: Mapping[str, Any], key: str) -> list[dict[str, str]]:
    text = row.get(key)
    if not isinstance(text, str):
        raise RowError(
            key, "is missing or not a string — an hh-rlhf row has a dialogue in chosen and rejected"
        )
    before, *parts = _SPEAKER.split(text if text.startswith("\n") else f"\n\n{text}")
    if before.strip() or not parts:
        raise RowError(key, r'does not begin with "\n\nHuman:" — is this an hh-rlhf dialogue?')
    turns = [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(
            key, r'does not end with a turn of "\n\nAssistant:" after a prompt — nothing to be ranked'
        )
    return turns


def _field(response: Response, row: RankedRow) -> Any:
    """A response in the form that the row's prompt has, so that a file does not mix the two."""
    if response.messages is not None:
        return [message.model_dump() for message in response.messages]
    if isinstance(row.prompt, str):
        return response.text
    return [Message(role="assistant", content=response.text).model_dump()]
