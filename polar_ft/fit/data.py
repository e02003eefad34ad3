"""The data of a fit: reading any known format, what would spoil training, and the split by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from polar_ft.data.converters import CONVERTERS, convert_file, recognise_file
from polar_ft.data.lint import DataReport, check
from polar_ft.data.problems import FileProblem
from polar_ft.data.reading import DataSource, RowProblem, parsed_rows, read_rows, size_in_bytes
from polar_ft.data.report import many
from polar_ft.data.split import Side, is_held_out, split_by_prompt
from polar_ft.data.writing import open_rows
from polar_ft.errors import DataError, PolarError, printable
from polar_ft.fit.steps import Result, Tell

# Fewer prompts cannot be divided into what is learned and what is measured.
MIN_PROMPTS = 20
# Shares of the prompts: what the result is measured on, and of the rest what chooses the best checkpoint.
HELD_OUT, VALIDATION = 0.1, 0.08
# More prompts than these make an interval hardly narrower, and cost training data.
MOST_HELD_OUT, MOST_VALIDATION = 2000, 400
# Labellers differ now and then; more contradictions than this are a mistake, and so for copies.
CONTRADICTIONS, COPIES = 0.05, 0.3
SHOWN_ROWS = 5
# The format of rows that are read as they are.
OURS = "polar-ft"
_LOOKED_AT = 20


@dataclass(frozen=True)
class Source:
    """Data as the user names it.

    Attributes:
        path: A file, a folder or a data set.
        split: Of a HuggingFace data set.
        mapping: Names of fields, ours to theirs.
    """

    path: str
    split: str = "train"
    mapping: Mapping[str, str] | None = None


def read(source: Source, target: Path, tell: Tell, *, fix: bool) -> Result:
    """Recognises the format, and converts rows of another one than ours.

    Args:
        source: The data.
        target: File for converted rows.
        tell: Says how far it is.
        fix: Leave out rows that cannot be converted, instead of stopping.

    Returns:
        "format", `OURS` or that from which rows were converted to ``target``; "left_out" and "said".

    Raises:
        PolarError: No format fits, or rows cannot be converted.
    """
    if not source.mapping and _is_ours(source):
        return {"format": OURS, "left_out": 0, "said": "rows of polar-ft"}
    found = recognise_file(CONVERTERS, source.path, split=source.split, mapping=source.mapping)
    done = convert_file(
        found.name,
        source.path,
        target,
        split=source.split,
        mapping=source.mapping,
        strict=not fix,
        on_bytes=_share_of(source.path, tell, f"converting from {found.name}"),
    )
    said = f"format {found.name} ({found.certainty}): {many(done.rows_in, 'row')}, "
    said += many(done.pairs or done.ranked, "pair" if done.pairs else "ranked row")
    left_out = done.unusable + sum(done.left_out.values()) + done.without_pairs
    said += f"; {left_out:,} left out" if left_out else ""
    return {"format": found.name, "left_out": left_out, "said": said}


def held_out_source(source: Source, path: str) -> Source:
    """The held-out data: read as the other data is, unless it has rows of ours."""
    ours = source.mapping is not None and _is_ours(Source(path, source.split))
    return Source(path, source.split, None if ours else source.mapping)


def _is_ours(source: Source) -> bool:
    """Whether one of the first rows has the fields of our rows, or nothing can be read, as the check says."""
    rows = [row for _, row in islice(read_rows(source.path, source.split), _LOOKED_AT)]
    readable = [row for row in rows if isinstance(row, dict)]
    return not readable or any(
        {"prompt", "responses"} <= row.keys()
        or ({"prompt", "chosen"} <= row.keys() and bool(row.keys() & {"reference", "references"}))
        for row in readable
    )


def look(
    source: Source, path: str, held_out: str | None, target: Path, tell: Tell, *, fix: bool
) -> tuple[DataReport, Result]:
    """Checks rows of ours, and stops where they would spoil training.

    Args:
        source: As the user named it.
        path: Where rows of ours are.
        held_out: Data whose prompts must not be among them.
        target: With ``fix``, file for the good rows.
        tell: Says how far it is.
        fix: Leave bad rows out instead of stopping.

    Raises:
        DataError: They would spoil training; the message has a line for each fault, and names rows.
    """
    sources = [DataSource(path=path, split=source.split)]
    others = [DataSource(path=held_out, split=source.split)] if held_out else []
    on_bytes = _share_of(path, tell, "checking")
    left_out = 0
    if fix:
        with open_rows(target) as out:
            report = check(sources, held_out=others, write=out.write, on_bytes=on_bytes)
            written = out.count
        left_out = report.rows + report.bad_rows - written
        found = faults(report, fixed=True)
        if not found and not written:
            found = ["not one row is good, so --fix leaves nothing to train on."]
        if not found and left_out:  # what counts from here on is what is left
            report = check([DataSource(path=str(target))])
            found = [
                f"Without the {many(left_out, 'row')} that --fix leaves out: {sentence}"
                for sentence in faults(report, fixed=True)
            ]
    else:
        report = check(sources, held_out=others, on_bytes=on_bytes)
        found = faults(report)
    if found:
        lines = "".join(f"\n  {sentence}" for sentence in found)
        raise DataError(f"{printable(source.path)}: training on this would be spoilt:{lines}")
    said = f"{many(report.rows, 'row')}, {many(report.pairs, 'pair')}, {many(report.prompts, 'prompt')}"
    notes = list(report.warnings) + _notes(report)
    notes += [f"{many(left_out, 'row')} left out by --fix"] if left_out else []
    result: Result = {
        "pairs": report.pairs,
        "prompts": report.prompts,
        "characters": _characters(report),
        "longest": sum(report.lengths[name].max for name in ("prompt", "reference"))
        + report.lengths["prompt"].max
        + max(report.lengths[name].max for name in ("chosen", "rejected")),
        "without_reference": report.empty["reference"] / max(1, report.rows),
        "notes": notes,
        "said": "; ".join([said, *notes]),
    }
    return report, result


def faults(report: DataReport, *, fixed: bool = False) -> list[str]:
    """A sentence for everything in the data that would spoil training; empty for good data.

    Args:
        report: What the check found.
        fixed: Bad rows are left out, so only what remains counts.
    """
    found: list[tuple[str, bool]] = []  # sentence, and whether --fix mends it

    def fault(sentence: str, rows: str = "", *, fixable: bool = True) -> None:
        found.append((f"{sentence}{_rows(report, rows)}.", fixable))

    rows = [problem for problem in report.problems if not isinstance(problem, FileProblem)]
    for problem in report.problems:
        if isinstance(problem, FileProblem):
            found.append((f"{problem}.", False))
    if len(rows) == 1 and rows[0].line == 0:
        found.append((f"{rows[0]}.", False))
    elif rows:
        shown = "; ".join(map(str, rows[:SHOWN_ROWS])) + ("; …" if len(rows) > SHOWN_ROWS else "")
        found.append((f"{_are(len(rows), 'row')} unusable: {shown}.", True))
    pairs = report.pairs
    if report.rows and not pairs:
        fault("every row ranks all its answers the same, so there is no pair to learn from", fixable=False)
    if report.chosen_equals_rejected:
        count = report.chosen_equals_rejected
        fault(f"{_have(count, 'pair')} the same text as chosen and rejected", "chosen_equals_rejected")
    empty = {name: report.empty[name] for name in ("prompt", "chosen", "rejected") if report.empty[name]}
    if empty:
        parts = ", ".join(f"{name} in {count:,}" for name, count in empty.items())
        fault(f"texts are empty ({parts})", "empty")
    if pairs and report.contradictory_pairs > CONTRADICTIONS * pairs:
        count = report.contradictory_pairs
        fault(
            f"{many(count, 'pair')} say the opposite of another pair ({count / pairs:.0%})",
            "contradictory_pairs",
        )
    if pairs and report.duplicate_pairs > COPIES * pairs:
        count = report.duplicate_pairs
        fault(f"{_are(count, 'pair')} a copy of another one ({count / pairs:.0%})", "duplicate_pairs")
    if report.held_out_prompts:
        fault(
            f"{_have(report.held_out_prompts, 'row')} a prompt of the held-out data, so the measurement "
            f"would be of what was learned by heart",
            "held_out_prompts",
        )
    if pairs and report.reference_equals_rejected > 0.5 * pairs:
        share = report.reference_equals_rejected / pairs
        fault(
            f"the reference is the rejected text in {share:.0%} of the pairs: are chosen and rejected "
            f"exchanged?",
            fixable=False,
        )
    if report.rows and report.prompts < MIN_PROMPTS and pairs:
        fault(
            f"{many(report.prompts, 'prompt')}, and at least {MIN_PROMPTS} are needed to learn from some and "
            f"to measure on others: add rows with other prompts",
            fixable=False,
        )
    if fixed:
        return [sentence for sentence, fixable in found if not fixable]
    sentences = [sentence for sentence, _ in found]
    if any(fixable for _, fixable in found):
        sentences.append("Correct these rows, or leave them out with --fix.")
    return sentences


def _notes(report: DataReport) -> list[str]:
    """What does not spoil training, but has to be known."""
    notes = []
    if report.rows and report.empty["reference"] == report.rows:
        notes.append("no row has a reference: the model learns to score without one")
    if report.duplicate_pairs:
        notes.append(f"{_are(report.duplicate_pairs, 'pair')} a copy of another one")
    if report.contradictory_pairs:
        notes.append(f"{_are(report.contradictory_pairs, 'pair')} the opposite of another one")
    if report.ties_left_out:
        notes.append(f"{many(report.ties_left_out, 'tie')} of ranked rows left out")
    if report.pairs and report.reference_equals_chosen > 0.5 * report.pairs:
        share = report.reference_equals_chosen / report.pairs
        notes.append(f"the reference is the chosen text in {share:.0%} of the pairs, which gives it away")
    return notes


def split(path: str, source_split: str, folder: Path, prompts: int, held_out: str | None) -> Result:
    """Divides rows by prompt into what is trained on, what chooses the checkpoint, and what is measured on.

    Args:
        path: Rows of ours.
        source_split: Of a HuggingFace data set.
        folder: For ``train.jsonl``, ``val.jsonl`` and ``held_out.jsonl``.
        prompts: That the rows have.
        held_out: Rows of ours that are the held-out side; None divides some off.
    """
    rest, target = folder / ".rest.jsonl", folder / "held_out.jsonl"
    source = DataSource(path=path, split=source_split)
    if held_out is None:
        share = min(_share(HELD_OUT, prompts), MOST_HELD_OUT / prompts)
        others, measured = _divided(source, rest, target, share, seed=1)
        source, prompts = DataSource(path=str(rest)), others.prompts
    else:
        measured = _copied(DataSource(path=held_out, split=source_split), target)
    share = min(_share(VALIDATION, prompts), MOST_VALIDATION / prompts)
    train, chosen_on = _divided(source, folder / "train.jsonl", folder / "val.jsonl", share, seed=2)
    rest.unlink(missing_ok=True)
    sides = {"train": train, "val": chosen_on, "held_out": measured}
    result: Result = {
        name: {"rows": side.rows, "pairs": side.pairs, "prompts": side.prompts}
        for name, side in sides.items()
    }
    words = ("to train on", "to choose the best checkpoint", "held out")
    counts = (
        f"{many(side.pairs, 'pair')} of {many(side.prompts, 'prompt')} {word}"
        for side, word in zip(sides.values(), words, strict=True)
    )
    return result | {"said": ", ".join(counts)}


def _share(share: float, prompts: int) -> float:
    """More of few prompts, as a side of three measures nothing.

    >>> _share(0.1, 1000), _share(0.1, 100), _share(0.1, 20)
    (0.1, 0.15, 0.25)
    """
    return share if prompts >= 200 else max(share, 0.15) if prompts >= 60 else max(share, 0.25)


def _divided(source: DataSource, train: Path, held: Path, share: float, seed: int) -> tuple[Side, Side]:
    """Splits by prompt; of few prompts, or after an earlier split, by the next seed that works.

    Raises:
        PolarError: A side has no pair, by any seed.
    """
    for attempt in range(5):
        try:
            sides = split_by_prompt([source], train, held, fraction=share, seed=seed + 10 * attempt)
        except DataError:
            raise
        except PolarError:
            if attempt == 4:
                raise
        else:
            if all(side.pairs for side in sides):
                return sides
    raise PolarError(
        "too few of the rows give a pair (of the others all answers are ranked the same) to train on some "
        "and measure on others: add rows"
    )


def _copied(source: DataSource, target: Path) -> Side:
    side, seen = Side(target), set()
    with open_rows(target) as out:
        for row, example in parsed_rows(source):
            if isinstance(example, RowProblem):
                raise DataError(f"held-out data: {example}", [example])
            out.write(row)
            seen.add(example.prompt)
            side.rows += 1
            side.pairs += len(example.pairs)
    if not side.pairs:
        raise PolarError(f"{printable(source.path)}: the held-out data holds no pair to measure on")
    side.prompts = len(seen)
    return side


def part_of(train: Path, target: Path, share: float) -> Result:
    """Writes the rows of a share of the prompts; a larger share has the same prompts and more.

    Args:
        train: All rows to train on.
        target: File to write.
        share: Of the prompts, between 0 and 1.
    """
    pairs = 0
    with open_rows(target) as out:
        for row, example in parsed_rows(DataSource(path=str(train))):
            if not isinstance(example, RowProblem) and is_held_out(example.prompt, share, seed=3):
                out.write(row)
                pairs += len(example.pairs)
    if not pairs:
        raise PolarError(f"{share:.0%} of the training data holds no pair; leave --learning-curve out")
    return {"pairs": pairs, "said": f"{many(pairs, 'pair')} ({share:.0%})"}


def texts_in(path: Path) -> Iterator[str]:
    """All texts of rows of ours."""
    for _, example in parsed_rows(DataSource(path=str(path))):
        if not isinstance(example, RowProblem):
            yield from (example.prompt, *example.references, *example.candidates)


def _characters(report: DataReport) -> int:
    return int(sum(lengths.mean * lengths.count for lengths in report.lengths.values()))


def _share_of(path: str, tell: Tell, what: str) -> Any:
    """Tells how far reading is, by bytes."""
    total = size_in_bytes(path)
    if not total:
        return None
    read_bytes = 0

    def on_bytes(count: int) -> None:
        nonlocal read_bytes
        read_bytes += count
        tell(what, min(1.0, read_bytes / total))

    return on_bytes


def _rows(report: DataReport, finding: str) -> str:
    named = report.named.get(finding, [])
    if not named:
        return ""
    more = ", …" if len(named) > SHOWN_ROWS else ""
    return f" ({', '.join(printable(row) for row in named[:SHOWN_ROWS])}{more})"


def _are(count: int, thing: str) -> str:
    return f"{many(count, thing)} {'is' if count == 1 else 'are'}"


def _have(count: int, thing: str) -> str:
    return f"{many(count, thing)} {'has' if count == 1 else 'have'}"
