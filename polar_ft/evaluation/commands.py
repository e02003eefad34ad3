"""`polar-ft eval` and `polar-ft eval compare`, which `tools/eval_preference.py` runs too."""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from polar_ft.data.reading import DataSource, expand, read_examples
from polar_ft.errors import PolarError
from polar_ft.evaluation.cache import DEFAULT_CACHE, ScoreCache, file_sha256, model_hash, setup_key
from polar_ft.evaluation.evaluator import Scorer
from polar_ft.evaluation.gates import GateResult
from polar_ft.evaluation.references import Aggregation, ReferenceSettings
from polar_ft.evaluation.scores import SCORES_FILE
from polar_ft.files import resolve_folder
from polar_ft.options import (
    APP_SETTINGS,
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
            close = difflib.get_close_matches(args[0], self.commands) if args else []
            if close and not Path(args[0]).exists():
                ctx.fail(f"No such folder or command {args[0]!r}. Did you mean {close[0]!r}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)


class _CalledAsTheGroup(TyperCommand):
    """A command that help and errors call by the name of its group."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return super().make_context(parent.info_name, args, parent.parent, **extra)


eval_app = typer.Typer(
    cls=_RunUnlessNamed,
    help="Score held-out pairs, or compare two runs (eval compare A B).",
    **APP_SETTINGS,
)


@eval_app.command("run", cls=_CalledAsTheGroup, context_settings=APP_SETTINGS["context_settings"])
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="HF_DIR", help="Folder of the exported reward model.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Held-out pairs or ranked rows: .jsonl, .jsonl.gz, .parquet, a folder of those, or a "
            "HuggingFace data-set id. With several, rows without a subset count to a subset of their file.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the scores, figures and the report go. An interrupted run resumes with the same "
            "command.",
            show_default=f"{DEFAULT_OUT}/MODEL",
        ),
    ] = None,
    from_scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Figures and report of saved scores, without a model: a run's folder or scores.jsonl, or "
            "JSON lines or CSV with chosen_score and rejected_score. Needs --out.",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", min=1, help="Tokens in one forward pass; lower it when memory runs out."
        ),
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
        Path, typer.Option(metavar="DIR", envvar="POLAR_FT_CACHE", help="Where scores are cached.")
    ] = DEFAULT_CACHE,
    allow_tokenizer_code: AllowTokenizerCode = None,
) -> None:
    """Preference accuracy of a reward model on held-out pairs, with 95 % intervals, and a report.

    \b
    polar-ft eval HF_DIR DATA...                   score and report
    polar-ft eval --from-scores FILE --out DIR     report alone
    polar-ft eval compare A B                      which of two runs is better
    """
    # Imported here: `--help` needs none of it.
    from polar_ft.evaluation.report.report import DataFile, RunInfo
    from polar_ft.evaluation.reporting import report_scores
    from polar_ft.evaluation.run import score_into
    from polar_ft.evaluation.scores_file import find_scores

    subsets = tuple(subset_by or ())
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if from_scores is not None:
        if model is not None or data:
            raise PolarError("--from-scores needs no model and no data; leave HF_DIR and DATA out")
        if out is None:
            raise PolarError("--from-scores needs --out DIR: where the figures and the report go")
        saved = str(find_scores(from_scores))
        _prepare(out)
        report_scores(
            from_scores,
            out,
            subsets,
            RunInfo(
                model=None,
                data=[DataFile(path=saved, sha256=_sha256(saved))],
                created=created,
                versions=_versions(),
                n_rows=0,
            ),
        )
        return
    if model is None or not data:
        raise PolarError(
            "name a model folder and held-out data: polar-ft eval HF_DIR DATA… (or --from-scores)"
        )

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
    references = ReferenceSettings(reference_aggregation, shuffle_references, empty_references)
    with _opened_cache(None if no_cache else cache_dir, stderr) as cache:
        weights = model_hash(folder, cache)
        computes_in = str(scorer.dtype).removeprefix("torch.")
        setup = setup_key(
            (
                weights or str(folder.resolve()),
                computes_in,
                str(scorer.device).partition(":")[0],
                scorer.template.fingerprint,
            )
        )
        run = score_into(
            out_dir,
            scorer,
            examples,
            references,
            setup=setup,
            # Without weights there is nothing by which a changed model would be noticed.
            cache=cache if weights is not None else None,
            gates=not no_gates,
            console=stderr,
        )
    passes = 1 + (shuffle_references is not None) + empty_references
    report = report_scores(
        out_dir,
        out_dir,
        subsets,
        RunInfo(
            model=model,
            model_sha256=weights,
            engine=f"{type(scorer).__module__}.{type(scorer).__qualname__}",
            data=[DataFile(path=file, sha256=_sha256(file)) for path in data for file in expand(path)],
            created=created,
            versions=_versions(),
            dtype=computes_in,
            device=str(scorer.device),
            max_length=scorer.template.max_length,
            max_response_length=scorer.template.max_response_length,
            template_fingerprint=scorer.template.fingerprint,
            pairing=pairing,
            reference_aggregation=reference_aggregation,
            n_rows=n_rows,
            n_ties_in_data=n_ties,
            shuffle_seed=shuffle_references,
            n_from_cache=run.n_from_cache,
            seconds=round(run.seconds, 3),
            pairs_per_second=round(passes * run.n_pairs_scored / run.seconds, 3) if run.seconds else None,
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


@eval_app.command("compare")
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders of runs, or files of scores. The first is what the others are held against.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder in which compare.json goes.")
    ] = DEFAULT_OUT,
    subset_by: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Also by the values of this field of A's rows; may be repeated."),
    ] = None,
) -> None:
    """Which of two runs is better on the same pairs?

    Difference of accuracy with interval and p-value.
    """
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
def _opened_cache(folder: Path | None, console: Console) -> Iterator[ScoreCache | None]:
    """The cache; None where none is wanted or it cannot be used, which is no reason to score nothing."""
    if folder is None:
        yield None
        return
    try:
        cache = ScoreCache(folder.expanduser())
    except (OSError, sqlite3.Error) as error:
        console.print(
            f"no cache of scores: {folder} cannot be used ({error}); --cache-dir names another folder",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
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


def _sha256(file: str) -> str | None:
    return file_sha256(Path(file)) if Path(file).is_file() else None


def _versions() -> dict[str, str]:
    return {package: found for package in _PACKAGES if (found := _version(package))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
