"""`polar-ft eval` and `polar-ft eval compare`, which `tools/eval_preference.py` runs too."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from polar_ft.data.reading import DataSource, expand, read_examples
from polar_ft.errors import PolarError
from polar_ft.evaluation.cache import (
    DEFAULT_CACHE,
    ScoreCache,
    file_sha256,
    model_hash,
    setup_key,
    tokenizer_hash,
)
from polar_ft.evaluation.evaluator import Scorer
from polar_ft.evaluation.gates import GateResult
from polar_ft.evaluation.references import Aggregation, ReferenceSettings
from polar_ft.evaluation.scores import SCORES_FILE
from polar_ft.files import resolve_folder
from polar_ft.groups import Pairing as PairingName
from polar_ft.options import (
    AllowTokenizerCode,
    Device,
    Dtype,
    MaxLength,
    MaxResponseLength,
    Pairing,
    Split,
)

DEFAULT_OUT = Path("work_dirs/eval")

# Whose versions decide a score.
_PACKAGES = ("polar-ft", "torch", "transformers", "tokenizers")


class _RunUnlessNamed(TyperGroup):
    """A group of commands whose first one needs no name: ``polar-ft eval HF_DIR DATA …``.

    A model folder that is called like a command is named with its path: ``./compare``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=_RunUnlessNamed,
    help="Preference accuracy of a reward model on held-out pairs; `eval compare A B` compares runs.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@eval_app.command("run")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="HF_DIR", help="Folder of the exported reward model.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA…",
            help="Held-out pairs or ranked rows: .jsonl, .jsonl.gz, .parquet, a folder of those, or a "
            "HuggingFace data-set id. With several, rows without a subset count to a subset of their file.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"Where the scores, figures and the report of this one evaluation go. (default: a folder in "
            f"{DEFAULT_OUT} named after model and data) An interrupted run resumes with the same command."
        ),
    ] = None,
    from_scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Figures and report of saved scores, without a model: a run's folder, a table with "
            "chosen_score and rejected_score (or such names), or results of RewardBench, RMB or JudgeBench; "
            "JSON, Parquet or CSV. Needs --out.",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass; lower it when memory runs out.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    max_response_length: MaxResponseLength = None,
    pairing: Pairing = "adjacent",
    split: Split = "test",
    subset_by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="Also figures by the values of this field of the rows, e.g. language or meta.source; may be "
            "repeated.",
        ),
    ] = None,
    reference_aggregation: Annotated[
        Aggregation, typer.Option(help="The score of a candidate where its row has several references.")
    ] = "mean",
    shuffle_references: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Score once more with references shuffled between rows: is the reference read?",
        ),
    ] = None,
    empty_references: Annotated[
        bool, typer.Option("--empty-references", help="Score once more with empty references.")
    ] = False,
    no_gates: Annotated[
        bool, typer.Option("--no-gates", help="Leave out the checks of the scorer on a sample of the pairs.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute every score again, and keep none for later runs.")
    ] = False,
    cache_dir: Annotated[
        Path, typer.Option(envvar="POLAR_FT_CACHE", help="Where scores are cached.")
    ] = DEFAULT_CACHE,
    allow_tokenizer_code: AllowTokenizerCode = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the results of another evaluation in --out.")
    ] = False,
) -> None:
    """Preference accuracy of a reward model on held-out pairs, with 95 % intervals, and a report.

    polar-ft eval HF_DIR DATA…: score and report. polar-ft eval --from-scores FILE --out DIR: report alone.
    polar-ft eval compare A B: which of two runs is better.
    """
    subsets = tuple(subset_by or ())
    if from_scores is not None:
        if model is not None or data:
            raise PolarError("--from-scores needs no model and no data; leave HF_DIR and DATA out")
        if out is None:
            raise PolarError("--from-scores needs --out DIR: where the figures and the report go")
        _report_saved(from_scores, out, subsets, force)
        return
    if model is None or not data:
        raise PolarError(
            "name a model folder and held-out data: polar-ft eval HF_DIR DATA… (or --from-scores)"
        )
    references = ReferenceSettings(reference_aggregation, shuffle_references, empty_references)
    template = {
        "max_length": max_length,
        "max_response_length": max_response_length,
        "allow_tokenizer_code": tuple(allow_tokenizer_code or ()),
    }
    try:
        _score_and_report(
            model,
            _sources(data, split, pairing),
            out,
            references,
            subsets,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            template=template,
            gates=not no_gates,
            cache_dir=None if no_cache else cache_dir,
            force=force,
        )
    except KeyboardInterrupt as stopped:
        kept = str(stopped) or "what was scored before is kept"
        _say(f"interrupted: {kept}; the same command resumes")
        raise typer.Exit(130) from None


