"""Scorers that cheat are caught, and an honest one is not."""

from __future__ import annotations

import math

import pytest

from polar_ft.evaluation.gates import SamplePair, draw_sample, run_gates
from polar_ft.evaluation.references import RowReferences


def honest(example, candidate):
    """Words shared with the reference, and a little for length."""
    return len(set(candidate.split()) & set(example.reference.split())) + len(candidate) / 100


def rows(make_example, n=12):
    return [
        make_example(
            row, reference=f"colour {row}", candidates=(f"it is colour {row}", f"it is size {row + 1}")
        )
        for row in range(n)
    ]


def sample_of(examples, scorer):
    """The sample with the rewards of a run that scored all rows in one call."""
    scores = scorer.score_examples(examples)
    return [
        SamplePair(
            examples[row],
            RowReferences(examples[row].references),
            pair,
            (scores[row][pair[0]], scores[row][pair[1]]),
        )
        for row, pair in draw_sample(examples)
    ]


def by_name(scorer, sample):
    return {gate.name: gate for gate in run_gates(scorer, sample, "mean")}


def test_an_honest_scorer_passes(make_example, make_scorer):
    scorer = make_scorer(honest)
    gates = by_name(scorer, sample_of(rows(make_example), scorer))
    assert {name: gate.status for name, gate in gates.items()} == {
        "label_swap": "passed",
        "batch_and_packing": "passed",
        "reference": "passed",
    }
    # All 12 right and no tie: 1 − 1 − 0.
    assert (gates["label_swap"].value, gates["label_swap"].expected) == (0.0, 0.0)
    assert gates["batch_and_packing"].value == 0.0
    assert gates["reference"].value == 1.0


def test_ties_and_errors_keep_the_equation(make_example, make_scorer):
    examples = rows(make_example)

    def score(example, candidate):
        row = int(example.id.removeprefix("row-"))
        better = candidate.startswith("it is colour")
        return 0.0 if row < 3 else float(better) if row < 9 else float(not better)

    scorer = make_scorer(score)
    gate = by_name(scorer, sample_of(examples, scorer))["label_swap"]
    # 3 ties, 6 right, 3 wrong of 12: 1 − 6/12 − 3/12.
    assert (gate.status, gate.value, gate.expected, gate.n) == ("passed", 0.25, 0.25, 12)


def test_a_scorer_that_prefers_the_first_candidate_fails(make_example, make_scorer):
    scorer = make_scorer(lambda *_: 0.0)
    scorer.score_examples = lambda examples: [
        [1.0 - place for place in range(len(example.candidates))] for example in examples
    ]
    gate = by_name(scorer, sample_of(rows(make_example), scorer))["label_swap"]
    assert (gate.status, gate.value, gate.expected) == ("failed", 1.0, 0.0)
    assert "order of the candidates" in gate.text


def test_rewards_that_depend_on_the_batch_fail(make_example, make_scorer):
    inner = make_scorer(honest)
    scorer = make_scorer(honest)
    # Centred on the batch, as a model with a normalisation over the batch would.
    scorer.score_examples = lambda examples: [
        [score + len(examples) / 100 for score in row] for row in inner.score_examples(examples)
    ]
    gates = by_name(scorer, sample_of(rows(make_example), scorer))
    assert gates["batch_and_packing"].status == "failed"
    # 12 rows a call against one.
    assert gates["batch_and_packing"].value == pytest.approx(0.11)
    assert gates["label_swap"].status == "passed"


def test_rounding_is_no_failure(make_example, make_scorer):
    scorer = make_scorer(honest)
    sample = sample_of(rows(make_example), scorer)
    scorer.score = lambda example, candidate: honest(example, candidate) + 1e-6 * len(scorer.calls)
    assert by_name(scorer, sample)["batch_and_packing"].status == "passed"


def test_bfloat16_is_allowed_more(make_example, make_scorer):
    scorer = make_scorer(honest)
    sample = sample_of(rows(make_example), scorer)
    scorer.score = lambda example, candidate: honest(example, candidate) * 1.01
    assert by_name(scorer, sample)["batch_and_packing"].status == "failed"
    scorer.dtype = "torch.bfloat16"
    assert by_name(scorer, sample)["batch_and_packing"].status == "passed"


def test_finite_alone_and_not_in_the_run_fails(make_example, make_scorer):
    scorer = make_scorer(honest)
    sample = sample_of(rows(make_example), scorer)
    scorer.score = lambda example, candidate: math.nan if len(example.candidates) == 1 else 1.0
    gate = by_name(scorer, sample)["batch_and_packing"]
    assert gate.status == "failed"
    assert "24 are finite one way and not the other" in gate.text


def test_a_model_that_does_not_know_the_reference_is_a_warning(make_example, make_scorer):
    scorer = make_scorer(lambda example, candidate: len(candidate))
    gate = by_name(scorer, sample_of(rows(make_example), scorer))["reference"]
    assert (gate.status, gate.value) == ("warning", 0.0)


def test_nothing_to_try_is_said(make_example, make_scorer):
    scorer = make_scorer(lambda *_: math.nan)
    examples = [make_example(row, reference="") for row in range(3)]
    gates = by_name(scorer, sample_of(examples, scorer))
    assert (gates["label_swap"].status, gates["reference"].status) == ("skipped", "skipped")


def test_the_sample_is_small_and_always_the_same(make_example):
    examples = [make_example(row, prompt="p" * 20_000) for row in range(100)]
    assert len(draw_sample(examples)) == 4  # 40,000 characters each: no more than the least number
    short = [make_example(row) for row in range(100)]
    assert len(draw_sample(short)) == 16
    assert draw_sample(short) == draw_sample(short)
    assert len({row for row, _ in draw_sample(short)}) == 16
