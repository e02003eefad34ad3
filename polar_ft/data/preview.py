"""One example as the model reads it: token by token, with control tokens and cut tokens marked.

The prefix that all candidates share is shown once, then each candidate's own tokens::

    BOS prompt ⏎ reference <|reward|> prompt ⏎ │ candidate [UNUSED_TOKEN_130]
    └───────────── shared prefix ───────────────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from polar_ft.data.reading import DataSource, RowProblem
from polar_ft.data.records import Example, RowError, parse_row
from polar_ft.errors import DataError, PolarError, printable
from polar_ft.groups import TokenGroup
from polar_ft.template import PolarTemplate

Kind = Literal["text", "control", "cut"]

# Tokens shown from the beginning and from the end of a long run.
HEAD, TAIL = 160, 80


@dataclass(frozen=True)
class Token:
    """A token of a preview.

    Attributes:
        id: Id in the vocabulary.
        text: The text it stands for, with spaces and line ends made visible.
        kind: "control" for a token that no text produces, "cut" for one that truncation removed.
    """

    id: int
    text: str
    kind: Kind


@dataclass(frozen=True)
class TokenRun:
    """Tokens that are shown under one title."""

    title: str
    tokens: list[Token]


def read_example(source: DataSource, index: int) -> Example:
    """Reads the example of one row.

    Args:
        source: The data.
        index: Number of the row, from 0.

    Raises:
        DataError: The row cannot be used.
        PolarError: There is no such row or file.
    """
    if index < 0:
        raise PolarError(f"--index {index}: rows are counted from 0")
    found = next(islice(source.rows(), index, None), None)
    if found is None:
        count = sum(1 for _ in source.rows())
        raise PolarError(f"{source.path}: has no row {index}; its {count:,} rows are 0 to {count - 1:,}")
    place, row = found
    if isinstance(row, RowProblem):
        raise DataError(str(row), [row])
    try:
        return parse_row(row).to_example(place, pairing=source.pairing)
    except RowError as error:
        problem = RowProblem.at(place, error)
        raise DataError(str(problem), [problem]) from error


def token_runs(example: Example, template: PolarTemplate) -> tuple[TokenGroup, list[TokenRun]]:
    """Lists the tokens of an example as the model reads them, and in their places the tokens that were cut.

    Args:
        example: The example to show.
        template: The template that encodes it.

    Returns:
        The encoded group, with lengths, and the tokens to show: the shared prefix first, then each candidate.

    Raises:
        EncodeError: The reference leaves no room for the prompt.
    """
    [encoded] = template.encode([example], measure=True)
    # The difference from the same without limits is what was cut.
    [uncut] = template.with_limits(2**40, 2**30).encode([example]) if encoded.cut else [encoded]
    shown = [
        _sequence(template, kept.tolist(), full.tolist(), encoded, number)
        for number, (kept, full) in enumerate(zip(encoded.sequences, uncut.sequences, strict=True))
    ]
    shared = _tokens_of_prefix(shown[0], len(encoded.prefix))
    result = [TokenRun("shared prefix", shown[0][:shared])]
    names = _candidate_names(example)
    for name, tokens in zip(names, shown, strict=True):
        result.append(TokenRun(name, tokens[_tokens_of_prefix(tokens, len(encoded.prefix)) :]))
    return encoded, result


def _candidate_names(example: Example) -> list[str]:
    if len(example.candidates) == 2 and example.pairs == ((0, 1),):
        names = ["chosen", "rejected"]
    else:
        names = [f"candidate {number}" for number in range(len(example.candidates))]
    if not example.candidate_info:
        return names
    infos = (", ".join(f"{key} {value}" for key, value in info.items()) for info in example.candidate_info)
    return [printable(f"{name} ({info})") if info else name for name, info in zip(names, infos, strict=True)]


def _sequence(
    template: PolarTemplate, kept: Sequence[int], full: Sequence[int], encoded: TokenGroup, candidate: int
) -> list[Token]:
    """The tokens of a sequence that were kept, and in their places those that were cut."""
    kept_middle, full_middle = kept.index(template.separator_id), full.index(template.separator_id)
    cut = encoded.cut
    tokens: list[Token] = []
    # Each half is `prompt ⏎ response control`, cut at the left of the prompt and at the right of the
    # response.
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


def _named(template: PolarTemplate, ids: Sequence[int]) -> list[tuple[int, str]]:
    names = template.tokens(ids)
    named: list[tuple[int, str]] = []
    while len(named) < len(ids):
        at = len(named)
        # A character of several tokens is shown at the first of them; the others are shown as ‥.
        for width in range(1, min(4, len(ids) - at) + 1):
            text = template.decode(ids[at : at + width])
            if text and "\ufffd" not in text:
                break
        else:
            text, width = names[at], 1
        if "▁" in names[at] and width == 1:  # decoding alone would lose the space of "▁the"
            text = names[at].replace("▁", " ")
        texts = [_visible(text)] + ["‥"] * (width - 1)
        named += zip(ids[at : at + width], texts, strict=True)
    return named


def _visible(text: str) -> str:
    shown = text.replace(" ", "·").replace("\t", "⇥").replace("\r", "␍").replace("\n", "⏎")
    return printable(shown)


def _tokens_of_prefix(tokens: Sequence[Token], prefix_length: int) -> int:
    """Number of shown tokens, cut ones included, up to the end of the prefix.

    >>> _tokens_of_prefix([Token(1, "a", "cut"), Token(2, "b", "text"), Token(3, "c", "cut")], 1)
    2
    """
    kept = 0
    for number, token in enumerate(tokens):
        if kept == prefix_length:
            return number
        kept += token.kind != "cut"
    return len(tokens)


def summary_table(example: Example, encoded: TokenGroup) -> Table:
    """Table of the tokens of each field: in all, cut, and kept."""
    table = Table(box=None, pad_edge=False)
    for name in ("field", "tokens", "cut", "kept"):
        table.add_column(name, justify="left" if name == "field" else "right", header_style="dim")
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


def run_text(run: TokenRun, *, width: int = 100, everything: bool = False, ids: bool = False) -> Text:
    """Formats tokens as coloured text that is also readable without colours.

    ``│`` separates tokens, ``⟦ ⟧`` encloses a control token, ``✂ ✂`` encloses tokens that were cut.

    Args:
        run: The tokens.
        width: Characters per line.
        everything: Show long runs in full.
        ids: Append each token's id, in small digits.

    >>> tokens = [Token(1, "<s>", "control"), Token(5, "Hi", "text"), Token(6, "·all", "cut")]
    >>> run_text(TokenRun("shared prefix", tokens)).plain
    '  ⟦<s>⟧│Hi│✂·all✂'
    """
    text = Text("  ")
    column, at_start = 2, True
    for piece in _pieces(run.tokens, everything, ids):
        if piece is None or (not at_start and column + 1 + piece.cell_len > width):
            text.append("\n  ")
            column, at_start = 2, True
        if piece is None:
            continue
        if not at_start:
            text.append("│", style="dim")
            column += 1
        text.append_text(piece)
        column, at_start = column + piece.cell_len, False
    return text


_STYLES: dict[Kind, str] = {"text": "", "control": "bold black on bright_yellow", "cut": "red strike"}


_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _pieces(tokens: Sequence[Token], everything: bool, ids: bool) -> Iterator[Text | None]:
    """The text of each token, in order, long runs of a kind shortened; None begins a new line."""
    for kind, group in groupby(tokens, key=lambda token: token.kind):
        same_kind = list(group)
        left_out = range(HEAD, len(same_kind) - TAIL) if not everything else range(0)
        for number, token in enumerate(same_kind):
            if number in left_out:
                if number == HEAD:
                    yield None
                    yield Text(f"… {len(left_out):,} tokens not shown (--all) …", style="italic yellow")
                    yield None
                continue
            piece = Text(f"⟦{token.text}⟧" if kind == "control" else token.text, style=_STYLES[kind])
            if ids:
                piece = Text.assemble(piece, (str(token.id).translate(_SUBSCRIPT), "cyan"))
            if kind == "cut" and number == 0:
                piece = Text.assemble(("✂", "red"), piece)
            if kind == "cut" and number == len(same_kind) - 1:
                piece = Text.assemble(piece, ("✂", "red"))
            yield piece