def _report_saved(scores: Path, out_dir: Path, subsets: tuple[str, ...], force: bool) -> None:
    """Figures and report of saved scores."""
    # Imported here, as below: `--help` needs none of it.
    from polar_ft.evaluation.report.report import DataFile, RunInfo
    from polar_ft.evaluation.reporting import report_scores
    from polar_ft.evaluation.result_folder import Evaluation, check_free, claim
    from polar_ft.evaluation.scores_file import find_scores

    saved = str(find_scores(scores))
    files = [DataFile(path=saved, sha256=_sha256(saved))]
    evaluation = Evaluation(data=files, settings={"from_scores": True})
    if (out_dir / SCORES_FILE).resolve() == Path(saved).resolve():
        raise PolarError(f"{out_dir}: is the folder of the scores; name another one with --out")
    check_free(out_dir, evaluation, replace=force)
    _prepare(out_dir)

    def claim_folder() -> None:
        claim(out_dir, evaluation, replace=force)

    run = RunInfo(model=None, data=files, created=_now(), versions=_versions(), n_rows=0)
    report_scores(scores, out_dir, subsets, run, before_writing=claim_folder)


def _score_and_report(
    model: str,
    sources: Sequence[DataSource],
    out: Path | None,
    references: ReferenceSettings,
    subsets: tuple[str, ...],
    *,
    device: str | None,
    dtype: Dtype,
    batch_tokens: int | None,
    template: dict[str, Any],
    gates: bool,
    cache_dir: Path | None,
    force: bool,
) -> None:
    """Scores and reports, or says that there is nothing left to do."""
    from polar_ft.evaluation.report.report import DataFile, RunInfo
    from polar_ft.evaluation.reporting import report_scores, show_report
    from polar_ft.evaluation.result_folder import Evaluation, check_free, finished_report, results_sha256
    from polar_ft.evaluation.run import score_into

    folder = resolve_folder(model)
    _refuse_training_folder(folder)
    names = [source.path for source in sources]
    files = [DataFile(path=file, sha256=_sha256(file)) for name in names for file in expand(name)]
    with _opened_cache(cache_dir) as cache:
        weights = model_hash(folder, cache)
        evaluation = Evaluation(
            model=model,
            model_hash=None if weights is None else setup_key((weights, tokenizer_hash(folder))),
            data=files,
            settings={
                "pairing": sources[0].pairing,
                # Of one file they have no effect: it keeps its rows' own subsets, and it is no data set.
                "subsets_by_file": names if len(names) > 1 else None,
                "split": sources[0].split if any(file.sha256 is None for file in files) else None,
                "device": device or _default_device(),
                "dtype": dtype,
                "max_length": template["max_length"],
                "max_response_length": template["max_response_length"],
                "reference_aggregation": references.aggregation,
                "shuffle_references": references.shuffle_seed,
                "empty_references": references.empty,
            },
        )
        out_dir = out or DEFAULT_OUT / evaluation.folder_name()
        if cache_dir is not None:
            report = finished_report(out_dir, evaluation, subsets, gates=gates, versions=_versions())
            if report is not None:
                show_report(report, out_dir, "up to date:")
                return
        check_free(out_dir, evaluation, replace=force)
        examples = list(read_examples(sources))
        n_rows, n_ties = len(examples), sum(example.n_ties for example in examples)
        examples = [example for example in examples if example.pairs]
        if not examples:
            raise PolarError(f"{', '.join(names)}: no pair to score; every ranked row has nothing but ties")
        _prepare(out_dir)
        given = {name: value for name, value in template.items() if value is not None}
        if batch_tokens is not None:
            given["tokens_per_batch"] = batch_tokens
        _say(f"loading {folder}")
        scorer = load_scorer(folder, device=device, dtype=dtype, **given)
        computes_in = str(scorer.dtype).removeprefix("torch.")
        run = score_into(
            out_dir,
            scorer,
            examples,
            references,
            setup=setup_key(
                (
                    weights or str(folder.resolve()),
                    computes_in,
                    str(scorer.device).partition(":")[0],
                    scorer.template.fingerprint,
                )
            ),
            # Without weights there is nothing by which a changed model would be noticed.
            cache=cache if weights is not None else None,
            gates=gates,
            console=Console(stderr=True),
            evaluation=evaluation,
            replace=force,
        )
    report = report_scores(
        out_dir,
        out_dir,
        subsets,
        RunInfo(
            model=model,
            model_sha256=weights,
            engine=f"{type(scorer).__module__}.{type(scorer).__qualname__}",
            data=files,
            results_sha256=results_sha256(out_dir),
            subset_by=list(subsets),
            created=_now(),
            versions=_versions(),
            dtype=computes_in,
            device=str(scorer.device),
            max_length=scorer.template.max_length,
            max_response_length=scorer.template.max_response_length,
            template_fingerprint=scorer.template.fingerprint,
            pairing=sources[0].pairing,
            reference_aggregation=references.aggregation,
            n_rows=n_rows,
            n_ties_in_data=n_ties,
            shuffle_seed=references.shuffle_seed,
            n_from_cache=run.n_from_cache,
            seconds=round(run.seconds, 3),
            pairs_per_second=_rate(run.n_pairs_scored, run.seconds, references),
        ),
        gates=run.gates,
        examples=examples,
        template=scorer.template,
    )
    overall = report.metrics.overall
    if overall.n_scored == 0:
        raise PolarError(
            f"{model}: not one of {overall.n_pairs} pairs has finite scores, so there is no accuracy; see "
            f"{out_dir / SCORES_FILE}. The weights may hold NaN, or the dtype be too narrow: try "
            f"--dtype float32"
        )
    _fail_on_gates(run.gates)


