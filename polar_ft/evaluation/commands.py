"""`polar-ft eval` and `polar-ft eval compare`, which `tools/eval_preference.py` runs too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from polar_ft.data.reading import DataSource
from polar_ft.errors import PolarError
from polar_ft.evaluation.cache import DEFAULT_CACHE
from polar_ft.evaluation.references import Aggregation, ReferenceSettings
from polar_ft.evaluation.scores import DEFAULT_OUT
from polar_ft.groups import Pairing as PairingName
from polar_ft.options import (
    APP_SETTINGS,
    AllowTokenizerCode,
    CalledAsTheGroup,
    Device,
    Dtype,
    MaxLength,
    MaxResponseLength,
    Pairing,
    RunUnlessNamed,
    Split,
)

eval_app = typer.Typer(
    cls=RunUnlessNamed,
    help="Score held-out pairs, or compare two runs (eval compare A B).",
    **APP_SETTINGS,
)


@eval_app.command("run", cls=CalledAsTheGroup, context_settings=APP_SETTINGS["context_settings"])
def run(
    model: Annotated[
        str | None, typer.Argument(metavar="HF_DIR", help="Folder of the exported reward model.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Held-out pairs or ranked rows: JSON lines, a table, Parquet, a folder, or a "
            "HuggingFace data-set id. With several, rows without a subset count to a subset of their file.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the scores, figures and the report of this one evaluation go. An interrupted run "
            "resumes with the same command.",
            show_default=f"{DEFAULT_OUT}/MODEL-DATA-HASH",
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace the results of another evaluation in --out.")
    ] = False,
) -> None:
    """Preference accuracy of a reward model on held-out pairs, with 95 % intervals, and a report.

    \b
    polar-ft eval HF_DIR DATA...                   score and report
    polar-ft eval --from-scores FILE --out DIR     report alone
    polar-ft eval compare A B                      which of two runs is better
    """
    # Imported here: `--help` needs none of it.
    from polar_ft.evaluation import evaluate

    subsets = tuple(subset_by or ())
    if from_scores is not None:
        if model is not None or data:
            raise PolarError("--from-scores needs no model and no data; leave HF_DIR and DATA out")
        if out is None:
            raise PolarError("--from-scores needs --out DIR: where the figures and the report go")
        evaluate.report_saved(from_scores, out, subsets, force=force)
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
        evaluate.score_and_report(
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
        evaluate.say(f"interrupted: {kept}; the same command resumes")
        raise typer.Exit(130) from None


@eval_app.command("compare")
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders of runs, or files of scores. The others are compared with the first.",
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


def _sources(data: Sequence[str], split: str, pairing: PairingName) -> list[DataSource]:
    """One file keeps its rows' own subsets; of several, each is a subset where rows do not say."""
    several = len(data) > 1
    return [
        DataSource(path=path, split=split, pairing=pairing, subset=path if several else None) for path in data
    ]
