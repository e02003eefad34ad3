"""From scored pairs to what is kept: `metrics.json` and `scores.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from polar_ft.errors import PolarError
from polar_ft.evaluation.baselines import Baselines, length_baselines
from polar_ft.evaluation.metrics import Summary, summarize
from polar_ft.evaluation.scores import ScoredPair, to_json_line

# How rows without a subset are called where other rows have one.
NO_SUBSET = "(no subset)"

METRICS_FILE = "metrics.json"
SCORES_FILE = "scores.jsonl"


class DataFile(BaseModel):
    """One source of held-out pairs; `sha256` is None for what is no local file."""

    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str | None


class RunInfo(BaseModel):
    """What a figure has to be read with: model, data, settings and versions.

    Attributes:
        model: The model folder, as it was named.
        data: The held-out files, as they were named.
        created: UTC time, ISO 8601.
        versions: Version of each package that decides a score.
        dtype: In which the model computed.
        device: Where it ran.
        max_length: Limit of a whole sequence in tokens.
        max_response_length: Limit of the reference and of each candidate in tokens.
        template_fingerprint: Hash of tokenizer, control tokens and limits.
        pairing: How ranked rows were made into pairs.
        n_rows: Rows of the data.
        n_ties_in_data: Pairs that ranked rows leave out because the data ranks both the same.
        shuffle_seed: Seed of the shuffled references; None where they were not asked for.
        seconds: Time spent scoring, the shuffled pass included.
        pairs_per_second: Over that time, the pairs of both passes counted.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    data: list[DataFile]
    created: str
    versions: dict[str, str]
    dtype: str
    device: str
    max_length: int
    max_response_length: int
    template_fingerprint: str
    pairing: str
    n_rows: int
    n_ties_in_data: int
    shuffle_seed: int | None
    seconds: float
    pairs_per_second: float


class Truncation(BaseModel):
    """Number of pairs of which a field was cut, any field and each."""

    model_config = ConfigDict(frozen=True)

    n_pairs: int
    prompt: int
    reference: int
    chosen: int
    rejected: int


class ShuffledReference(BaseModel):
    """The same figures with references shuffled between rows.

    Attributes:
        n_same_reference: Pairs whose reference text stayed what it was, for want of another one.
        metrics: The figures over all pairs.
    """

    model_config = ConfigDict(frozen=True)

    n_same_reference: int
    metrics: Summary


class Report(BaseModel):
    """All figures of a run: the content of `metrics.json`.

    Attributes:
        schema_version: Raised when a field changes its meaning.
        metrics: The model's figures: overall, macro and of each subset.
        baselines: The rules without a model, on the same pairs.
        shuffled_reference: The figures with shuffled references; None where they were not asked for.
        truncation: What was cut.
        run: Model, data, settings and versions.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    metrics: Summary
    baselines: Baselines
    shuffled_reference: ShuffledReference | None
    truncation: Truncation
    run: RunInfo


def build_report(rows: Sequence[ScoredPair], run: RunInfo) -> Report:
    """Computes every figure from the scored pairs.

    Args:
        rows: The scored pairs.
        run: What is known about the run.
    """
    chosen = [row.chosen_score for row in rows]
    rejected = [row.rejected_score for row in rows]
    subsets = subset_names(rows)
    return Report(
        metrics=summarize(chosen, rejected, subsets),
        baselines=length_baselines(
            [row.chosen_chars for row in rows],
            [row.rejected_chars for row in rows],
            chosen_scores=chosen,
            rejected_scores=rejected,
            subsets=subsets,
        ),
        shuffled_reference=_shuffled(rows, subsets),
        truncation=Truncation(
            n_pairs=sum(bool(row.cut) for row in rows),
            prompt=sum(row.cut.prompt > 0 for row in rows),
            reference=sum(row.cut.reference > 0 for row in rows),
            chosen=sum(row.cut.chosen > 0 for row in rows),
            rejected=sum(row.cut.rejected > 0 for row in rows),
        ),
        run=run,
    )


def subset_names(rows: Iterable[ScoredPair]) -> list[str] | None:
    """The subset of each pair, `NO_SUBSET` where it has none; None where no pair has one."""
    names = [row.subset for row in rows]
    if all(name is None for name in names):
        return None
    return [NO_SUBSET if name is None else name for name in names]


def _shuffled(rows: Sequence[ScoredPair], subsets: Sequence[str] | None) -> ShuffledReference | None:
    scores = [row.shuffled_reference for row in rows if row.shuffled_reference is not None]
    if len(scores) != len(rows):
        return None
    return ShuffledReference(
        n_same_reference=sum(score.same_reference for score in scores),
        metrics=summarize(
            [score.chosen_score for score in scores], [score.rejected_score for score in scores], subsets
        ),
    )


def write_report(report: Report, rows: Iterable[ScoredPair], out_dir: Path) -> tuple[Path, Path]:
    """Writes `metrics.json` and `scores.jsonl`, each whole or not at all.

    Both are written beside their place first and renamed once both are complete, so that a full disk
    leaves what was there before.

    Returns:
        The paths of `metrics.json` and `scores.jsonl`.

    Raises:
        PolarError: They cannot be written.
    """
    metrics, scores = out_dir / METRICS_FILE, out_dir / SCORES_FILE
    # A name of this process's own: two runs into one folder do not write into each other's file.
    unfinished = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (scores, metrics)}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with unfinished[scores].open("wb") as file:
            file.writelines(map(to_json_line, rows))
        unfinished[metrics].write_text(f"{report.model_dump_json(indent=2)}\n", encoding="utf-8")
        for path, temporary in unfinished.items():
            temporary.replace(path)
    except OSError as error:
        raise PolarError(
            f"{out_dir}: the results could not be written ({error.strerror or error}); make room or name "
            f"another folder with --out"
        ) from error
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
    return metrics, scores
