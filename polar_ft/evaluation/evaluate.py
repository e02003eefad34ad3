"""One evaluation: from the names of a model and of data to the report, or to nothing left to do."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from polar_ft.data.reading import DataSource, expand, read_examples
from polar_ft.errors import PolarError
from polar_ft.evaluation.cache import ScoreCache, file_sha256, model_hash, setup_key, tokenizer_hash
from polar_ft.evaluation.evaluator import Scorer
from polar_ft.evaluation.gates import GateResult
from polar_ft.evaluation.references import ReferenceSettings
from polar_ft.evaluation.report.report import DataFile, RunInfo
from polar_ft.evaluation.reporting import report_scores, show_report
from polar_ft.evaluation.result_folder import (
    Evaluation,
    check_free,
    claim,
    finished_report,
    results_sha256,
)
from polar_ft.evaluation.run import score_into
from polar_ft.evaluation.scores import DEFAULT_OUT, SCORES_FILE
from polar_ft.evaluation.scores_file import find_scores
from polar_ft.files import resolve_folder
from polar_ft.options import DtypeName

# Whose versions decide a score.
_PACKAGES = ("polar-ft", "torch", "transformers", "tokenizers")


def report_saved(scores: Path, out_dir: Path, subsets: Sequence[str], *, force: bool) -> None:
    """Computes figures and writes the report of saved scores.

    Args:
        scores: A run's folder, or a file of scores.
        out_dir: Where the report goes.
        subsets: Fields to group by, in addition to "subset".
        force: Whether the results of another evaluation may go.

    Raises:
        PolarError: The scores cannot be used, or the folder holds something else.
    """
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


def score_and_report(
    model: str,
    sources: Sequence[DataSource],
    out: Path | None,
    references: ReferenceSettings,
    subsets: Sequence[str],
    *,
    device: str | None,
    dtype: DtypeName,
    batch_tokens: int | None,
    template: dict[str, Any],
    gates: bool,
    cache_dir: Path | None,
    force: bool,
) -> None:
    """Scores held-out rows and reports, or says that there is nothing left to do.

    Args:
        model: The exported model's folder, or a hub id.
        sources: The held-out rows; of one ``pairing``.
        out: Where everything goes; None names a folder after model and data.
        references: Against which references.
        subsets: Fields to group by, in addition to "subset".
        device: Where to run the model; None chooses.
        dtype: To compute in.
        batch_tokens: Tokens in one forward pass; None takes the default.
        template: Settings of the template; None in them takes the model's own.
        gates: Whether the scorer is checked.
        cache_dir: Where scores are cached; None keeps none.
        force: Whether the results of another evaluation may go.

    Raises:
        PolarError: Model, data or folder cannot be used, no pair has finite scores, or a gate failed.
        KeyboardInterrupt: Of the user; the message says what is kept.
    """
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
        say(f"loading {folder}")
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


def load_scorer(folder: Path, *, device: str | None, dtype: DtypeName, **settings: Any) -> Scorer:
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
    from polar_ft.model.imports import import_decoders

    import_decoders()
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
        say(f"no cache of scores: {folder} cannot be used ({error}); --cache-dir names another folder")
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


def say(text: str) -> None:
    """Prints a line on standard error, as it is."""
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
