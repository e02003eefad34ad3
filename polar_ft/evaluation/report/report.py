"""What is kept of a run: `metrics.json`, `report.html`, `report.md` and `plots/`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from polar_ft.errors import PolarError
from polar_ft.evaluation.figures import Figures
from polar_ft.evaluation.gates import GateResult
from polar_ft.evaluation.pairs import PairTable
from polar_ft.evaluation.report.worst import WorstPair

METRICS_FILE = "metrics.json"
SCORES_FILE = "scores.jsonl"
HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"
PLOTS_FOLDER = "plots"


class DataFile(BaseModel):
    """One source of held-out pairs; `sha256` is None for what is no local file."""

    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str | None


class RunInfo(BaseModel):
    """What a figure has to be read with: model, data, settings and versions.

    What is None is not known, as most is where the scores come from another tool.

    Attributes:
        model: The model folder, as it was named.
        model_sha256: Hash of its weights.
        engine: What computed the scores.
        data: The held-out files, or the file of scores, as they were named.
        created: UTC time, ISO 8601.
        versions: Version of each package that decides a score.
        dtype: In which the model computed.
        device: Where it ran.
        max_length: Limit of a whole sequence in tokens.
        max_response_length: Limit of the reference and of each candidate in tokens.
        template_fingerprint: Hash of tokenizer, control tokens and limits.
        pairing: How ranked rows were made into pairs.
        reference_aggregation: How scores under several references of a row became one.
        n_rows: Rows of the data.
        n_ties_in_data: Pairs that ranked rows leave out because the data ranks both the same.
        shuffle_seed: Seed of the shuffled references; None where they were not asked for.
        n_same_reference: Pairs whose reference text stayed what it was, for want of another one.
        n_from_cache: Candidates whose score was known from an earlier run.
        seconds: Time spent scoring, all passes included.
        pairs_per_second: Over that time, the pairs of all passes counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | None
    model_sha256: str | None = None
    engine: str | None = None
    data: list[DataFile]
    created: str
    versions: dict[str, str]
    dtype: str | None = None
    device: str | None = None
    max_length: int | None = None
    max_response_length: int | None = None
    template_fingerprint: str | None = None
    pairing: str | None = None
    reference_aggregation: str | None = None
    n_rows: int
    n_ties_in_data: int = 0
    shuffle_seed: int | None = None
    n_same_reference: int | None = None
    n_from_cache: int | None = None
    seconds: float | None = None
    pairs_per_second: float | None = None


class Truncation(BaseModel):
    """Number of pairs of which a field was cut, any field and each."""

    model_config = ConfigDict(frozen=True)

    n_pairs: int
    prompt: int
    reference: int
    chosen: int
    rejected: int


class Report(BaseModel):
    """All figures of a run: the content of `metrics.json`.

    Attributes:
        schema_version: Raised when a field changes its meaning.
        metrics: The figures.
        gates: What the run checked of itself; empty where nothing was scored.
        warnings: What was noticed when the data or the scores were read.
        truncation: What was cut; None where that is not known.
        run: Model, data, settings and versions.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 2
    metrics: Figures
    gates: list[GateResult] = []
    warnings: list[str] = []
    truncation: Truncation | None = None
    run: RunInfo


def write_report(
    report: Report,
    table: PairTable,
    out_dir: Path,
    *,
    worst: Sequence[WorstPair] = (),
) -> list[Path]:
    """Writes `metrics.json`, `report.html`, `report.md` and `plots/*.png`.

    Each is whole or not written at all: they are written into a folder beside their place first and moved
    once all are complete, so that a full disk leaves what was there before.

    Args:
        report: The figures.
        table: The pairs that they are over, for the plots.
        out_dir: Where the files go; made where it is missing.
        worst: The pairs to show with their texts, see `polar_ft.evaluation.report.worst.worst_pairs`.

    Returns:
        The paths of the files, `metrics.json` first, without the plots.

    Raises:
        PolarError: They cannot be written.
    """
    # Imported here: they bring matplotlib and jinja2, which a table on the screen does not need.
    from polar_ft.evaluation.report.pages.html import html_report
    from polar_ft.evaluation.report.pages.markdown import markdown_report
    from polar_ft.evaluation.report.plots.drawing import to_png
    from polar_ft.evaluation.report.plots.plots import make_plots

    plots = make_plots(report, table)
    contents = {
        METRICS_FILE: f"{report.model_dump_json(indent=2)}\n",
        HTML_FILE: html_report(report, plots, worst),
        MARKDOWN_FILE: markdown_report(report),
    }
    # A name of this process's own: two runs into one folder do not write into each other's files.
    unfinished = out_dir / f".unfinished.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        (unfinished / PLOTS_FOLDER).mkdir(exist_ok=True)
        for plot in plots:
            (unfinished / PLOTS_FOLDER / f"{plot.name}.png").write_bytes(to_png(plot))
        for name in contents:
            (unfinished / name).replace(out_dir / name)
        # Plots of an earlier run must not stand beside this one's figures.
        shutil.rmtree(out_dir / PLOTS_FOLDER, ignore_errors=True)
        (unfinished / PLOTS_FOLDER).replace(out_dir / PLOTS_FOLDER)
    except OSError as error:
        raise PolarError(
            f"{out_dir}: the results could not be written ({error.strerror or error}); make room or name "
            f"another folder with --out"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [out_dir / name for name in contents]
