"""One evaluation: the rows that are still to be scored, the files of scores, and the gates."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.evaluation.cache import CachedScorer, ScoreCache, setup_key
from polar_ft.evaluation.evaluator import Scorer, chunks, count_tokens, requests_against, score_references
from polar_ft.evaluation.gates import GateResult, SamplePair, draw_sample, run_gates
from polar_ft.evaluation.progress import scoring_progress
from polar_ft.evaluation.references import ReferenceSettings, aggregate, plan_references
from polar_ft.evaluation.report.report import METRICS_FILE, PLOTS_FOLDER
from polar_ft.evaluation.report.texts import count
from polar_ft.evaluation.result_folder import REPORT_FILES, Evaluation, claim, write_evaluation
from polar_ft.evaluation.scores import (
    RANKINGS_FILE,
    SCORES_FILE,
    input_hash,
    pair_rows,
    ranked_row,
    score_key,
    to_json_line,
)
from polar_ft.files import first_line, lock_file, unfinished

_GATES = TypeAdapter(list[GateResult])

# Where a run without a cache keeps its scores until it has ended, in its folder.
_OWN_CACHE = ".unfinished-scores"


@dataclass(frozen=True)
class ScoredRun:
    """What a run did.

    Attributes:
        n_pairs_scored: Pairs for which the model computed a reward, in this run and in those that it resumes.
        n_computed: Rewards that the model computed.
        n_from_cache: Rewards that were known.
        seconds: Time spent scoring, in this run and in those that it resumes.
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
    evaluation: Evaluation | None = None,
    replace: bool = False,
) -> ScoredRun:
    """Scores rows and writes `scores.jsonl` and `rankings.jsonl`; known rewards are not computed.

    Each reward goes into the cache as soon as it is computed, so an interrupted run resumes with the same
    command. The files are replaced atomically at the end, in the order of the data.

    Args:
        folder: Where the files go; must exist.
        scorer: Gives the rewards.
        examples: What to score, each with a pair.
        references: Against which references.
        setup: What scores: `polar_ft.evaluation.cache.setup_key`.
        cache: Scores of earlier runs; with None one in `folder` serves this run, and is then removed.
        gates: Try the gates on a sample.
        console: Where progress is shown.
        evaluation: Whose folder it is to be, with the time that it takes; None leaves that out.
        replace: Whether the results of another evaluation may go.

    Raises:
        PolarError: A row does not fit the model's limits (the message names it; nothing was scored yet),
            another run is writing into the folder, it holds another evaluation, or the scores cannot be
            written.
        KeyboardInterrupt: Of the user; the message says what is kept.
    """
    plan = plan_references(examples, references)
    run_cache = _own_cache(folder) if cache is None else nullcontext(cache)
    with _locked(folder), run_cache as known, _saying_what_is_kept(known):
        if evaluation is not None:
            is_first = cache is None and (folder / METRICS_FILE).is_file()  # all is computed once more
            with _disk_errors(folder):
                taken = claim(folder, evaluation, replace=replace)
            earlier = (0.0, 0) if is_first else (taken.seconds, taken.pairs_scored)
        else:
            earlier = (0.0, 0)
        known.touch(setup)
        cached = CachedScorer(scorer, known, setup)
        todo = [
            row
            for row, row_plan in enumerate(plan)
            if not cached.knows(requests_against(examples[row], row_plan.distinct))
        ]
        n_pairs = sum(len(example.pairs) for example in examples)
        n_todo = sum(len(examples[row].pairs) for row in todo)
        if n_todo < n_pairs:
            console.print(
                f"{n_pairs - n_todo} of {n_pairs} pairs are scored already; resuming with the rest",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        with scoring_progress("tokenizing", examples, console) as on_chunk:
            tokens = count_tokens(scorer.template, examples, on_chunk=on_chunk)

        scores: dict[int, dict[str, list[float]]] = {}  # row → reference → a reward for each candidate

        def score(rows: Sequence[int]) -> None:
            texts = [plan[row].distinct for row in rows]
            scores.update(
                zip(rows, score_references(cached, [examples[row] for row in rows], texts), strict=True)
            )

        start = time.perf_counter()
        seconds, n_scored = earlier
        if todo:
            wanted = [examples[row] for row in todo]
            with scoring_progress("scoring", wanted, console) as on_chunk:
                for chunk in chunks(wanted):
                    score([todo[at] for at in chunk])
                    on_chunk([wanted[at] for at in chunk])
                    seconds = earlier[0] + time.perf_counter() - start
                    n_scored += sum(len(wanted[at].pairs) for at in chunk)
                    if evaluation is not None:
                        spent = {"seconds": seconds, "pairs_scored": n_scored}
                        write_evaluation(folder, evaluation.model_copy(update=spent))
        score([row for row in range(len(examples)) if row not in scores])

        combine = partial(aggregate, aggregation=references.aggregation)
        pair_lines, ranked_lines = (_replaced(folder / name) for name in (SCORES_FILE, RANKINGS_FILE))
        with _disk_errors(folder), pair_lines as write_pair, ranked_lines as write_ranked:
            for row, example in enumerate(examples):
                key = score_key(setup, example, plan[row], references.aggregation)
                for pair in pair_rows(example, plan[row], scores[row], combine, tokens[row], key):
                    write_pair(to_json_line(pair))
                own = combine([scores[row][text] for text in plan[row].own])
                if (ranked := ranked_row(example, own, tokens[row], key)) is not None:
                    write_ranked(to_json_line(ranked))
            # The new files are complete, and replace the old ones when this block ends.
            _remove_report(folder)
        if not any(example.candidate_info for example in examples):
            (folder / RANKINGS_FILE).unlink()

        results = []
        if gates:
            sample = []
            for row, (chosen, rejected) in draw_sample(examples):
                own = combine([scores[row][text] for text in plan[row].own])
                sample.append(
                    SamplePair(examples[row], plan[row], (chosen, rejected), (own[chosen], own[rejected]))
                )
            results = _gates(scorer, sample, references, known, setup)
    return ScoredRun(n_scored, cached.n_computed, cached.n_from_cache, seconds, results)


@contextmanager
def _saying_what_is_kept(cache: ScoreCache) -> Iterator[None]:
    before = cache.n_kept
    try:
        yield
    except KeyboardInterrupt:
        n_kept = cache.n_kept - before
        raise KeyboardInterrupt(
            f"{count(n_kept, 'reward')} of this run are kept in {cache.file}" if n_kept else ""
        ) from None


def _remove_report(folder: Path) -> None:
    """Removes the report of an earlier run: its figures are of other scores."""
    for name in REPORT_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PLOTS_FOLDER, ignore_errors=True)


