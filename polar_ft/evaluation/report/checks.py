"""What a reader must know before the figures: the run's own checks, warnings and notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from polar_ft.evaluation.report.report import SCORES_FILE, Report
from polar_ft.evaluation.report.texts import count, percent, percent_interval, signed_points
from polar_ft.evaluation.statistics.baselines import Baselines

# Below this many pairs an interval is wider than ±18 points around one half, and a subset says little.
FEW_PAIRS = 30
# From this share of ties on the scores are coarse: bf16 rewards near 10 are 0.06 apart.
MANY_TIES = 0.01


@dataclass(frozen=True)
class Finding:
    """One line at the top of a report.

    Attributes:
        status: "failed" and "warning" want something done; "note" is what the figures have to be read with.
        name: What is checked.
        text: What was found.
    """

    status: Literal["passed", "warning", "failed", "skipped", "note"]
    name: str
    text: str


def make_checks(report: Report) -> list[Finding]:
    """Gates, warnings and notes: failures first, then warnings, then the rest in its order."""
    order = ("failed", "warning", "passed", "skipped", "note")
    gates = [Finding(gate.status, gate.name.replace("_", " "), gate.text) for gate in report.gates]
    warnings = [Finding("warning", "data", text) for text in report.warnings]
    found = [*gates, *warnings, *_scores(report), *_baselines(report), *_reference(report), *_notes(report)]
    return sorted(found, key=lambda check: order.index(check.status))


def _scores(report: Report) -> Iterator[Finding]:
    overall = report.metrics.overall
    if overall.n_scored == 0:
        yield Finding("failed", "scores", f"Not one of {count(overall.n_pairs, 'pair')} has finite scores.")
    elif overall.n_nonfinite:
        yield Finding(
            "warning",
            "scores",
            f"{overall.n_nonfinite:,} of {count(overall.n_pairs, 'pair')} have a score that is NaN or "
            f"infinite and are in no other figure. In {SCORES_FILE} they are the rows with a quoted score.",
        )
    if overall.n_scored and overall.n_ties >= MANY_TIES * overall.n_scored:
        yield Finding(
            "warning",
            "ties",
            f"{overall.n_ties:,} of {count(overall.n_scored, 'pair')} are ties (exactly equal scores). A tie "
            f"is not correct; with ties as half the accuracy is {percent(overall.accuracy_ties_half)} %.",
        )


@dataclass(frozen=True)
class Verdict:
    """The model against the best rule that needs no model.

    Attributes:
        rule: What the rule does: "taking the longer candidate".
        share: Its accuracy.
        status: "failed" where the rule is at least as good, "warning" where it is in the model's interval.
        text: A sentence.
    """

    rule: str
    share: float
    status: Literal["passed", "warning", "failed"]
    text: str


def verdict(report: Report) -> Verdict | None:
    """What matters first: is the model better than a rule without one? None without a scored pair."""
    overall = report.metrics.overall
    if overall.accuracy is None or overall.interval is None:
        return None
    share, rule = max((share, name) for name, share in _rules(report.metrics.baselines))
    points = percent(abs(overall.accuracy - share))
    if overall.accuracy <= share:
        worse = f"better, by {points} points." if overall.accuracy < share else "as good as the model."
        return Verdict(rule, share, "failed", f"The rule is {worse}")
    if overall.interval[0] <= share:
        said = f"The model is {points} points better, which is within its interval: not shown to be better."
        return Verdict(rule, share, "warning", said)
    return Verdict(rule, share, "passed", f"The model is {points} points better than the rule.")


def _rules(baselines: Baselines) -> list[tuple[str, float]]:
    """Rules without a model, with their accuracy where it is known."""
    rules = (
        ("taking the longer candidate", baselines.longer_wins),
        ("taking the shorter candidate", baselines.shorter_wins),
        ("taking the candidate most like the reference", baselines.most_like_reference),
    )
    known = [(name, rule.overall) for name, rule in rules if rule is not None and rule.overall is not None]
    return [("chance", baselines.chance), *known]


def _baselines(report: Report) -> Iterator[Finding]:
    overall = report.metrics.overall
    if overall.interval is None:
        return
    low = overall.interval[0]
    unbeaten = [
        f"{name} ({percent(share)} %)" for name, share in _rules(report.metrics.baselines) if low <= share
    ]
    if unbeaten:
        yield Finding(
            "warning",
            "baselines",
            f"{percent(overall.accuracy)} % (95 % interval {percent_interval(overall.interval)}) is not "
            f"shown to be better than {', '.join(unbeaten)}: rules that need no model.",
        )


def _reference(report: Report) -> Iterator[Finding]:
    use = report.metrics.reference_use
    for name, other in (("shuffled", use and use.shuffled), ("empty", use and use.empty)):
        if not other or other.against_own.difference_ci95 is None:
            continue
        against = other.against_own
        low, high = other.against_own.difference_ci95
        said = (
            f"With {name} references the accuracy is {percent(other.overall.accuracy)} %: "
            f"{signed_points(against.difference)} points, 95 % interval {signed_points(low)} to "
            f"{signed_points(high)}."
        )
        if high >= 0:
            said += " The references are not shown to help: is the model reading them?"
        yield Finding("warning" if high >= 0 else "passed", "reference use", said)


def _notes(report: Report) -> Iterator[Finding]:
    overall, run, cut = report.metrics.overall, report.run, report.truncation
    if cut is not None and cut.n_pairs:
        limits = (
            f" to max_length {run.max_length} and max_response_length {run.max_response_length}"
            if run.max_length is not None
            else ""
        )
        yield Finding(
            "note",
            "truncation",
            f"{cut.n_pairs:,} of {count(overall.n_pairs, 'pair')} were cut{limits} (prompt {cut.prompt:,}, "
            f"reference {cut.reference:,}, chosen {cut.chosen:,}, rejected {cut.rejected:,}).",
        )
    small = [
        name
        for breakdown in report.metrics.subsets.values()
        for name, metrics in breakdown.subsets.items()
        if metrics.n_scored < FEW_PAIRS
    ]
    if small:
        yield Finding(
            "note",
            "small subsets",
            f"{count(len(small), 'subset')} with fewer than {FEW_PAIRS} scored pairs: read their intervals, "
            f"not their accuracies.",
        )
    if overall.accuracy_ci95_by_prompt is not None and overall.n_prompts is not None:
        yield Finding(
            "note",
            "intervals",
            f"Pairs of one prompt are not independent, so intervals are bootstrapped over "
            f"{count(overall.n_prompts, 'prompt')}.",
        )
    if run.n_ties_in_data:
        yield Finding(
            "note", "data", f"{count(run.n_ties_in_data, 'pair')} that the data ranks the same: left out."
        )
