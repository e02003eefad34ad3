"""Checks that every run makes of its own scores, on a sample; a run that fails one ends with status 1.

- **label swap**: the same pairs scored again with their candidates exchanged, chosen and rejected exchanged
  with them: the accuracy must be 1 − accuracy − ties. A scorer that prefers the first candidate, or an
  evaluation that forgets which score is whose, cannot give that.
- **batch and packing**: every candidate scored alone must get the reward that it got in the run, among
  others. Rewards that depend on their neighbours are the commonest fault of reward-model evaluations.
- **reference**: a candidate with the text of the reference should outrank another row's candidate more often
  than not. A warning only: no law of mathematics says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from polar_ft.data.records import Example
from polar_ft.evaluation.evaluator import Scorer
from polar_ft.evaluation.references import Aggregation, RowReferences, aggregate
from polar_ft.reward_scale import TOLERANCES

SAMPLE_PAIRS = 16
# Of a small data set every pair; of long texts at least so many pairs, and no more than this many characters.
SAMPLE_CHARS = 60_000
MIN_PAIRS = 4


class GateResult(BaseModel):
    """What a gate found.

    Attributes:
        name: "label_swap", "batch_and_packing" or "reference".
        status: "passed"; "failed", with which the run ends with status 1; "warning"; or "skipped", where the
            sample has nothing to try it on.
        text: What was found, a sentence for people.
        n: Pairs, rewards or rows that were tried.
        value: The figure that decides: the swapped accuracy; the largest change of a reward; the share of
            rows in which the reference outranks.
        expected: What it is held against: 1 − accuracy − ties; the tolerance; one half.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Literal["passed", "failed", "warning", "skipped"]
    text: str
    n: int
    value: float | None = None
    expected: float | None = None


@dataclass(frozen=True)
class SamplePair:
    """A pair of the sample.

    Attributes:
        example: Its row.
        references: The row's references.
        pair: (chosen, rejected) as indices into the row's candidates.
        scores: (chosen, rejected) rewards as the run has them.
    """

    example: Example
    references: RowReferences
    pair: tuple[int, int]
    scores: tuple[float, float]

    @property
    def texts(self) -> tuple[str, str]:
        """Chosen and rejected text."""
        return self.example.candidates[self.pair[0]], self.example.candidates[self.pair[1]]


def draw_sample(examples: Sequence[Example], seed: int = 0) -> list[tuple[int, tuple[int, int]]]:
    """Pairs to try the gates on: (row, pair), one pair of a row, in random order.

    Args:
        examples: All rows, each with a pair.
        seed: Of the order; the same seed and rows give the same sample.
    """
    rng = np.random.default_rng(seed)
    sample: list[tuple[int, tuple[int, int]]] = []
    chars = 0
    for row in rng.permutation(len(examples)).tolist():
        example = examples[row]
        chars += example.characters
        if len(sample) >= SAMPLE_PAIRS or (len(sample) >= MIN_PAIRS and chars > SAMPLE_CHARS):
            break
        sample.append((row, example.pairs[int(rng.integers(len(example.pairs)))]))
    return sample


def run_gates(scorer: Scorer, sample: Sequence[SamplePair], aggregation: Aggregation) -> list[GateResult]:
    """Tries all gates.

    Args:
        scorer: Gave the rewards; must not answer from a cache.
        sample: Pairs with the rewards that the run has.
        aggregation: Of the run.
    """
    dtype = str(scorer.dtype).removeprefix("torch.")
    known = np.array([pair.scores for pair in sample], dtype=np.float64).reshape(-1, 2)
    largest = np.abs(known[np.isfinite(known)]).max(initial=1.0)
    # Relative to the largest reward of the sample, or 1.
    tolerance = float(TOLERANCES.get(dtype, TOLERANCES["bfloat16"]) * largest)
    return [
        _label_swap(scorer, sample, known, tolerance, aggregation),
        _batch_and_packing(scorer, sample, known, tolerance, dtype, aggregation),
        _reference(scorer, sample, aggregation),
    ]


