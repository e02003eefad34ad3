"""The sections of a report as titles, sentences and tables: what `report.html` and `report.md` both say."""

from __future__ import annotations

from polar_ft.evaluation.figures import Breakdown, Figures, OtherReference
from polar_ft.evaluation.report.ranked import benchmark_sections, ranking_section
from polar_ft.evaluation.report.report import Report
from polar_ft.evaluation.report.texts import (
    MAX_ROWS,
    Row,
    Section,
    TextTable,
    count,
    explained,
    largest,
    number,
    p_value,
    percent,
    percent_interval,
    signed_points,
)
from polar_ft.evaluation.statistics.accuracy import Interval, MacroMetrics, PairMetrics
from polar_ft.evaluation.statistics.baselines import Baseline
from polar_ft.evaluation.statistics.calibration import Calibration
from polar_ft.evaluation.statistics.length import LengthBias


def make_sections(report: Report) -> list[Section]:
    """The sections that the figures have something for, in the order of the report."""
    figures = report.metrics
    sections = [_subsets(figures), _margins(figures)]
    if figures.length is not None:
        sections.append(_length(figures.length, figures.overall))
    if (reference := _reference(report)) is not None:
        sections.append(reference)
    if figures.ranking is not None:
        sections.append(ranking_section(figures.ranking))
    if figures.benchmarks is not None:
        sections += benchmark_sections(figures.benchmarks)
    return [*sections, _run(report)]


def _subsets(figures: Figures) -> Section:
    tables = [_subset_table(figures, name, breakdown) for name, breakdown in figures.subsets.items()]
    if not tables:
        rows = [_pair_row("all pairs", figures.overall, _baseline_cells(figures, None, None), strong=True)]
        tables = [TextTable("All pairs", _SUBSET_HEADERS, rows, [_SUBSET_NOTE])]
    return Section(
        id="subsets",
        title="Accuracy",
        explanation=(
            "How often the chosen candidate gets the higher score, compared with what the same pairs give "
            "without a model."
        ),
        tables=tables,
        plots=("subsets", *(f"subsets_{i}" for i in range(2, len(figures.subsets) + 1))),
    )


_SUBSET_HEADERS = (
    "",
    "pairs",
    "accuracy %",
    "95 % interval",
    "ties",
    "not finite",
    "mean margin",
    "log-loss",
    "longer wins %",
    "shorter wins %",
    "most like reference wins %",
    "chance %",
)
_SUBSET_NOTE = (
    "accuracy: correct / scored pairs, a tie is not correct · not finite: pairs with a NaN or infinite "
    "score, in no other figure · mean margin: chosen − rejected score · log-loss: −log σ(margin), 0.693 is "
    "what knowing nothing gets · longer, shorter, most like the reference (ROUGE-L) wins: the accuracy of "
    "that rule, equal as half."
)


def _subset_table(figures: Figures, field_name: str, breakdown: Breakdown) -> TextTable:
    shown, left_out = largest(breakdown.subsets, MAX_ROWS)
    rows = [
        _pair_row(name, metrics, _baseline_cells(figures, field_name, name))
        for name, metrics in shown.items()
    ]
    means = (*(percent(baseline_mean(rule, field_name)) for rule in _rules(figures)), percent(0.5))
    rows.append(_pair_row("mean of subsets", breakdown.macro, means, strong=True))
    rows.append(_pair_row("all pairs", figures.overall, _baseline_cells(figures, None, None), strong=True))
    # Once is enough.
    notes = [_SUBSET_NOTE] if field_name == next(iter(figures.subsets)) else []
    if any(metrics.accuracy_ci95_by_prompt for metrics in (figures.overall, *breakdown.subsets.values())):
        notes.append(
            "Intervals: bootstrap over prompts where a prompt has several pairs, Wilson's elsewhere."
        )
    notes += left_out
    if breakdown.macro.n_subsets_left_out:
        notes.append(
            f"{count(breakdown.macro.n_subsets_left_out, 'subset')} without a scored pair: not in the mean."
        )
    return TextTable(f"Accuracy by {field_name}", _SUBSET_HEADERS, rows, notes)


def _pair_row(
    name: str, figures: PairMetrics | MacroMetrics, baselines: tuple[str, ...], strong: bool = False
) -> Row:
    counts = ("", "", "")
    if isinstance(figures, PairMetrics):
        counts = (f"{figures.n_pairs:,}", f"{figures.n_ties:,}", f"{figures.n_nonfinite:,}")
    cells = (
        counts[0],
        percent(figures.accuracy),
        percent_interval(figures.interval),
        *counts[1:],
        number(figures.mean_margin),
        number(figures.log_loss),
        *baselines,
    )
    return Row(name, cells, strong)


