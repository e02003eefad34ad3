"""Is the new model better than before, by how much, with which certainty, and what to try next?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from polar_ft.data.report import many
from polar_ft.evaluation.comparing import COMPARE_FILE, Comparisons
from polar_ft.evaluation.pairs import PairTable
from polar_ft.evaluation.report.checks import verdict as against_rules
from polar_ft.evaluation.report.report import METRICS_FILE, Report
from polar_ft.evaluation.report.texts import p_value, percent, percent_interval, signed_points
from polar_ft.evaluation.scores_file import read_scores
from polar_ft.evaluation.statistics.accuracy import Interval, wilson_interval
from polar_ft.evaluation.statistics.length import LengthBias
from polar_ft.evaluation.statistics.resampling import bootstrap_ratio, prompt_numbers
from polar_ft.fit.steps import Result

# Half the width of an interval that tells most models apart.
WANTED = 0.02
# Between pairs whose chosen answer is longer and those whose is shorter: from here on length decides.
LENGTH_GAP = 0.25
# Above this no more data is asked for.
ALL = 0.98

Status = Literal["passed", "warning", "failed"]


class Side(BaseModel):
    """What the new model is held against, or the new model itself.

    Attributes:
        name: "the base model" for instance.
        accuracy: On the held-out pairs.
        interval: 95 % interval of it; None for a rule, which is what it is.
        difference: Accuracy of the new model minus this one, on the same pairs.
        difference_ci95: Its interval, by the bootstrap over prompts.
        p_value: Of no difference, by the same bootstrap.
    """

    name: str
    accuracy: float
    interval: Interval | None = None
    difference: float | None = None
    difference_ci95: Interval | None = None
    p_value: float | None = None


class Advice(BaseModel):
    """What to try next, and why."""

    title: str
    text: str


class Point(BaseModel):
    """One training of a learning curve."""

    share: float
    pairs: int
    accuracy: float
    interval: Interval


class Outcome(BaseModel):
    """The result of a fit.

    Attributes:
        status: "failed" where the model is worse than what it is held against, "warning" where nothing is
            shown.
        first: The sentence that says it.
        more: Sentences after it.
        model: The new model.
        base: The base model, or chance for a base that gives no rewards.
        rule: The best rule without a model.
        shuffled: Accuracy with the references shuffled between rows.
        n_pairs: Held-out pairs.
        n_prompts: Their prompts.
        needed_pairs: Held-out pairs for an interval of ± `WANTED`; None where there are enough.
        needed_prompts: Their prompts.
        curve: The learning curve, by rising share.
        advice: What to try next.
    """

    status: Status
    first: str
    more: list[str]
    model: Side
    base: Side
    rule: Side
    shuffled: float | None
    n_pairs: int
    n_prompts: int
    needed_pairs: int | None
    needed_prompts: int | None
    curve: list[Point] = []
    advice: list[Advice] = []


def judge(
    model_folder: Path,
    base_folder: Path | None,
    *,
    curve: list[Point],
    training: Result,
    tiny: bool,
    without_reference: float,
) -> Outcome:
    """Compares the new model with the base and with rules, and says what follows.

    Args:
        model_folder: Evaluation of the new model.
        base_folder: That of the base, with a ``compare.json`` in the folder above; None where it has no
            reward head.
        curve: Other trainings on parts of the data.
        training: What training found.
        tiny: Whether the base is one of random weights.
        without_reference: Share of the rows without a reference.
    """
    report = Report.model_validate_json((model_folder / METRICS_FILE).read_bytes())
    table = read_scores(model_folder).table
    overall = report.metrics.overall
    best = against_rules(report)
    assert overall.accuracy is not None
    assert overall.interval is not None
    assert best is not None
    model = Side(name="the new model", accuracy=overall.accuracy, interval=overall.interval)
    rule = _held_against(table, best.rule, rule_credit(table, best.rule), share=best.share)
    if base_folder is None:
        base = _held_against(table, "guessing", np.full(len(table), 0.5))
    else:
        base = _base(base_folder)
    n_prompts = overall.n_prompts or overall.n_scored
    needed_pairs, needed_prompts = needed(overall.n_scored, n_prompts, overall.interval)
    status, first = headline(model, base, rule, overall.n_scored)
    use = report.metrics.reference_use
    points = [*curve, Point(share=1.0, pairs=0, accuracy=model.accuracy, interval=overall.interval)]
    more = _more(base, rule, needed_pairs, needed_prompts, overall.interval, overall.n_scored)
    outcome = Outcome(
        status=status,
        first=first,
        more=[line for line in more if not _is_said(line, first)],
        model=model,
        base=base,
        rule=rule,
        shuffled=use.shuffled.overall.accuracy if use and use.shuffled else None,
        n_pairs=overall.n_scored,
        n_prompts=n_prompts,
        needed_pairs=needed_pairs,
        needed_prompts=needed_prompts,
        curve=points if curve else [],
    )
    advice = _advice(outcome, report, training, tiny, without_reference)
    return outcome.model_copy(update={"advice": advice})


def _is_said(line: str, first: str) -> bool:
    """Whether the first line ends as this one does."""
    certainty = line.partition(": ")[2]
    return bool(certainty) and first.endswith(certainty)


def rule_credit(table: PairTable, rule: str) -> NDArray[np.float64]:
    """What a rule without a model gets for each pair: 1 right, 0 wrong, half for what it does not decide."""
    if rule == "chance":
        return np.full(len(table), 0.5)
    if "reference" in rule:
        assert table.chosen_rouge is not None
        assert table.rejected_rouge is not None
        difference = np.nan_to_num(table.chosen_rouge - table.rejected_rouge, nan=0.0)
    else:
        assert table.chosen_chars is not None
        assert table.rejected_chars is not None
        difference = (table.chosen_chars - table.rejected_chars).astype(np.float64)
        difference = -difference if "shorter" in rule else difference
    return (np.sign(difference) + 1) / 2


def _held_against(
    table: PairTable, name: str, credit: NDArray[np.float64], share: float | None = None
) -> Side:
    """The new model against something that has a credit for each pair, by the bootstrap over prompts."""
    scored = table.scored
    gain = (table.margins[scored] > 0).astype(np.float64) - credit[scored]
    prompts = None if table.prompts is None else prompt_numbers(table.prompts[scored])
    boot = bootstrap_ratio(gain, np.ones(len(gain)), prompts, samples=10_000)
    if boot.has_spread:
        interval, p = boot.interval(), boot.p_value()
    else:  # as in `polar_ft.evaluation.statistics.comparison.paired_difference`
        unseen = wilson_interval(0, boot.n_prompts)[1]
        interval = max(-1.0, boot.estimate - unseen), min(1.0, boot.estimate + unseen)
        p = 1.0 if boot.estimate == 0 else min(1.0, 2 * 0.5**boot.n_prompts)
    return Side(
        name=name,
        accuracy=float(credit[scored].mean()) if share is None else share,
        difference=boot.estimate,
        difference_ci95=interval,
        p_value=p,
    )


def _base(folder: Path) -> Side:
    report = Report.model_validate_json((folder / METRICS_FILE).read_bytes())
    compared = Comparisons.model_validate_json((folder.parent / COMPARE_FILE).read_bytes())
    overall = compared.runs[0].comparison.overall
    accuracy = report.metrics.overall.accuracy
    return Side(
        name="the base model",
        accuracy=0.0 if accuracy is None else accuracy,
        interval=report.metrics.overall.interval,
        difference=overall.difference,
        difference_ci95=overall.difference_ci95,
        p_value=overall.p_value,
    )


def needed(n_pairs: int, n_prompts: int, interval: Interval) -> tuple[int | None, int | None]:
    """Pairs and prompts that would give an interval of ± 2 %, if they are clustered as these are.

    The width of an interval falls with the root of the number of prompts. 100 pairs of 50 prompts with an
    interval of ± 8 % (clustering included) need 16 times as many:

    >>> needed(100, 50, (0.62, 0.78))
    (1600, 800)
    >>> needed(5000, 5000, (0.79, 0.81))
    (None, None)
    """
    half = (interval[1] - interval[0]) / 2
    if half <= WANTED:
        return None, None
    factor = round((half / WANTED) ** 2, 6)
    return math.ceil(n_pairs * factor), math.ceil(n_prompts * factor)


def headline(model: Side, base: Side, rule: Side, n_pairs: int) -> tuple[Status, str]:
    """The first line: what is worse is called that.

    >>> model, rule = Side(name="new", accuracy=0.7), Side(name="taking the longer candidate", accuracy=0.73,
    ...     difference=-0.03, difference_ci95=(-0.08, 0.02), p_value=0.2)
    >>> base = Side(name="the base model", accuracy=0.6, difference=0.1, difference_ci95=(0.05, 0.15),
    ...     p_value=0.001)
    >>> print(headline(model, base, rule, 245)[1])
    Worse than a rule without a model: taking the longer candidate is right on 73.0 % of the 245 held-out \
