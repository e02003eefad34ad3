"""Ranks the candidates of a published example with a reward model and compares with the published ranking.

    python examples/rankings/rank.py strawberry [--model internlm/POLAR-7B] [--server HOST:PORT]

The examples are the JSON files of this folder; README.md gives their sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft import RewardModelClient, RewardScorer
from polar_ft.cli import run
from polar_ft.errors import PolarError

FOLDER = Path(__file__).resolve().parent
DEMO_MODEL = FOLDER.parents[1] / "work_dirs" / "demo" / "alpaca" / "hf"
PUBLISHED_MODEL = "internlm/POLAR-7B"
# The tokenizer of the published folder is Python code; no other code of the folder is run.
TOKENIZER_CODE = ("tokenization_internlm2_fast.InternLM2TokenizerFast",)


class Candidate(BaseModel):
    """One answer.

    Attributes:
        text: The answer.
        about: What is right or wrong with it.
        published: Its reward by POLAR-7B, as published.
    """

    text: str
    about: str
    published: float


class Ranking(BaseModel):
    """A prompt, a reference and the candidates."""

    prompt: str
    reference: str
    candidates: list[Candidate]

    def rows(self) -> list[dict[str, str]]:
        """In the form that `RewardScorer.score` and `RewardModelClient` take."""
        return [
            {"prompt": self.prompt, "reference": self.reference, "output": candidate.text}
            for candidate in self.candidates
        ]


def read_ranking(name: str) -> Ranking:
    """Reads the example of that name."""
    return Ranking.model_validate_json((FOLDER / f"{name}.json").read_bytes())


def same_order(rewards: Sequence[float], published: Sequence[float]) -> tuple[int, int]:
    """Number of pairs that both order in the same way, and number of pairs.

    >>> same_order([3.0, 1.0, 2.0], [0.0, -1.0, -2.0])
    (2, 3)
    """
    pairs = list(combinations(range(len(rewards)), 2))
    agree = sum((rewards[i] - rewards[j]) * (published[i] - published[j]) > 0 for i, j in pairs)
    return agree, len(pairs)


def default_model(console: Console) -> str:
    """POLAR-7B if it has been downloaded, else the model that `make demo` trained.

    Raises:
        PolarError: Neither exists.
    """
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(PUBLISHED_MODEL, "config.json"), str):
        return PUBLISHED_MODEL
    if not DEMO_MODEL.is_dir():
        raise PolarError(
            f"neither {PUBLISHED_MODEL} nor the demo's model is on this machine: run `make demo`, or name a "
            f"model (--model {PUBLISHED_MODEL} downloads 14 GB)"
        )
    console.print(
        f"[yellow]note:[/] {PUBLISHED_MODEL} is not on this machine, so this is the demo's model: two "
        f"layers, trained for a minute, which shows how ranking works and knows nothing. "
        f"--model {PUBLISHED_MODEL} downloads the published one (14 GB).\n",
        soft_wrap=True,
    )
    return str(DEMO_MODEL)


def reward(model: str, server: str | None, rows: Sequence[dict[str, str]]) -> list[float]:
    """Scores rows in this process or with a server."""
    code = TOKENIZER_CODE if model == PUBLISHED_MODEL else ()
    if server is None:
        return RewardScorer.from_pretrained(model, allow_tokenizer_code=code).score(rows)
    with RewardModelClient(model, server_address=server, allow_tokenizer_code=code) as client:
        return client(rows)


def show(ranking: Ranking, rewards: Sequence[float], model: str, console: Console) -> None:
    """Prints the candidates, best reward first, each with its published reward and rank."""
    published = [candidate.published for candidate in ranking.candidates]
    ranks = {value: rank for rank, value in enumerate(sorted(published, reverse=True), 1)}
    table = Table(box=box.SIMPLE, pad_edge=False, show_lines=False)
    table.add_column("reward", justify="right", vertical="top")
    table.add_column("published\nPOLAR-7B", justify="right")
    table.add_column("its\nrank", justify="right")
    table.add_column("candidate", overflow="fold")
    for value, candidate in sorted(zip(rewards, ranking.candidates, strict=True), key=lambda pair: -pair[0]):
        table.add_row(
            f"{value:.3f}",
            f"{candidate.published:.3f}",
            f"{ranks[candidate.published]}",
            f"{escape(candidate.text)}\n[dim]{escape(candidate.about)}[/dim]",
        )
    console.print(f"prompt     {ranking.prompt}\nreference  {ranking.reference}", markup=False)
    console.print(table)
    agree, pairs = same_order(rewards, published)
    console.print(f"{model}: {agree} of {pairs} pairs in the published order", markup=False, soft_wrap=True)


def main(
    name: Annotated[Literal["capital", "strawberry", "rainy_idioms"], typer.Argument(help="The example.")],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Folder or hub id of a reward model. Default: {PUBLISHED_MODEL} if it is on this machine "
            "already, else the demo's model."
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A server that runs the model.")
    ] = None,
) -> None:
    """Ranks the candidates of a published example by a reward model."""
    console = Console(highlight=False)
    ranking, used = read_ranking(name), model or default_model(console)
    show(ranking, reward(used, server, ranking.rows()), used, console)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run(app)