def _baseline_cells(figures: Figures, field_name: str | None, name: str | None) -> tuple[str, ...]:
    """Accuracy of longer, shorter, most like the reference, and chance."""
    return (*(percent(baseline_of(rule, field_name, name)) for rule in _rules(figures)), percent(0.5))


def _rules(figures: Figures) -> tuple[Baseline | None, ...]:
    rules = figures.baselines
    return rules.longer_wins, rules.shorter_wins, rules.most_like_reference


def baseline_of(rule: Baseline | None, field_name: str | None, name: str | None) -> float | None:
    """A rule's accuracy on one subset, or on all pairs where no subset is named."""
    if rule is None:
        return None
    return rule.overall if field_name is None or name is None else rule.subsets.get(field_name, {}).get(name)


def baseline_mean(rule: Baseline | None, field_name: str) -> float | None:
    """Mean of a rule's accuracy over the subsets of a field that have a scored pair.

    >>> rule = Baseline(overall=0.4, macro=None, subsets={"language": {"de": 0.5, "en": 0.3, "zh": None}})
    >>> baseline_mean(rule, "language")
    0.4
    """
    known = [
        share for share in (rule.subsets.get(field_name, {}) if rule else {}).values() if share is not None
    ]
    return sum(known) / len(known) if known else None


def _margins(figures: Figures) -> Section:
    tables = [] if figures.calibration is None else [_calibration(figures.calibration)]
    return Section(
        id="margins",
        title="Margins and calibration",
        explanation="By how much the model prefers what it prefers, and does that say how sure one may be?",
        tables=tables,
        plots=("margins", "reliability"),
    )


def _calibration(figures: Calibration) -> TextTable:
    rows = [
        (
            "expected calibration error",
            number(figures.ece),
            "mean distance of accuracy and confidence over the bins of the curve; 0 is perfect",
        ),
        ("Brier score", number(figures.brier), "mean squared error of σ(margin); 0.25 knows nothing"),
        ("log-loss", number(figures.log_loss), "mean of −log σ(margin); 0.693 knows nothing"),
        (
            "fitted temperature",
            number(figures.temperature),
            figures.temperature_note
            or "σ(margin / T) has the least log-loss; above 1 the model is too sure, below 1 not enough",
        ),
    ]
    if figures.temperature is not None:
        rows += [
            (
                "log-loss at that temperature",
                number(figures.log_loss_at_temperature),
                "what is left when only the scale of the scores is mended",
            ),
            ("calibration error at it", number(figures.ece_at_temperature), "likewise"),
        ]
    return explained("Calibration", rows)


def _length(figures: LengthBias, overall: PairMetrics) -> Section:
    groups = [
        ("chosen is longer", figures.chosen_longer),
        ("rejected is longer", figures.rejected_longer),
        ("equally long", figures.equal_length),
    ]
    rows = [
        (
            f"accuracy where {name}",
            f"{percent(group.accuracy)} %",
            f"{count(group.n_pairs, 'pair')}; {_interval(group.accuracy_ci95)}",
        )
        for name, group in groups
        if group.n_pairs
    ]
    rows += [
        (
            "length-controlled accuracy",
            f"{percent(figures.length_controlled_accuracy)} %",
            (
                f"what it would be if both candidates were equally long, ties as half; with their lengths it "
                f"is {percent(overall.accuracy_ties_half)} %; {_interval(figures.length_controlled_ci95)}"
            ),
        ),
        (
            "length effect",
            number(figures.length_effect),
            "log-odds that one standard deviation of length difference brings; above 0 favours long ones",
        ),
        (
            "score and length, Spearman ρ",
            number(figures.score_and_length.spearman),
            f"over all candidates; Pearson r {number(figures.score_and_length.pearson)}",
        ),
        (
            "margin and length difference, Spearman ρ",
            number(figures.margin_and_difference.spearman),
            f"over pairs; Pearson r {number(figures.margin_and_difference.pearson)}",
        ),
    ]
    return Section(
        id="length",
        title="Length",
        explanation=f"Is length taken for quality? Lengths are {figures.unit} before anything was cut.",
        tables=[explained("Length", rows)],
        plots=("length_difference", "score_length"),
    )


def _interval(interval: Interval | None) -> str:
    return "no interval" if interval is None else f"95 % interval {percent_interval(interval)}"


