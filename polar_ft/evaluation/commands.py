"""`polar-ft eval`, which `tools/eval_preference.py` runs too."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from polar_ft.data.reading import DataSource, expand, read_examples
from polar_ft.data.records import Example, Pairing
from polar_ft.errors import PolarError
from polar_ft.evaluation.evaluator import Scorer, count_tokens, score_all
from polar_ft.evaluation.progress import scoring_progress
from polar_ft.evaluation.references import shuffle_references
from polar_ft.evaluation.report import DataFile, Report, RunInfo, build_report, write_report
from polar_ft.evaluation.scores import ScoredPair, scored_pairs
from polar_ft.evaluation.table import TABLE_WIDTH, metrics_table, notes, percent, percent_interval
from polar_ft.template import resolve_folder

DEFAULT_OUT = Path("work_dirs/eval")

# Whose versions decide a score.
_PACKAGES = ("polar-ft", "torch", "transformers", "tokenizers")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="HF_DIR", help="Folder of the exported reward model.")],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Held-out pairs or ranked rows: .jsonl, .jsonl.gz, .parquet, a folder of those, or a "
            "HuggingFace data-set id. With several, rows without a subset count to a subset of their file.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help=f"Where metrics.json and scores.jsonl go; default {DEFAULT_OUT}/<model name>."),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass; lower it when memory runs out.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if any.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: what the folder has on a GPU, float32 on a CPU.")
    ] = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Limit of a whole sequence in tokens; default 16384.")
    ] = None,
    max_response_length: Annotated[
        int | None,
        typer.Option(help="Limit of the reference and of each candidate in tokens; default 4096."),
    ] = None,
    pairing: Annotated[Pairing, typer.Option(help="How ranked rows become pairs.")] = "adjacent",
    split: Annotated[str, typer.Option(help="Split of a HuggingFace data set.")] = "test",
    shuffle_references: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Score once more with references shuffled between rows: is the reference read?",
        ),
    ] = None,
    allow_tokenizer_code: Annotated[
        list[str] | None,
        typer.Option(help="A tokenizer class of the folder whose code may be run; may be repeated."),
    ] = None,
) -> None:
    """Preference accuracy of a reward model on held-out pairs, with a 95 % interval, per subset."""
    stderr = Console(stderr=True)
    out_dir = out or DEFAULT_OUT / Path(model).resolve().name
    folder = resolve_folder(model)
    examples = list(read_examples(_sources(data, split), pairing=pairing))
    n_rows, n_ties = len(examples), sum(example.n_ties for example in examples)
    examples = [example for example in examples if example.pairs]
    if not examples:
        raise PolarError(f"{', '.join(data)}: no pair to score; every ranked row has nothing but ties")
    _prepare(out_dir)

    settings = {
        "tokens_per_batch": batch_tokens,
        "max_length": max_length,
        "max_response_length": max_response_length,
        "allow_tokenizer_code": tuple(allow_tokenizer_code or ()),
    }
    given = {name: value for name, value in settings.items() if value is not None}
    stderr.print(f"loading {folder}", highlight=False, markup=False, soft_wrap=True)
    scorer = load_scorer(folder, device=device, dtype=dtype, **given)
    rows, seconds = score_pairs(scorer, examples, shuffle_seed=shuffle_references, console=stderr)
    passes = 1 if shuffle_references is None else 2
    run = RunInfo(
        model=model,
        data=[DataFile(path=file, sha256=_sha256(file)) for path in data for file in expand(path)],
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={package: found for package in _PACKAGES if (found := _version(package))},
        dtype=str(scorer.dtype).removeprefix("torch."),
        device=str(scorer.device),
        max_length=scorer.template.max_length,
        max_response_length=scorer.template.max_response_length,
        template_fingerprint=scorer.template.fingerprint,
        pairing=pairing,
        n_rows=n_rows,
        n_ties_in_data=n_ties,
        shuffle_seed=shuffle_references,
        seconds=round(seconds, 3),
        pairs_per_second=round(passes * len(rows) / seconds, 3),
    )
    report = build_report(rows, run)
    metrics_file, scores_file = write_report(report, rows, out_dir)
    _show(report, (metrics_file, scores_file))
    if report.metrics.overall.n_scored == 0:
        raise PolarError(
            f"{model}: not one of {len(rows)} pairs has finite scores, so there is no accuracy; see "
            f"{scores_file}. The weights may hold NaN, or the dtype be too narrow: try --dtype float32"
        )


def load_scorer(folder: Path, *, device: str | None, dtype: Dtype, **settings: Any) -> Scorer:
    """The model of a folder, in this process.

    Args:
        folder: The exported model.
        device: Where to run it; None chooses.
        dtype: To compute in; "auto" is the folder's on a GPU and float32 on a CPU.
        **settings: Limits and batch size, as `RewardScorer.from_pretrained` names them.

    Raises:
        PolarError: The folder holds no reward model, or there is no such device.
    """
    # Imported here: `--help`, bad data and a wrong path need no torch.
    import torch

    from polar_ft.scoring.scorer import RewardScorer

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise PolarError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return RewardScorer.from_pretrained(
        folder,
        device=device,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        **settings,
    )


def score_pairs(
    scorer: Scorer, examples: Sequence[Example], *, shuffle_seed: int | None, console: Console
) -> tuple[list[ScoredPair], float]:
    """Scores examples, and once more with shuffled references where a seed is given.

    Args:
        scorer: Gives the rewards.
        examples: What to score.
        shuffle_seed: Of the shuffled references; None leaves that pass out.
        console: Where progress is shown.

    Returns:
        The scored pairs in the order of the data, and the seconds that scoring took.

    Raises:
        PolarError: A row does not fit the model's limits; the message names it.
    """
    with scoring_progress("tokenizing", examples, console) as on_chunk:
        tokens = count_tokens(scorer.template, examples, on_chunk=on_chunk)
    start = time.perf_counter()
    with scoring_progress("scoring", examples, console) as on_chunk:
        scores = score_all(scorer, examples, on_chunk=on_chunk)
    reference_sources, shuffled_scores = None, None
    if shuffle_seed is not None:
        reference_sources = shuffle_references([example.reference for example in examples], shuffle_seed)
        shuffled = [
            replace(example, reference=examples[other].reference)
            for example, other in zip(examples, reference_sources, strict=True)
        ]
        with scoring_progress("scoring with shuffled references", shuffled, console) as on_chunk:
            shuffled_scores = score_all(scorer, shuffled, on_chunk=on_chunk)
    seconds = time.perf_counter() - start
    rows = scored_pairs(
        examples, scores, tokens, shuffled_scores=shuffled_scores, reference_sources=reference_sources
    )
    return list(rows), seconds


def _sources(data: Sequence[str], split: str) -> list[DataSource]:
    """One file keeps its rows' own subsets; of several, each is a subset where rows do not say."""
    return [DataSource(path=path, split=split, subset=path if len(data) > 1 else None) for path in data]


def _prepare(out_dir: Path) -> None:
    """Makes the output folder before hours of scoring, not after them."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        probe = out_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PolarError(
            f"{out_dir}: cannot be written to ({error.strerror or error}); name another folder with --out"
        ) from error


def _show(report: Report, files: Sequence[Path]) -> None:
    console = Console()
    # A pipe has no width of its own, and rich would take 80 columns.
    console.width = min(console.width, TABLE_WIDTH) if console.is_terminal else TABLE_WIDTH
    overall = report.metrics.overall
    console.print(f"\n{report.run.model}", style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"accuracy {percent(overall.accuracy)} %, 95 % interval {percent_interval(overall.accuracy_ci95)}, "
        f"on {overall.n_pairs} held-out pairs\n",
        style="bold",
        highlight=False,
    )
    console.print(metrics_table(report))
    console.print()
    for note in notes(report):
        console.print(note, highlight=False, markup=False)
    for file in files:
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)


def _sha256(file: str) -> str | None:
    path = Path(file)
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
