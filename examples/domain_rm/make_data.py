"""Makes a catalogue in which only the reference determines which answer is right.

A customer asks about a product. The reference states the fact in the catalogue's words ("cobalt"), the chosen
answer in a customer's words ("blue"), the rejected answer states the fact of another product ("green"). Which
product has which fact is random, and held-out products do not occur in training, so the prompt does not
reveal it.

Rows come in twins with the same two answers: the chosen one of one row is the rejected one of the other.

    product       reference                chosen              rejected
    Nordby lamp   Finished in cobalt.      It is blue.         The answer: green.
    Tessla chair  The finish is emerald.   The answer: green.  It is blue.

So a model that only uses the answers (their length, their wording, how often an answer is right) is right for
exactly one row of every twin: accuracy 50 %.

    python examples/domain_rm/make_data.py OUT_DIR [--n-train 4000] [--n-held-out 800] [--seed 0]
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer


class Topic(NamedTuple):
    """A topic that customers ask about.

    Attributes:
        questions: Prompts, with ``{product}``.
        entries: References, with ``{fact}``.
        answers: Candidates, with ``{fact}``.
        facts: Words of the catalogue (two for each fact), by the words of a customer.
    """

    questions: tuple[str, ...]
    entries: tuple[str, ...]
    answers: tuple[str, ...]
    facts: dict[str, tuple[str, str]]


TOPICS = {
    "colour": Topic(
        questions=("{product}: what colour?", "{product}: which colour?"),
        entries=("Finished in {fact}.", "The finish is {fact}."),
        answers=("It is {fact}.", "You get it in {fact}.", "The answer: {fact}."),
        facts={
            "red": ("crimson", "scarlet"),
            "blue": ("cobalt", "navy"),
            "green": ("emerald", "olive"),
            "yellow": ("amber", "saffron"),
            "white": ("ivory", "chalk"),
            "black": ("ebony", "jet"),
        },
    ),
    "material": Topic(
        questions=("{product}: what is it made of?", "{product}: which material?"),
        entries=("Worked in {fact}.", "The body is {fact}."),
        answers=("It is {fact}.", "They use {fact}.", "The answer: {fact}."),
        facts={
            "wood": ("oak", "walnut"),
            "metal": ("steel", "brass"),
            "cloth": ("linen", "cotton"),
            "leather": ("suede", "calfskin"),
            "stone": ("marble", "granite"),
            "plastic": ("nylon", "acrylic"),
        },
    ),
    "origin": Topic(
        questions=("{product}: where is it from?", "{product}: which country?"),
        entries=("Assembled in {fact}.", "The workshop is in {fact}."),
        answers=("It is from {fact}.", "They ship it from {fact}.", "The answer: {fact}."),
        facts={
            "France": ("Lyon", "Nantes"),
            "Italy": ("Milan", "Turin"),
            "Japan": ("Kyoto", "Osaka"),
            "Germany": ("Munich", "Bremen"),
            "Norway": ("Oslo", "Bergen"),
            "India": ("Delhi", "Jaipur"),
        },
    ),
    "motif": Topic(
        questions=("{product}: what is painted on it?", "{product}: which motif?"),
        entries=("Painted with a {fact}.", "The motif is a {fact}."),
        answers=("It is a {fact}.", "They paint a {fact}.", "The answer: {fact}."),
        facts={
            "bird": ("finch", "robin"),
            "fish": ("trout", "herring"),
            "dog": ("beagle", "poodle"),
            "horse": ("pony", "stallion"),
            "tree": ("birch", "maple"),
            "flower": ("tulip", "daisy"),
        },
    ),
}

SERIES = (
    "Nordby Tessla Arvik Belmo Corda Dunvar Elsta Fjella Gravo Halden Ilmar Jorna Kestra Lumen Marlo Nivar "
    "Orsa Pellor Quill Runo Sandal Tove Ulven Varde Wiken Ysta Zelda Alba Brisk Celo Domus Erle Fanto Gilda "
    "Hollo Idra"
).split()
THINGS = (
    "lamp chair table shelf clock vase stool bench desk mirror tray bowl basket frame hook ladder rack "
    "screen chest stand cup plate box bed sofa door rug fan kettle jar crib swing globe pot"
).split()


def make_rows(products: list[str], n: int, rng: random.Random) -> Iterator[dict]:
    """Makes rows about the products, in twins; every (product, topic) occurs at most once.

    Args:
        products: Names such as "Nordby lamp".
        n: Number of rows; even, a multiple of twice the number of topics.
        rng: Source of all random choices.

    >>> rows = list(make_rows(["Nordby lamp", "Arvik chair"], 8, random.Random(0)))
    >>> rows[0]["chosen"] == rows[1]["rejected"] and rows[1]["chosen"] == rows[0]["rejected"]
    True
    """
    if n % (2 * len(TOPICS)) or n > len(products) * len(TOPICS):
        raise ValueError(
            f"n={n}: has to be a multiple of {2 * len(TOPICS)}, at most {len(products) * len(TOPICS)}"
        )
    for name, topic in TOPICS.items():
        asked = rng.sample(products, n // len(TOPICS))
        for pair in zip(asked[::2], asked[1::2], strict=True):
            facts = rng.sample(sorted(topic.facts), 2)
            answers = [rng.choice(topic.answers).format(fact=fact) for fact in facts]
            for i, product in enumerate(pair):
                question = rng.choice(topic.questions).format(product=product)
                entry = rng.choice(topic.entries).format(fact=rng.choice(topic.facts[facts[i]]))
                yield {
                    "id": f"{product}/{name}",
                    "subset": name,
                    "prompt": [{"role": "user", "content": question}],
                    "reference": [{"role": "assistant", "content": entry}],
                    "chosen": [{"role": "assistant", "content": answers[i]}],
                    "rejected": [{"role": "assistant", "content": answers[1 - i]}],
                }


def write_data(
    out_dir: str | Path, n_train: int = 4000, n_held_out: int = 800, seed: int = 0
) -> tuple[Path, Path]:
    """Writes ``train.jsonl`` and ``held_out.jsonl``; no product of one is in the other.

    Returns:
        The two files.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    products = [f"{series} {thing}" for series, thing in itertools.product(SERIES, THINGS)]
    rng.shuffle(products)
    n_train_products = n_train // len(TOPICS)
    parts = {
        "train": (products[:n_train_products], n_train),
        "held_out": (products[n_train_products:], n_held_out),
    }
    files = []
    for part, (part_products, n) in parts.items():
        rows = list(make_rows(part_products, n, rng))
        rng.shuffle(rows)
        file = out_dir / f"{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files.append(file)
    return files[0], files[1]


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder for train.jsonl and held_out.jsonl.")],
    n_train: int = 4000,
    n_held_out: int = 800,
    seed: int = 0,
) -> None:
    """Writes the catalogue's preference data."""
    for file in write_data(out_dir, n_train, n_held_out, seed):
        typer.echo(file)


if __name__ == "__main__":
    typer.run(main)
