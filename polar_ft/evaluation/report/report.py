"""The report of an evaluation as data: the content of `metrics.json`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.figures import Figures
from polar_ft.evaluation.gates import GateResult

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
        engine: What computed the scores, or what they were read from.
        data: The held-out files, or the file of scores, as they were named.
        results_sha256: Hash of the files of scores that the figures are of.
        subset_by: Fields whose values the figures are reported by.
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
        seconds: Time spent scoring, all passes and all parts of an interrupted run included.
        pairs_per_second: Over that time, the pairs of all passes counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | None
    model_sha256: str | None = None
    engine: str | None = None
    data: list[DataFile]
    results_sha256: str | None = None
    subset_by: list[str] = []
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
