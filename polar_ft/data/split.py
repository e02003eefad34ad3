"""Splits rows into training and held-out ones by prompt."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from polar_ft.data.reading import DataSource, OnBytes, RowProblem, parsed_rows, raise_problems
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError


@dataclass
class Side:
    """Counts of one side of a split.

    Attributes:
        path: The file.
        rows: Rows in it.
        pairs: Pairs that the rows give.
        prompts: Distinct prompts in it.
        subsets: Number of rows of each subset; None for rows without one.
    """

    path: Path
    rows: int = 0
    pairs: int = 0
    prompts: int = 0
    subsets: Counter[str | None] = field(default_factory=Counter)


def is_held_out(prompt: str, fraction: float, seed: int = 0) -> bool:
    """Whether a prompt belongs to the held-out side; depends only on its text and the seed.

    So a prompt is on the same side in every file and in every order of rows, and a larger fraction holds out
    the same prompts and more. Runs of white space count as one space.

    Args:
        prompt: Text of the prompt.
        fraction: Share of prompts that is held out, from 0 to 1; met approximately.
        seed: Another seed holds out other prompts.

    >>> is_held_out("What is 2 + 2?", 0.5), is_held_out("What  is 2 + 2?", 0.5), is_held_out("Hi", 0.5)
    (True, True, False)
    """
    return prompt_key(prompt, seed) < fraction * 2**64


def prompt_key(prompt: str, seed: int = 0) -> int:
    """A number of 64 bits that is the same for prompts that differ in white space only.

    >>> prompt_key("What is 2 + 2?") == prompt_key("What  is 2 + 2? ")
    True
    """
    digest = hashlib.blake2b(f"{seed}\n{' '.join(prompt.split())}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def split_by_prompt(
    sources: Iterable[DataSource],
    train_path: Path,
    held_out_path: Path,
    *,
    fraction: float,
    seed: int = 0,
    on_bytes: OnBytes | None = None,
) -> tuple[Side, Side]:
    """Writes every row unchanged to one of two files, so that no prompt is in both.

    Args:
        sources: The data.
        train_path: File for training rows.
        held_out_path: File for held-out rows.
        fraction: Share of prompts that is held out, between 0 and 1.
        seed: See `is_held_out`.
        on_bytes: See `polar_ft.data.reading.read_rows`.

    Raises:
        DataError: Rows cannot be used; nothing is written.
        PolarError: One of the sides would be empty; nothing is written.
    """
    if not 0 < fraction < 1:
        raise PolarError(f"fraction {fraction}: must lie between 0 and 1, for instance 0.1")
    train, held_out = Side(train_path), Side(held_out_path)
    seen: set[bytes] = set()
    problems: list[RowProblem] = []
    with ExitStack() as stack:
        train_rows = stack.enter_context(open_rows(train_path))
        held_out_rows = stack.enter_context(open_rows(held_out_path))
        for source in sources:
            for row, example in parsed_rows(source, on_bytes=on_bytes):
                if isinstance(example, RowProblem):
                    problems.append(example)
                    continue
                held = is_held_out(example.prompt, fraction, seed)
                side, out = (held_out, held_out_rows) if held else (train, train_rows)
                out.write(row)
                prompt = hashlib.blake2b(example.prompt.encode(), digest_size=16).digest()
                side.prompts += prompt not in seen
                seen.add(prompt)
                side.rows += 1
                side.pairs += len(example.pairs)
                side.subsets[example.subset] += 1
        raise_problems(problems)
        for side, name, share in ((train, "training", 1 - fraction), (held_out, "held-out", fraction)):
            if not side.rows:
                raise PolarError(f"the {name} side is empty: {_why_empty(len(seen), share, seed)}")
    return train, held_out


def _why_empty(prompts: int, share: float, seed: int) -> str:
    """Why not one of so many prompts is on a side that gets this share of them.

    >>> _why_empty(1, 0.1, seed=0)
    '1 prompt is too few to hold some out; add rows with other prompts'
    >>> _why_empty(20, 0.1, seed=0)
    '20 prompts are too few for this share; choose another --fraction or --seed, or add rows'
    >>> _why_empty(276, 0.1, seed=3)[:63]  # by chance in 2 of 10 trillion cases
    'these 276 prompts are one side of an earlier split with seed 3;'
    """
    if prompts == 1:
        return "1 prompt is too few to hold some out; add rows with other prompts"
    if (1 - share) ** prompts > 1e-4:
        other = "choose another --fraction or --seed, or add rows"
        return f"{prompts:,} prompts are too few for this share; {other}"
    return (
        f"these {prompts:,} prompts are one side of an earlier split with seed {seed}; its other file has "
        f"the rest, and another --seed splits them again"
    )
