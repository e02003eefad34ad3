"""`polar-ft calibrate`: the range of a model's rewards on data, kept in the model's folder."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polar_ft.data.reading import RowProblem, expand, raise_problems, read_rows
from polar_ft.data.records import RowError, parse_row
from polar_ft.data.score_rows import parse_score_row
from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup, Wrapper
from polar_ft.options import (
    BATCH_TOKENS,
    AllowTokenizerCode,
    BatchTokens,
    Device,
    Dtype,
    ModelFolder,
    Split,
)
from polar_ft.reward_scale import FILE_NAME, RewardScale

QUANTILES = (1, 5, 25, 50, 75, 95, 99)

Rewards = Sequence[Sequence[float]]


def measure_scale(rewards: Rewards, pairs: Sequence[Sequence[tuple[int, int]]]) -> RewardScale:
    """Centre, spread and temperature of rewards; see `RewardScale`.

    Each (prompt, reference) counts the same, however many candidates it has; each pair counts once.

    Args:
        rewards: ``[references][candidates]``, finite.
        pairs: For each reference (chosen, rejected) as indices into its rewards.

    Raises:
        PolarError: The rewards are all the same, or not finite.

    Rewards 1 and 3 of one reference, 5 of another. The centre is (2 + 5) / 2 = 3.5, the spread
    √((2.5² / 2 + 0.5² / 2 + 1.5²) / 2) = √2.75, within the first reference √2:

    >>> scale = measure_scale([[1.0, 3.0], [5.0]], [[(1, 0)], []])
    >>> scale.centre, round(scale.spread, 4), round(scale.within_spread, 4), scale.temperature
    (3.5, 1.6583, 1.4142, None)
    """
    groups = [np.asarray(group, dtype=np.float64) for group in rewards]
    values = np.concatenate(groups)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise PolarError(
            f"{bad} of {len(values)} rewards are not finite: the weights may hold NaN, or the dtype be too "
            f"narrow; try --dtype float32"
        )
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in groups])
    centre = float(np.average(values, weights=weights))
    spread = float(np.sqrt(np.average((values - centre) ** 2, weights=weights)))
    if spread == 0:
        raise PolarError("all rewards are the same: the reward head is not trained, or the data is one text")
    several = [group.var(ddof=1) for group in groups if len(group) > 1]
    margins = np.array(
        [group[a] - group[b] for group, indices in zip(groups, pairs, strict=True) for a, b in indices]
    )
    return RewardScale(
        centre=centre,
        spread=spread,
        within_spread=float(np.sqrt(np.mean(several))) if several else None,
        temperature=_temperature(margins),
        quantiles=_quantiles(values, weights),
        n_rewards=len(values),
        n_references=len(groups),
        n_pairs=len(margins),
    )


def _temperature(margins: np.ndarray) -> float | None:
    from polar_ft.evaluation.statistics.calibration import calibration

    fitted = calibration(margins)
    return None if fitted is None else fitted.temperature


def _quantiles(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    # Rounding can leave the last sum below 1.
    places = np.minimum(np.searchsorted(reached, np.array(QUANTILES) / 100), len(values) - 1)
    return {
        f"p{percent:02}": float(values[order][place])
        for percent, place in zip(QUANTILES, places, strict=True)
    }


def read_groups(paths: Iterable[str], split: str = "train") -> list[TextGroup]:
    """The data by (prompt, reference).

    A row is one that training takes (a pair, or ranked), or one with an ``output``: what a policy sampled.

    Args:
        paths: Files, folders or data-set ids.
        split: Of a HuggingFace data set.

    Raises:
        DataError: A row cannot be used.
    """
    problems: list[RowProblem] = []
    rows: dict[tuple[Wrapper, str, str], list[TextGroup]] = {}
    for path in paths:
        for place, row in read_rows(path, split):
            if isinstance(row, RowProblem):
                problems.append(row)
                continue
            try:
                example: TextGroup = _rollout(row) if "output" in row else parse_row(row).to_example(place)
            except RowError as error:
                problems.append(RowProblem.at(place, error))
            else:
                rows.setdefault(example.key, []).append(example)
    raise_problems(problems)
    return list(map(_joined, rows.values()))


def _joined(rows: Sequence[TextGroup]) -> TextGroup:
    """Rows of one (prompt, reference) as one group; a text that the data repeats is there as often."""
    first = [sum(len(row.candidates) for row in rows[:number]) for number in range(len(rows))]
    return TextGroup(
        prompt=rows[0].prompt,
        references=(rows[0].reference,),
        candidates=tuple(text for row in rows for text in row.candidates),
        wrapper=rows[0].wrapper,
        pairs=tuple((n + a, n + b) for n, row in zip(first, rows, strict=True) for a, b in row.pairs),
    )


def _rollout(row: Mapping[str, Any]) -> TextGroup:
    names = ("prompt", "reference", "output", "wrapper")
    return parse_score_row({name: row[name] for name in names if row.get(name) is not None})


def calibrate(
    model: ModelFolder,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Pairs, ranked rows, or rows of prompt, reference and output, which a policy sampled: "
            "JSON lines, a table, Parquet, a folder, or a HuggingFace data-set id. The temperature "
            "needs pairs.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write.", show_default=f"HF_DIR/{FILE_NAME}")
    ] = None,
    max_references: Annotated[
        int, typer.Option(metavar="N", min=1, help="Measure a random sample of so many (prompt, reference).")
    ] = 5000,
    split: Split = "train",
    batch_tokens: BatchTokens = BATCH_TOKENS,
    device: Device = None,
    dtype: Dtype = "auto",
    allow_tokenizer_code: AllowTokenizerCode = None,
) -> None:
    """Measure the range of a model's rewards, for use in RL.

    Centre, spread and temperature are kept in the model's folder. Nothing applies them by itself:
    scorer, server and client do where they are asked to.
    """
    target = out or Path(model)
    if out is None and not target.is_dir():
        raise PolarError(f"{model}: is no folder here to keep {FILE_NAME} in; name a file with --out")
    groups = read_groups(data, split)
    if len(groups) > max_references:
        groups = random.Random(0).sample(groups, max_references)

    # Imported here: `polar-ft --help`, bad data and a wrong path need no torch.
    from polar_ft.model.imports import import_decoders

    import_decoders()
    from polar_ft.scoring.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(
        model,
        device=device,
        dtype=dtype,
        tokens_per_batch=batch_tokens,
        allow_tokenizer_code=tuple(allow_tokenizer_code or ()),
    )
    console = Console(stderr=True, highlight=False)
    values = iter(scorer.score(_rows(groups, console)))
    rewards = [[next(values) for _ in group.candidates] for group in groups]
    scale = measure_scale(rewards, [group.pairs for group in groups]).model_copy(
        update={
            "dtype": str(scorer.dtype).removeprefix("torch."),
            "data": {file: _sha256(file) for path in data for file in expand(path)},
        }
    )
    written = scale.save(target)
    for line in _summary(scale, groups):
        typer.echo(line)
    typer.echo(str(written))


def _rows(groups: Sequence[TextGroup], console: Console) -> Iterator[dict[str, str]]:
    """The rows that the scorer takes, with a progress bar that advances as it takes them."""
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(len(group.candidates) for group in groups))
        for group in groups:
            for text in group.candidates:
                yield {
                    "prompt": group.prompt,
                    "reference": group.reference,
                    "output": text,
                    "wrapper": group.wrapper,
                }
                bar.advance(task)


def _summary(scale: RewardScale, groups: Sequence[TextGroup]) -> Iterator[str]:
    yield f"{scale.n_rewards} rewards of {scale.n_references} (prompt, reference), {scale.n_pairs} pairs"
    yield (
        f"centre       {scale.centre:10.4f}   mean; 1 % lie below {scale.quantiles['p01']:.4f}, 1 % above "
        + (f"{scale.quantiles['p99']:.4f}")
    )
    within = (
        "" if scale.within_spread is None else f"; {scale.within_spread:.4f} within a (prompt, reference)"
    )
    yield f"spread       {scale.spread:10.4f}   standard deviation{within}"
    if scale.temperature is None:
        yield "temperature        none   it needs pairs, some of them ordered wrongly, most rightly"
    else:
        yield f"temperature  {scale.temperature:10.4f}   σ((a − b) / temperature): chance that a is preferred"
    copies = sum(text == group.reference for group in groups for text in group.candidates)
    if copies:
        yield (
            f"note: {copies} of {scale.n_rewards} candidates are the reference itself, which raises the "
            f"centre; a policy's samples are not"
        )


def _sha256(file: str) -> str:
    """Of a file; empty for a data set."""
    if not os.path.exists(file):
        return ""
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