def _rate(n_pairs: int, seconds: float, references: ReferenceSettings) -> float | None:
    """Pairs/s, those of every pass over the data counted; None where nothing was scored."""
    passes = 1 + (references.shuffle_seed is not None) + references.empty
    return round(passes * n_pairs / seconds, 3) if seconds else None


@eval_app.command("compare")
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B…", help="Folders of runs, or files of scores. A is what the others are held against."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder in which compare.json goes.")] = DEFAULT_OUT,
    subset_by: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Also by the values of this field of A's rows; may be repeated."),
    ] = None,
) -> None:
    """Which of two runs is better on the same pairs? Difference of accuracy with interval and p-value."""
    from polar_ft.evaluation.comparing import compare_runs

    compare_runs(runs, out, tuple(subset_by or ()))


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
    from polar_ft.scoring.scorer import RewardScorer

    return RewardScorer.from_pretrained(folder, device=device, dtype=dtype, **settings)


@contextmanager
def _opened_cache(folder: Path | None) -> Iterator[ScoreCache | None]:
    """The cache; None where none is wanted or it cannot be used, which is no reason to score nothing."""
    if folder is None:
        yield None
        return
    try:
        cache = ScoreCache(folder.expanduser())
    except (OSError, sqlite3.Error) as error:
        _say(f"no cache of scores: {folder} cannot be used ({error}); --cache-dir names another folder")
        yield None
        return
    with cache:
        yield cache


def _fail_on_gates(gates: Sequence[GateResult]) -> None:
    failed = [gate for gate in gates if gate.status == "failed"]
    if failed:
        found = " ".join(f"{gate.name}: {gate.text}" for gate in failed)
        raise PolarError(
            f"the scores failed a check of their own, so do not trust the figures (the files are written, to "
            f"look at). {found}"
        )


def _sources(data: Sequence[str], split: str, pairing: PairingName) -> list[DataSource]:
    """One file keeps its rows' own subsets; of several, each is a subset where rows do not say."""
    several = len(data) > 1
    return [
        DataSource(path=path, split=split, pairing=pairing, subset=path if several else None) for path in data
    ]


def _refuse_training_folder(folder: Path) -> None:
    """Raises a `PolarError` for the work folder of a training run, which holds checkpoints and no model."""
    if (folder / "config.json").is_file():
        return
    checkpoints = sorted(folder.glob("*.pth"), key=lambda file: file.stat().st_mtime)
    if not checkpoints:
        return
    config = next(iter(sorted(folder.glob("*.py"))), "CONFIG")
    best = [file for file in checkpoints if file.name.startswith("best_")]
    raise PolarError(
        f"{folder}: is the folder of a training run, and its checkpoints have to be converted first: "
        f"polar-ft convert {config} {(best or checkpoints)[-1]} HF_DIR"
    )


def _default_device() -> str:
    """Which kind of device is taken where none is named, without the seconds that torch takes to say it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "gpu" if not hidden and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))) else "cpu"


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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


def _sha256(file: str) -> str | None:
    return file_sha256(Path(file)) if Path(file).is_file() else None


def _versions() -> dict[str, str]:
    return {package: found for package in _PACKAGES if (found := _version(package))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
