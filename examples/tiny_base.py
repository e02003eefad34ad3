"""Makes a tiny InternLM2-shaped base model with random weights, for the demo and for tests.

python examples/tiny_base.py OUT_DIR TEXTS.jsonl [MORE.jsonl ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polar_ft.model.tiny_base import make_tiny_base, texts_of


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    files: Annotated[list[Path], typer.Argument(help="Preference files to learn the vocabulary from.")],
    vocab_size: int = 768,
    hidden: int = 64,
    layers: int = 2,
    heads: Annotated[int, typer.Option(help="Attention heads; keys and values have half as many.")] = 4,
    seed: int = 0,
) -> None:
    """Makes a tiny InternLM2-shaped base model with random weights."""
    make_tiny_base(
        out_dir,
        texts_of(files),
        vocab_size=vocab_size,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        seed=seed,
    )
    typer.echo(f"{out_dir}: {layers} layers, width {hidden}, seed {seed}")


if __name__ == "__main__":
    typer.run(main)