def _reference(report: Report) -> Section | None:
    use = report.metrics.reference_use
    if use is None:
        return None
    own = report.metrics.overall
    rows = [_reference_row("its own", own, None)]
    notes = []
    for name, other in (("another row's", use.shuffled), ("empty", use.empty)):
        if other is not None:
            rows.append(_reference_row(name, other.overall, other))
    if use.shuffled is not None and report.run.n_same_reference:
        notes.append(
            f"{count(report.run.n_same_reference, 'pair')} kept the same reference text, for want of another."
        )
    tables = []
    if len(rows) > 1:
        headers = ("reference", "accuracy %", "95 % interval", "difference", "its interval", "p", "ties")
        tables.append(TextTable("Accuracy by reference", headers, rows, notes))
        tables += _reference_subsets(report.metrics)
    if use.n_reference_is_chosen is not None:
        known = [
            (
                "reference = chosen",
                f"{percent(use.n_reference_is_chosen / own.n_pairs if own.n_pairs else None)} %",
                f"{use.n_reference_is_chosen:,} of {own.n_pairs:,} pairs, which copying gets right",
            )
        ]
        for name, metrics in (
            ("accuracy on those", use.reference_is_chosen),
            ("accuracy on the others", use.reference_is_not_chosen),
        ):
            if metrics is not None and metrics.n_scored:
                said = (
                    f"{count(metrics.n_scored, 'pair')}, 95 % interval {percent_interval(metrics.interval)}"
                )
                known.append((name, f"{percent(metrics.accuracy)} %", said))
        tables.append(explained("References that are the chosen candidate", known))
    return Section(
        id="reference",
        title="Reference use",
        explanation=(
            "A model that reads the reference loses accuracy with another one; one that judges the answer "
            "alone does not."
        ),
        tables=tables,
    )


def _reference_row(name: str, metrics: PairMetrics, other: OtherReference | None) -> Row:
    against = other.against_own if other is not None else None
    return Row(
        name,
        (
            percent(metrics.accuracy),
            percent_interval(metrics.interval),
            signed_points(against.difference) if against else "",
            " to ".join(map(signed_points, against.difference_ci95))
            if against and against.difference_ci95
            else "",
            p_value(against.p_value) if against else "",
            f"{metrics.n_ties:,}",
        ),
    )


def _reference_subsets(figures: Figures) -> list[TextTable]:
    """Accuracy of each subset under each reference."""
    use = figures.reference_use
    assert use is not None
    others = [(n, o) for n, o in (("another row's %", use.shuffled), ("empty %", use.empty)) if o is not None]
    tables = []
    for field_name, breakdown in figures.subsets.items():
        shown, left_out = largest(breakdown.subsets, MAX_ROWS)
        rows = [
            Row(
                name,
                (
                    percent(metrics.accuracy),
                    *(percent(other.subsets.get(field_name, {}).get(name)) for _, other in others),
                ),
            )
            for name, metrics in shown.items()
        ]
        headers = ("", "its own %", *(name for name, _ in others))
        tables.append(TextTable(f"Accuracy by reference and {field_name}", headers, rows, left_out))
    return tables


def _run(report: Report) -> Section:
    run = report.run
    known: list[tuple[str, object]] = [
        ("model", run.model),
        ("model SHA-256", run.model_sha256),
        ("engine", run.engine),
        *((f"data {i}" if len(run.data) > 1 else "data", file.path) for i, file in enumerate(run.data, 1)),
        *(
            (f"data {i} SHA-256" if len(run.data) > 1 else "data SHA-256", file.sha256)
            for i, file in enumerate(run.data, 1)
        ),
        ("rows", f"{run.n_rows:,}"),
        ("pairs ranked the same by the data, left out", f"{run.n_ties_in_data:,}"),
        ("pairing of ranked rows", run.pairing),
        ("several references of a row", run.reference_aggregation),
        ("dtype", run.dtype),
        ("device", run.device),
        ("max_length, tokens", run.max_length),
        ("max_response_length, tokens", run.max_response_length),
        ("template fingerprint", run.template_fingerprint),
        ("seed of shuffled references", run.shuffle_seed),
        ("candidates scored by an earlier run", run.n_from_cache),
        ("seconds of scoring", run.seconds),
        ("pairs/s", run.pairs_per_second),
        ("bootstrap samples, seed", f"{report.metrics.bootstrap_samples:,}, {report.metrics.bootstrap_seed}"),
        ("created (UTC)", run.created),
        *run.versions.items(),
    ]
    rows = [Row(name, (str(value),)) for name, value in known if value is not None]
    return Section(
        id="run",
        title="Run",
        explanation="What the figures have to be read with, and what it takes to get them again.",
        tables=[TextTable("Model, data, settings, versions", ("", "value"), rows, explained=True)],
    )
