"""One evaluation: the rows that are still to be scored, their lines in the run's files, and the gates."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from polar_ft.data.records import Example
from polar_ft.evaluation.cache import CachedScorer, ScoreCache, setup_key
from polar_ft.evaluation.evaluator import FieldTokens, Scorer, chunks, count_tokens, score_references
from polar_ft.evaluation.gates import GateResult, SamplePair, draw_sample, run_gates
from polar_ft.evaluation.journal import ScoreJournal
from polar_ft.evaluation.progress import scoring_progress
from polar_ft.evaluation.references import ReferenceSettings, RowReferences, aggregate, plan_references
from polar_ft.evaluation.report.report import HTML_FILE, MARKDOWN_FILE, METRICS_FILE, PLOTS_FOLDER
from polar_ft.evaluation.scores import RankedScores, ScoredPair, input_hash, pair_rows, ranked_row, score_key

_GATES = TypeAdapter(list[GateResult])


@dataclass(frozen=True)
class ScoredRun:
    """What a run did.

    Attributes:
        n_pairs_scored: Pairs that this call scored; the others were there from a run that was broken off.
        n_computed: Rewards that the model computed.
        n_from_cache: Rewards that the cache had.
        seconds: Time spent scoring.
        gates: What the gates found; empty where they were left out.
    """

    n_pairs_scored: int
    n_computed: int
    n_from_cache: int
    seconds: float
    gates: list[GateResult]


def score_into(
    folder: Path,
    scorer: Scorer,
    examples: Sequence[Example],
    references: ReferenceSettings,
    *,
    setup: str,
    cache: ScoreCache | None,
    gates: bool,
    console: Console,
) -> ScoredRun:
    """Scores rows into `scores.jsonl` and `rankings.jsonl`, going on where an earlier run was broken off.

    Args:
        folder: Where the files go; must exist.
        scorer: Gives the rewards.
        examples: What to score, each with a pair.
        references: Against which references.
        setup: What scores: `polar_ft.evaluation.cache.setup_key`.
        cache: Scores of earlier runs; None uses none.
        gates: Try the gates on a sample.
        console: Where progress is shown.

    Raises:
        PolarError: A row does not fit the model's limits (the message names it; nothing was scored yet), or
            the files cannot be written.
    """
    plan = plan_references(examples, references)
    keys = [
        score_key(setup, example, row_references, references.aggregation)
        for example, row_references in zip(examples, plan, strict=True)
    ]
    cached = CachedScorer(scorer, cache, setup)
    if cache is not None:
        cache.touch(setup)
    with ScoreJournal(folder, examples, keys) as journal:
        todo = [row for row, key in enumerate(keys) if not journal.is_done(key)]
        n_pairs = sum(len(example.pairs) for example in examples)
        n_todo = sum(len(examples[row].pairs) for row in todo)
        if n_todo < n_pairs:
            console.print(
                f"{folder}: {n_pairs - n_todo} of {n_pairs} pairs are scored already; going on with the rest",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        seconds = 0.0
        if todo:
            seconds = _score_rows(folder, journal, cached, examples, plan, keys, todo, references, console)
        journal.finish()
        results = []
        if gates:
            sample = draw_sample(examples)
            pairs = [
                SamplePair(examples[row], plan[row], pair, journal.scores_of(keys[row], pair))
                for row, pair in sample
            ]
            results = _gates(scorer, pairs, references, cache, setup)
    return ScoredRun(n_todo, cached.n_computed, cached.n_from_cache, seconds, results)


def _score_rows(
    folder: Path,
    journal: ScoreJournal,
    scorer: Scorer,
    examples: Sequence[Example],
    plan: Sequence[RowReferences],
    keys: Sequence[str],
    todo: Sequence[int],
    references: ReferenceSettings,
    console: Console,
) -> float:
    """Scores rows and appends their lines; returns the seconds that it took."""
    wanted = [examples[row] for row in todo]
    with scoring_progress("tokenizing", wanted, console) as on_chunk:
        tokens = count_tokens(scorer.template, wanted, on_chunk=on_chunk)
    start = time.perf_counter()
    combine = partial(aggregate, aggregation=references.aggregation)
    with scoring_progress("scoring", wanted, console) as on_chunk:
        for chunk in chunks(wanted):
            batch = [wanted[at] for at in chunk]
            texts = [plan[todo[at]].distinct for at in chunk]
            scored = score_references(scorer, batch, texts)
            lines: list[ScoredPair | RankedScores] = []
            for at, by_reference in zip(chunk, scored, strict=True):
                row = todo[at]
                lines += _lines(examples[row], plan[row], by_reference, combine, tokens[at], keys[row])
            # Not before there is a score: an earlier result is whole until then.
            _remove_report(folder)
            journal.append(lines)
            on_chunk(batch)
    return time.perf_counter() - start


def _remove_report(folder: Path) -> None:
    """Removes the report of an earlier run: its figures must not stand beside other scores."""
    for name in (METRICS_FILE, HTML_FILE, MARKDOWN_FILE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PLOTS_FOLDER, ignore_errors=True)


def _lines(
    example: Example,
    references: RowReferences,
    by_reference: dict[str, list[float]],
    combine: partial[list[float]],
    tokens: FieldTokens,
    key: str,
) -> list[ScoredPair | RankedScores]:
    scores = combine([by_reference[text] for text in references.own])
    ranked = ranked_row(example, scores, tokens, key)
    pairs = pair_rows(example, references, by_reference, combine, tokens, key)
    return [*([ranked] if ranked is not None else []), *pairs]


def _gates(
    scorer: Scorer,
    sample: Sequence[SamplePair],
    references: ReferenceSettings,
    cache: ScoreCache | None,
    setup: str,
) -> list[GateResult]:
    """Tries the gates, or says what they found on the very same scores before."""
    tried = setup_key(
        part
        for pair in sample
        for part in (input_hash(pair.example), repr((pair.pair, pair.scores)), references.aggregation)
    )
    if cache is not None and (known := cache.get_gates(setup, tried)) is not None:
        return _GATES.validate_json(known)
    results = run_gates(scorer, sample, references.aggregation)
    if cache is not None and not any(result.status == "failed" for result in results):
        cache.put_gates(setup, tried, _GATES.dump_json(results).decode())
    return results