def _label_swap(
    scorer: Scorer,
    sample: Sequence[SamplePair],
    known: np.ndarray,
    tolerance: float,
    aggregation: Aggregation,
) -> GateResult:
    swapped = np.array(
        _score(scorer, [(pair, pair.texts[::-1]) for pair in sample], aggregation), dtype=np.float64
    ).reshape(-1, 2)
    # A pair that rounding could turn round says nothing.
    margins = known[:, 0] - known[:, 1]
    clear = (np.abs(margins) > 2 * tolerance) | (known[:, 0] == known[:, 1])
    clear &= np.isfinite(margins)
    n = int(clear.sum())
    if not n:
        return GateResult(
            name="label_swap",
            status="skipped",
            text="No pair of the sample has finite scores that differ by more than rounding.",
            n=0,
        )
    right = float((margins[clear] > 0).mean())
    ties = float((margins[clear] == 0).mean())
    # Candidates stand the other way round, so the first of a swapped pair is the one labelled as rejected:
    # with the labels swapped it is the "chosen" one.
    new_margins = swapped[clear, 0] - swapped[clear, 1]
    new_margins[np.abs(new_margins) <= tolerance] = 0.0
    found, expected = float((new_margins > 0).mean()), 1 - right - ties
    passed = abs(found - expected) < 0.5 / n
    text = (
        f"Candidates and labels exchanged: accuracy {100 * found:.1f} % on {n} pairs; 1 − accuracy − ties is "
        f"{100 * expected:.1f} %."
    )
    if not passed:
        text += " The scorer's rewards depend on the order of the candidates; no figure here can be trusted."
    return GateResult(
        name="label_swap",
        status="passed" if passed else "failed",
        text=text,
        n=n,
        value=found,
        expected=expected,
    )


def _batch_and_packing(
    scorer: Scorer,
    sample: Sequence[SamplePair],
    known: np.ndarray,
    tolerance: float,
    dtype: str,
    aggregation: Aggregation,
) -> GateResult:
    alone = np.array(
        [[_score(scorer, [(pair, (text,))], aggregation)[0][0] for text in pair.texts] for pair in sample]
    ).reshape(-1, 2)
    both = np.isfinite(alone) & np.isfinite(known)
    different = np.isfinite(alone) != np.isfinite(known)
    change = np.abs(alone - known)[both].max(initial=0.0)
    passed = change <= tolerance and not different.any()
    text = (
        f"{alone.size} rewards computed one at a time differ from those of the run by at most {change:.2g}; "
        f"the tolerance in {dtype} is {tolerance:.2g}."
    )
    if different.any():
        text += f" {int(different.sum())} are finite one way and not the other."
    if not passed:
        text += (
            " Rewards depend on the batch, or the cache holds others than the model gives (--no-cache and a "
            "new --out show which)."
        )
    return GateResult(
        name="batch_and_packing",
        status="passed" if passed else "failed",
        text=text,
        n=int(alone.size),
        value=float(change),
        expected=tolerance,
    )


def _reference(scorer: Scorer, sample: Sequence[SamplePair], aggregation: Aggregation) -> GateResult:
    tried: list[tuple[SamplePair, tuple[str, ...]]] = []
    for at, pair in enumerate(sample):
        text = pair.references.own[0]
        other = sample[(at + 1) % len(sample)].texts[0]
        if text and other not in pair.references.own and len(sample) > 1:
            tried.append((pair, (text, other)))
    if not tried:
        return GateResult(name="reference", status="skipped", text="No row of the sample has one.", n=0)
    scores = np.array(_score(scorer, tried, aggregation), dtype=np.float64)
    share = float((scores[:, 0] > scores[:, 1]).mean())
    passed = share > 0.5
    text = (
        f"A candidate with the reference's own text outranks another row's candidate in {100 * share:.0f} % "
        f"of {len(tried)} rows."
    )
    if not passed:
        text += " A model that reads the reference does better: is this a trained POLAR reward model?"
    return GateResult(
        name="reference",
        status="passed" if passed else "warning",
        text=text,
        n=len(tried),
        value=share,
        expected=0.5,
    )


def _score(
    scorer: Scorer, wanted: Sequence[tuple[SamplePair, tuple[str, ...]]], aggregation: Aggregation
) -> list[list[float]]:
    """Rewards of texts as candidates of a sample's row, all of them in one call."""
    requests = [
        replace(pair.example, references=(text,), candidates=texts, pairs=(), margins=(), weights=())
        for pair, texts in wanted
        for text in pair.references.own
    ]
    scores = iter(scorer.score_examples(requests))
    return [aggregate([next(scores) for _ in pair.references.own], aggregation) for pair, _ in wanted]
