from __future__ import annotations

import numpy as np
import pytest

from polar_ft.evaluation.figures import compute_figures
from polar_ft.evaluation.pairs import PairTable
from polar_ft.evaluation.report.checks import make_checks, verdict
from polar_ft.evaluation.report.report import Report

from .conftest import run_info


def checks_of(report):
    return {check.name: (check.status, check.text) for check in make_checks(report)}


def report_of(chosen, rejected, **columns):
    table = PairTable(np.array(chosen, dtype=float), np.array(rejected, dtype=float), **columns)
    return Report(metrics=compute_figures(table, samples=200), run=run_info())


def test_what_wants_doing_stands_first(make_run):
    statuses = [check.status for check in make_checks(make_run(["chat", "code"])[0])]
    order = ["failed", "warning", "passed", "skipped", "note"]
    assert statuses == sorted(statuses, key=order.index)
    assert statuses[0] == "failed"


def test_gates_and_reading_warnings_are_among_them(make_run):
    checks = checks_of(make_run(["chat", "code"])[0])
    assert checks["batch and packing"] == ("failed", "It depends on the batch.")
    assert checks["label swap"][0] == "passed"
    assert checks["data"] == ("warning", "A line was torn.")


def test_no_finite_score_fails():
    checks = checks_of(report_of([np.nan], [0.0]))
    assert checks["scores"] == ("failed", "Not one of 1 pair has finite scores.")


def test_an_accuracy_that_no_model_is_needed_for():
    # 6 of 10: Wilson's lower bound is below one half. Longer wins 10 of 10.
    chosen, rejected = [1] * 6 + [0] * 4, [0] * 6 + [1] * 4
    columns = {"chosen_chars": np.full(10, 9), "rejected_chars": np.full(10, 3)}
    status, text = checks_of(report_of(chosen, rejected, **columns))["baselines"]
    assert status == "warning"
    assert "chance (50.0 %)" in text
    assert "taking the longer candidate (100.0 %)" in text
    assert "shorter" not in text


def test_an_accuracy_above_all_rules_is_no_warning():
    # 60 of 60, where each rule is right half of the time.
    lengths = np.array([9, 3] * 30)
    checks = checks_of(report_of([1] * 60, [0] * 60, chosen_chars=lengths, rejected_chars=lengths[::-1]))
    assert "baselines" not in checks


def test_ties_from_one_percent_on():
    assert "ties" not in checks_of(report_of([1] * 200, [0] * 199 + [1]))
    status, text = checks_of(report_of([1] * 100, [0] * 99 + [1]))["ties"]
    assert status == "warning"
    assert text.startswith("1 of 100 pairs are ties")
    assert "99.5 %" in text  # 99 right and half of one


@pytest.mark.parametrize(("right_with_others", "status"), [(60, "warning"), (20, "passed")])
def test_reference_that_is_not_read(right_with_others, status):
    # Right on all 60; with other references on as many, or on a third.
    shuffled = np.array([1.0] * right_with_others + [-1.0] * (60 - right_with_others))
    checks = checks_of(
        report_of([1] * 60, [0] * 60, shuffled_chosen=shuffled, shuffled_rejected=np.zeros(60))
    )
    assert checks["reference use"][0] == status
    assert ("not shown to help" in checks["reference use"][1]) == (status == "warning")


def test_notes_of_the_run(four_pairs_report):
    checks = checks_of(four_pairs_report)
    assert checks["truncation"] == (
        "note",
        "2 of 4 pairs were cut to max_length 400 and max_response_length 64 (prompt 2, reference 1, "
        "chosen 1, rejected 0).",
    )
    assert checks["small subsets"][1].startswith("3 subsets with fewer than 30 scored pairs")
    assert checks["data"] == ("note", "7 pairs that the data ranks the same: left out.")


def pairs(n_right, n_longer):
    """A hundred pairs, of which the model has `n_right` right; in `n_longer` the chosen one is longer."""
    at = np.arange(100)
    return PairTable(
        chosen_score=np.where(at < n_right, 1.0, -1.0),
        rejected_score=np.zeros(100),
        chosen_chars=np.where(at < n_longer, 9, 1),
        rejected_chars=np.full(100, 5),
    )


@pytest.mark.parametrize(
    ("n_right", "n_longer", "status", "text"),
    [
        (90, 60, "passed", "The model is 30.0 points better than the rule."),
        (90, 85, "warning", "The model is 5.0 points better, which is within its interval: not shown"),
        (75, 96, "failed", "The rule is better, by 21.0 points."),
        (75, 75, "failed", "The rule is as good as the model."),
    ],
)
def test_the_model_against_the_best_rule(n_right, n_longer, status, text):
    report = Report(metrics=compute_figures(pairs(n_right, n_longer), samples=10), run=run_info())
    found = verdict(report)
    assert (found.rule, found.share, found.status) == ("taking the longer candidate", n_longer / 100, status)
    assert found.text.startswith(text)


def test_without_any_rule_the_model_is_held_against_chance():
    table = PairTable(chosen_score=np.array([1.0, 2.0]), rejected_score=np.zeros(2))
    report = Report(metrics=compute_figures(table, samples=10), run=run_info())
    assert (verdict(report).rule, verdict(report).share) == ("chance", 0.5)
    nothing = PairTable(chosen_score=np.array([np.nan]), rejected_score=np.zeros(1))
    assert verdict(Report(metrics=compute_figures(nothing, samples=10), run=run_info())) is None
