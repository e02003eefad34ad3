"""Makes the slice of AlpacaEval 2 in this folder: ranked answers of real models.

It has the prompts whose answers ranked 1, 2, 5 and 10 of 14 all have at most 2,500 characters, with these
four answers. The best one becomes the reference, the others give the pairs 2 > 5 and 5 > 10.

    python examples/data/make_slice.py alpaca_eval_ranked.jsonl.gz examples/data
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated

import typer

from polar_ft.data.split import is_held_out

# Places in the ranking, from 1. The first is the reference; the others are far enough apart for few ties.
RANKS = (1, 2, 5, 10)
MAX_CHARACTERS = 2500
HELD_OUT_FRACTION = 0.35
FILES = {False: "alpaca_train.jsonl", True: "alpaca_held_out.jsonl"}


def slice_row(row: dict) -> dict | None:
    """Reduces a row to the answers of `RANKS`; None if one of them is too long.

    >>> answers = [{"policy": f"m{i}", "content": "a" * i, "score": 1 - i / 20} for i in range(1, 15)]
    >>> [r["policy"] for r in slice_row({"prompt": [], "responses": answers})["responses"]]
    ['m1', 'm2', 'm5', 'm10']
    """
    responses = [row["responses"][rank - 1] for rank in RANKS]
    if max(len(response["content"]) for response in responses) > MAX_CHARACTERS:
        return None
    return {**row, "responses": responses}


def main(
    ranked: Annotated[Path, typer.Argument(help="alpaca_eval_ranked.jsonl.gz: every answer, best first.")],
    out_dir: Annotated[Path, typer.Argument(help="Folder for the two files.")],
) -> None:
    """Writes the training and the held-out part; no prompt is in both."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    with gzip.open(ranked, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = slice_row(json.loads(line))
            if row is not None:
                prompt = "\n".join(message["content"] for message in row["prompt"])
                parts[is_held_out(prompt, HELD_OUT_FRACTION)].append(json.dumps(row, ensure_ascii=False))
    for held_out, rows in parts.items():
        file = out_dir / FILES[held_out]
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        typer.echo(f"{file}: {len(rows)} rows, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
