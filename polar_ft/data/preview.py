"""One example as the model sees it: token by token, control tokens marked, with what was cut.

What every candidate shares is shown once, then each candidate's own tokens::

    BOS prompt ⏎ reference <|reward|> prompt ⏎ │ candidate [UNUSED_TOKEN_130]
    └───────────── shared prefix ───────────────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from polar_ft.data.reading import DataSource, RowProblem, read_rows
from polar_ft.data.records import Example, parse_row
from polar_ft.errors import DataError, PolarError
from polar_ft.template import Encoded, PolarTemplate

Kind = Literal["text", "control", "cut"]

# How many tokens of a long run are shown from its beginning and from its end.
HEAD, TAIL = 160, 80


@dataclass(frozen=True)
class Token:
    """A token of a preview.

    Attributes:
        id: Its id.
        text: What it stands for; spaces and line ends made visible.
        kind: "control" for a token that text cannot write, "cut" for one that truncation took away.
    """

    id: int
    text: str
    kind: Kind


@dataclass(frozen=True)
class Section:
    """A run of tokens under one title."""

    title: str
    tokens: list[Token]


def read_example(source: DataSource, index: int) -> Example:
    """The example of one row, counted from 0 over all rows.

    Args:
        source: What is read.
        index: Which row.

    Raises:
        DataError: The row cannot be used.
        PolarError: There is no such row or file.
    """
    if index < 0:
        raise PolarError(f"--index {index}: rows are counted from 0")
    rows = read_rows(source.path, source.split, max_line_mb=source.max_line_mb)
    found = next(islice(rows, index, None), None)
    if found is None:
        count = sum(1 for _ in read_rows(source.path, source.split, max_line_mb=source.max_line_mb))
        raise PolarError(f"{source.path}: has no row {index}; its {count:,} rows are 0 to {count - 1:,}")
    place, row = found
    if isinstance(row, RowProblem):
        raise DataError(str(row), [row])
    try:
        return parse_row(row).to_example(place, pairing=source.pairing)
    except PolarError as error:
        raise DataError(f"{place}: {error}") from error


def sections(example: Example, template: PolarTemplate) -> tuple[Encoded, list[Section]]:
    """The tokens of an example, as the model reads them, and between them what was cut.

    Args:
        example: What is shown.
        template: How it is encoded.

    Returns:
        The encoding, with lengths, and its sections: the shared prefix first, then each candidate.

    Raises:
        PolarError: The reference leaves no room for the prompt.
    """
    fields = (example.prompt, example.reference, example.candidates)
    encoded = template.encode(*fields, wrapper=example.wrapper, measure=True)
    whole = encoded
    if encoded.cut:
        # The same without limits: where the two differ is what was cut.
        unlimited = PolarTemplate(
            template.tokenizer_json,
            separator=template.separator,
            reward_token=template.reward_token,
            max_length=2**40,
            max_response_length=2**30,
        )
        whole = unlimited.encode(*fields, wrapper=example.wrapper)

    shown = [
        _sequence(template, kept, full, encoded, number)
        for number, (kept, full) in enumerate(zip(encoded.sequences, whole.sequences, strict=True))
    ]
    shared = _tokens_of_prefix(shown[0], encoded.prefix_length)
    result = [Section("shared prefix", shown[0][:shared])]
    names = _candidate_names(example)
    for name, tokens in zip(names, shown, strict=True):
        result.append(Section(name, tokens[_tokens_of_prefix(tokens, encoded.prefix_length) :]))
    return encoded, result


def _candidate_names(example: Example) -> list[str]:
    if len(example.candidates) == 2 and example.pairs == ((0, 1),):
        names = ["chosen", "rejected"]
    else:
        names = [f"candidate {number}" for number in range(len(example.candidates))]
    if not example.candidate_info:
        return names
    infos = (", ".join(f"{key} {value}" for key, value in info.items()) for info in example.candidate_info)
    return [f"{name} ({info})" if info else name for name, info in zip(names, infos, strict=True)]


def _sequence(
    template: PolarTemplate, kept: Sequence[int], full: Sequence[int], encoded: Encoded, candidate: int
) -> list[Token]:
    """The kept tokens of a sequence, and in their places those that were cut."""
    kept_middle, full_middle = kept.index(template.separator_id), full.index(template.separator_id)
    cut = encoded.cut
    tokens: list[Token] = []
    # Each half is `prompt ⏎ response control`: cut on the left of the prompt and the right of the response.
    halves = (
        (kept[:kept_middle], full[:full_middle], cut.reference, template.separator_id),
        (kept[kept_middle + 1 : -1], full[full_middle + 1 : -1], cut.candidates[candidate], kept[-1]),
    )
    for number, (kept_half, full_half, response_cut, control) in enumerate(halves):
        bos = len(template.bos_ids) if number == 0 else 0
        tokens += [Token(i, name, "control") for i, name in _named(template, kept_half[:bos])]
        tokens += [Token(i, name, "cut") for i, name in _named(template, full_half[bos : bos + cut.prompt])]
        tokens += [Token(i, name, "text") for i, name in _named(template, kept_half[bos:])]
        if response_cut:
            tokens += [Token(i, name, "cut") for i, name in _named(template, full_half[-response_cut:])]
        tokens += [Token(i, name, "control") for i, name in _named(template, [control])]
    return tokens


def _named(template: PolarTemplate, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
    for token_id, name in zip(ids, template.tokens(ids), strict=True):
        # Decoding alone loses the space of "▁the"; the name alone is unreadable in a byte-level vocabulary.
        text = name.replace("▁", " ") if "▁" in name else template.decode([token_id])
        if not text or "\ufffd" in text:  # part of a character
            text = name
        yield token_id, text.replace(" ", "·").replace("\t", "⇥").replace("\r", "␍").replace("\n", "⏎")


def _tokens_of_prefix(tokens: Sequence[Token], prefix_length: int) -> int:
    """How many of the shown tokens, cut ones among them, make up the first kept ones."""
    kept = 0
    for number, token in enumerate(tokens):
        if kept == prefix_length and token.kind != "cut":
            return number
        kept += token.kind != "cut"
    return len(tokens)


def summary_table(example: Example, encoded: Encoded) -> Table:
    """Tokens of each field and what was cut off it."""
    table = Table(title=f"{escape(example.source)}", title_justify="left", title_style="bold")
    for name in ("field", "tokens", "cut", "kept"):
        table.add_column(name, justify="left" if name == "field" else "right")
    lengths, cut = encoded.lengths, encoded.cut
    if lengths is not None:
        names = _candidate_names(example)
        rows = [("prompt (cut on the left)", lengths.prompt, cut.prompt)]
        rows.append(("reference (cut on the right)", lengths.reference, cut.reference))
        rows += zip(names, lengths.candidates, cut.candidates, strict=True)
        for name, length, lost in rows:
            style = "red" if lost else ""
            table.add_row(escape(name), f"{length:,}", f"{lost:,}", f"{length - lost:,}", style=style)
    return table


def section_text(section: Section, *, everything: bool = False, ids: bool = False) -> Text:
    """A section as coloured text; where there is no colour, marks tell the same.

    Tokens are parted by ``│``; a control token stands in ``⟦ ⟧``, a run of cut tokens in ``✂ ✂``.

    Args:
        section: What is shown.
        everything: Show long runs in full.
        ids: Write each token's id behind it.

    >>> tokens = [Token(1, "<s>", "control"), Token(5, "Hi", "text"), Token(6, "·all", "cut")]
    >>> section_text(Section("shared prefix", tokens)).plain
    '⟦<s>⟧│Hi│✂ ·all ✂'
    """
    text = Text()
    for number, (kind, run) in enumerate(_runs(section.tokens)):
        if number:
            text.append("│", style="dim")
        left_out = 0 if everything else len(run) - HEAD - TAIL
        if left_out <= 0:
            _append_run(text, kind, run, ids)
            continue
        _append_run(text, kind, run[:HEAD], ids)
        text.append(f" … {left_out:,} tokens not shown (--all) … ", style="italic yellow")
        _append_run(text, kind, run[-TAIL:], ids)
    return text


def _runs(tokens: Sequence[Token]) -> list[tuple[Kind, list[Token]]]:
    runs: list[tuple[Kind, list[Token]]] = []
    for token in tokens:
        if not runs or runs[-1][0] != token.kind:
            runs.append((token.kind, []))
        runs[-1][1].append(token)
    return runs


_STYLES: dict[Kind, str] = {"text": "", "control": "bold black on bright_yellow", "cut": "red strike"}


def _append_run(text: Text, kind: Kind, run: Sequence[Token], ids: bool) -> None:
    if kind == "cut":
        text.append("✂ ", style="red")
    for number, token in enumerate(run):
        if number:
            text.append("│", style="dim")
        text.append(f"⟦{token.text}⟧" if kind == "control" else token.text, style=_STYLES[kind])
        if ids:
            text.append(f"{token.id}", style="dim cyan")
    if kind == "cut":
        text.append(" ✂", style="red")