pairs, the new model on 70.0 %.
    """
    right = f"{percent(model.accuracy)} % of the {n_pairs:,} held-out pairs right"
    if base.difference_ci95 is not None and base.difference_ci95[1] < 0:
        return "failed", (
            f"Worse than {base.name}: {right} instead of {percent(base.accuracy)} %, {_certainty(base)}."
        )
    if (rule.difference or 0.0) < 0:
        return "failed", (
            f"Worse than a rule without a model: {rule.name} is right on {percent(rule.accuracy)} % of the "
            f"{n_pairs:,} held-out pairs, the new model on {percent(model.accuracy)} %."
        )
    if base.difference_ci95 is None or base.difference_ci95[0] <= 0:
        return "warning", (
            f"Not shown to be better than {base.name}: {right}, {base.name} {percent(base.accuracy)} %, "
            f"{_certainty(base)}."
        )
    if rule.difference_ci95 is None or rule.difference_ci95[0] <= 0:
        return "warning", (
            f"Better than {base.name}, but not shown to be better than a rule without a model: {right}; "
            f"{rule.name} gets {percent(rule.accuracy)} %, {_certainty(rule)}."
        )
    return "passed", (
        f"Better than {base.name}: {right} instead of {percent(base.accuracy)} %, {_certainty(base)}."
    )


def _certainty(side: Side) -> str:
    if side.difference is None or side.difference_ci95 is None:
        return "which cannot be compared"
    low, high = map(signed_points, side.difference_ci95)
    p = p_value(side.p_value)
    p = p if p.startswith("<") else f"= {p}"
    return f"{signed_points(side.difference)} points (95 % interval {low} to {high}, p {p})"


def _more(
    base: Side,
    rule: Side,
    needed_pairs: int | None,
    needed_prompts: int | None,
    interval: Interval,
    n_pairs: int,
) -> list[str]:
    lines = [f"Against {base.name} ({percent(base.accuracy)} %): {_certainty(base)}."]
    if rule.name != "chance":
        lines.append(
            f"Against the best rule without a model, {rule.name} ({percent(rule.accuracy)} %): "
            f"{_certainty(rule)}."
        )
    if needed_pairs is not None and needed_prompts is not None:
        lines.append(
            f"{many(n_pairs, 'held-out pair')} leave an interval of {percent_interval(interval)} %; for "
            f"±{WANTED:.0%} about {needed_pairs:,} pairs of {needed_prompts:,} prompts would be needed."
        )
    return lines


def _advice(
    outcome: Outcome, report: Report, training: Result, tiny: bool, without_reference: float
) -> list[Advice]:
    found: list[Advice] = []

    def add(title: str, text: str) -> None:
        found.append(Advice(title=title, text=text))

    if tiny:
        add(
            "A real base model",
            "This base is tiny and began with random weights: it shows how everything works, and nothing of "
            "POLAR. On a machine with a GPU: --base internlm/POLAR-1_8B-Base.",
        )
    _advise_on_data(outcome, add)
    length = report.metrics.length
    if length is not None:
        longer, shorter = length.chosen_longer.accuracy, length.rejected_longer.accuracy
        if longer is not None and shorter is not None and _are_apart(length):
            better, worse = ("longer", "shorter") if longer > shorter else ("shorter", "longer")
            add(
                "Length is taken for quality",
                f"It is right on {percent(longer)} % of the pairs whose chosen answer is the longer one and "
                f"on {percent(shorter)} % of those whose is the shorter one. Add pairs in which the {worse} "
                f"answer is the better one, or leave out some in which the {better} one is.",
            )
    use = report.metrics.reference_use
    shuffled = use.shuffled if use else None
    against = shuffled.against_own if shuffled else None
    if without_reference > 0.5:
        add(
            "Add references",
            "Most rows have none. POLAR scores how close an answer comes to a reference: with one good "
            "answer for each prompt it knows what is wanted.",
        )
    elif against is not None and against.difference_ci95 is not None and against.difference_ci95[1] >= 0:
        add(
            "The reference is not shown to be used",
            f"With references shuffled between rows the accuracy changes by "
            f"{signed_points(against.difference)} points, which may be chance. Check that the references are "
            f"good answers to their prompts, and train on pairs that only the reference decides.",
        )
    cut = report.truncation
    if cut is not None and cut.n_pairs > 0.1 * outcome.n_pairs and not tiny:
        add(
            "Texts are cut",
            f"{cut.n_pairs:,} of {many(outcome.n_pairs, 'held-out pair')} are longer than the limits: "
            f"--set max_length=… and --set max_response_length=… raise them.",
        )
    best, steps = training.get("best_step"), training.get("steps") or 0
    if training.get("validations") and not training.get("is_best"):
        add(
            "Training made it no better",
            "No validation was better than the one before training. A lower learning rate (--set lr=…) or "
            "more data may help.",
        )
    elif best is not None and steps and best <= 0.5 * steps:
        add(
            "Shorter training",
            f"The best checkpoint is of step {best} of {steps}; what came later overfits. One pass, or a "
            f"lower learning rate (--set lr=…), does as well.",
        )
    return found


def _are_apart(length: LengthBias) -> bool:
    """Whether pairs with a longer and with a shorter chosen answer differ much, and by more than chance."""
    longer, shorter = length.chosen_longer, length.rejected_longer
    if longer.accuracy is None or shorter.accuracy is None:
        return False
    if longer.accuracy_ci95 is None or shorter.accuracy_ci95 is None:
        return False
    low, high = sorted((longer, shorter), key=lambda group: group.accuracy or 0.0)
    assert low.accuracy_ci95 is not None
    assert high.accuracy_ci95 is not None
    apart = abs(longer.accuracy - shorter.accuracy) > LENGTH_GAP
    return apart and low.accuracy_ci95[1] < high.accuracy_ci95[0]


def _advise_on_data(outcome: Outcome, add: Callable[[str, str], None]) -> None:
    """More data: by the learning curve where there is one."""
    curve = outcome.curve
    if len(curve) > 1:
        before, now = curve[-2], curve[-1]
        gain = now.accuracy - before.accuracy
        # About two standard errors of a difference; the points share their held-out pairs, so it is less.
        noise = math.hypot(*((high - low) / 2 for low, high in (before.interval, now.interval)))
        grown = (
            f"from {before.share:.0%} to all of the data the accuracy went from "
            f"{percent(before.accuracy)} to {percent(now.accuracy)} %"
        )
        if gain > max(0.01, noise / 2):
            add("More data", f"It helps: {grown}. Twice as many pairs may bring about as much again.")
        elif noise <= 2 * WANTED:
            add("Other data, not more", f"The learning curve is flat: {grown}.")
        else:
            add(
                "The learning curve does not tell",
                f"{grown[0].upper()}{grown[1:]}, and such a difference may be chance: it takes more held-out "
                f"pairs to see whether more data helps.",
            )
    elif outcome.model.interval is not None and outcome.model.interval[0] < ALL:
        add(
            "Find out whether more data helps",
            "--learning-curve 3 trains on a quarter and on half of the data as well, and shows what the last "
            "half has brought.",
        )
    if outcome.needed_pairs is not None and outcome.status == "warning":
        add(
            "More held-out pairs",
            f"The measurement is too coarse to tell: about {outcome.needed_pairs:,} held-out pairs of "
            f"{outcome.needed_prompts:,} prompts would give ±{WANTED:.0%}.",
        )