@contextmanager
def _replaced(file: Path) -> Iterator[Callable[[bytes], int]]:
    with unfinished(file) as part, part.open("wb") as stream:
        yield stream.write


@contextmanager
def _own_cache(folder: Path) -> Iterator[ScoreCache]:
    """A cache in the run's folder, by which an interrupted run resumes; removed when the run has ended."""
    with _disk_errors(folder):
        cache = ScoreCache(folder / _OWN_CACHE)
    with cache:
        yield cache
    shutil.rmtree(folder / _OWN_CACHE)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    file = folder / ".lock"
    with _disk_errors(folder):
        lock = lock_file(
            file, f"{folder}: another run is writing into it; wait for it, or name another folder with --out"
        )
    with lock:
        try:
            yield
        finally:
            file.unlink()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PolarError(
            f"{folder}: the scores could not be written ({reason}); make room or name another "
            f"folder with --out. The same command resumes with what was scored"
        ) from error


def _gates(
    scorer: Scorer,
    sample: Sequence[SamplePair],
    references: ReferenceSettings,
    cache: ScoreCache,
    setup: str,
) -> list[GateResult]:
    """Runs the gates, or returns what they found on the very same scores before."""
    tried = setup_key(
        part
        for pair in sample
        for part in (input_hash(pair.example), repr((pair.pair, pair.scores)), references.aggregation)
    )
    if (known := cache.get_gates(setup, tried)) is not None:
        return _GATES.validate_json(known)
    results = run_gates(scorer, sample, references.aggregation)
    if not any(result.status == "failed" for result in results):
        cache.put_gates(setup, tried, _GATES.dump_json(results).decode())
    return results
