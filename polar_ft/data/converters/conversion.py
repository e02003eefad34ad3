"""The formats, and the conversion of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polar_ft.data.converters.benchmarks import judgebench, rewardbench, rewardbench_2, rm_bench
from polar_ft.data.converters.dialogues import chat_pairs, hh_rlhf
from polar_ft.data.converters.format import Format
from polar_ft.data.converters.helpsteer import helpsteer2, helpsteer3
from polar_ft.data.converters.ranked import ranked
from polar_ft.data.converters.rmb import rmb, rmb_bon, rmb_polar, same_prompt
from polar_ft.data.converters.ultrafeedback import ultrafeedback
from polar_ft.data.problems import FileProblem
from polar_ft.data.reading import (
    MAX_LINE_MB,
    OnBytes,
    RowProblem,
    expand,
    place_below,
    raise_problems,
    read_rows,
)
from polar_ft.data.records import RowError, parse_row
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError

CONVERTERS: dict[str, Format] = {
    "ranked": Format(ranked, "ranked rows of polar-ft, as pair rows"),
    "hh-rlhf": Format(hh_rlhf, "Anthropic's hh-rlhf: two dialogues as strings", "Anthropic/hh-rlhf"),
    "chat-pairs": Format(
        chat_pairs, "two dialogues as lists of messages", "Skywork/Skywork-Reward-Preference-80K-v0.2"
    ),
    "ultrafeedback": Format(ultrafeedback, "UltraFeedback, scored answers", "openbmb/UltraFeedback"),
    "ultrafeedback-binarized": Format(
        chat_pairs, "UltraFeedback, pairs", "HuggingFaceH4/ultrafeedback_binarized", "train_prefs"
    ),
    "helpsteer2": Format(helpsteer2, "HelpSteer2, preference/preference.jsonl.gz"),
    "helpsteer3": Format(helpsteer3, "HelpSteer3, preferences", "nvidia/HelpSteer3:preference"),
    "rewardbench": Format(rewardbench, "RewardBench", "allenai/reward-bench", "filtered"),
    "rewardbench-2": Format(rewardbench_2, "RewardBench 2", "allenai/reward-bench-2", "test", "all"),
    "rm-bench": Format(rm_bench, "RM-Bench, three styles a side", "THU-KEG/RM-Bench", pairing="all"),
    "rmb": Format(rmb, "RMB, the folder Pairwise_set, its pairs", gather=same_prompt),
    "rmb-polar": Format(
        rmb_polar, "RMB, the folder Pairwise_set, the POLAR paper's protocol", gather=same_prompt
    ),
    "rmb-bon": Format(rmb_bon, "RMB, the folder BoN_set", pairing="all"),
    "judgebench": Format(judgebench, "JudgeBench", "ScalerLab/JudgeBench", "gpt"),
}


@dataclass
class Conversion:
    """Counts of a conversion.

    Attributes:
        rows_in: Rows that were read.
        pairs: Pair rows that were written.
        ranked: Ranked rows that were written.
        left_out: Number of pairs that were dropped, by reason.
        without_pairs: Rows (prompts, if the format gathers the rows of a prompt) that gave nothing because
            all their pairs were dropped.
        problems: Rows and files that could not be used.
    """

    rows_in: int = 0
    pairs: int = 0
    ranked: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    without_pairs: int = 0
    problems: list[RowProblem] = field(default_factory=list)

    @property
    def damaged(self) -> list[RowProblem]:
        """The problems of files that cannot be read, or not to their end."""
        return [problem for problem in self.problems if isinstance(problem, FileProblem)]


def convert_file(
    name: str,
    source: str,
    target: Path,
    *,
    split: str | None = None,
    max_line_mb: float = MAX_LINE_MB,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    keep_readable: bool = False,
    on_bytes: OnBytes | None = None,
) -> Conversion:
    """Converts a file; rows that cannot be used are dropped and named in the result.

    The id of a row without one is its place in the source, so that it can be found again.

    Args:
        name: A key of `CONVERTERS`.
        source: The data; see `polar_ft.data.reading.DataSource.path`. Sub-folders of a folder are read too.
        target: The .jsonl or .jsonl.gz file to write; replaced if it exists.
        split: Split of a HuggingFace data set; None for that of the format.
        max_line_mb: Longest line that is read, in 2**20 bytes.
        options: Keyword arguments of the converter.
        strict: Write nothing if a row cannot be used.
        keep_readable: Write what can be read although a file is damaged.
        on_bytes: See `read_rows`.

    Raises:
        DataError: A row cannot be used, and ``strict`` is set; or a file cannot be read, or not to its end.
        PolarError: There is no such converter, option or file, or no row could be used; nothing is written.
    """
    if name not in CONVERTERS:
        raise PolarError(f"{name}: no such format; there are {', '.join(sorted(CONVERTERS))}")
    fmt, options = CONVERTERS[name], options or {}
    for option in options:
        if option not in fmt.options:
            has = f"; it has {', '.join(f'--{known}' for known in fmt.options)}" if fmt.options else ""
            raise PolarError(f"--{option} is no option of the format {name}{has}; leave it out")

    done, first = Conversion(), None

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal first
        for file in expand(source, recursive=True):
            for place, row in read_rows(file, split or fmt.split, max_line_mb=max_line_mb, on_bytes=on_bytes):
                done.rows_in += not isinstance(row, FileProblem)
                if isinstance(row, RowProblem):
                    done.problems.append(row)
                else:
                    first = first or row
                    yield place, row

    units: Iterator[tuple[str, Any]] = read()
    if fmt.gather is not None:
        units = _gathered(units, fmt.gather, done.problems)
    with open_rows(target) as out:
        for place, unit in units:
            try:
                converted = fmt.convert(unit, **options)
                rows = _named(place_below(source, place), converted.rows)
                for row in rows:
                    parse_row(row)
            except RowError as error:
                done.problems.append(RowProblem.at(place, error))
                continue
            done.left_out.update(converted.left_out)
            done.without_pairs += not rows
            for row in rows:
                out.write(row)
                done.ranked += "responses" in row
                done.pairs += "responses" not in row
        if strict:
            raise_problems(done.problems)
        if done.damaged and not keep_readable:
            readable = f"{done.rows_in:,} row{'' if done.rows_in == 1 else 's'} could be read"
            advice = f"nothing was written; {readable}, and --keep-readable converts them"
            raise_problems(done.damaged, advice)
        if not out.count:
            raise PolarError(_why_nothing(name, source, done, first))
    return done


def _gathered(
    rows: Iterator[tuple[str, dict[str, Any]]],
    key: Callable[[Mapping[str, Any]], Hashable],
    problems: list[RowProblem],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Gathers the rows of each key: yields the place of the first row, and all rows, by first appearance."""
    groups: dict[Hashable, tuple[str, list[dict[str, Any]]]] = {}
    for place, row in rows:
        try:
            groups.setdefault(key(row), (place, []))[1].append(row)
        except RowError as error:
            problems.append(RowProblem.at(place, error))
    yield from groups.values()


def _named(at: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sets the id of rows without one to their place below the source."""
    named = []
    for number, row in enumerate(rows, start=1):
        if row.get("id") is None:
            name = at if len(rows) == 1 else f"{at}-{number}"
            row = {"id": name} | {key: value for key, value in row.items() if key != "id"}
        named.append(row)
    return named


def _why_nothing(name: str, source: str, done: Conversion, first: Mapping[str, Any] | None) -> str:
    reasons = [f"{len(done.problems):,} cannot be used"] if done.problems else []
    reasons += [f"of {done.without_pairs:,} no pair was left"] if done.without_pairs else []
    message = f"{source}: none of its {done.rows_in:,} rows gives a pair as {name} ({', '.join(reasons)})"
    if done.problems:
        message += f"; the first: {done.problems[0]}"
    others = []
    if first is not None and not _reads(name, first):
        others = [other for other in CONVERTERS if _reads(other, first)]
    return message + (f" — this looks like {' or '.join(others)}" if others else "")


def _reads(name: str, row: Mapping[str, Any]) -> bool:
    """Whether a row has the layout of a format."""
    fmt = CONVERTERS[name]
    try:
        fmt.convert(row if fmt.gather is None else [row])
    except RowError:
        return False
    return True
