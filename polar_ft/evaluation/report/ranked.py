"""The sections of a report on ranked rows: best of N, and the summaries that benchmarks publish."""

from __future__ import annotations

from polar_ft.evaluation.report.texts import (
    Row,
    Section,
    TextTable,
    count,
    explained,
    number,
    percent,
    percent_interval,
)
from polar_ft.evaluation.statistics.benchmarks import STYLES, Benchmarks, RewardBench2, RMBench, RMBSummary
from polar_ft.evaluation.statistics.ranking import RankingFigures, RankingMetrics


def ranking_section(figures: RankingFigures) -> Section:
    """Best of N and rank correlations."""
    rows = [_ranking_row(name, metrics) for name, metrics in figures.subsets.items()]
    rows.append(_ranking_row("all rows", figures.overall, strong=True))
    headers = (
        "",
        "rows",
        "candidates",
        "best of N %",
        "95 % interval",
        "chance %",
        "Kendall τ-b",
        "Spearman ρ",
        "not finite",
    )
    notes = [
        "best of N: the candidate scored highest is one of the best; of k level at the top each counts 1/k · "
        "chance: one drawn at random · τ-b and ρ: mean over rows of the order's agreement with the given one."
    ]
    return Section(
        id="ranking",
        title="Ranked rows",
        explanation="Is the best candidate found among several, and is their order right?",
        tables=[TextTable("Ranked rows", headers, rows, notes)],
    )


def _ranking_row(name: str, metrics: RankingMetrics, strong: bool = False) -> Row:
    cells = (
        f"{metrics.n_rows:,}",
        "–" if metrics.n_candidates is None else f"{metrics.n_candidates:.3g}",
        percent(metrics.best_of_n),
        percent_interval(metrics.best_of_n_ci95),
        percent(metrics.chance),
        number(metrics.kendall_tau_b),
        number(metrics.spearman),
        f"{metrics.n_nonfinite:,}",
    )
    return Row(name, cells, strong)


def benchmark_sections(benchmarks: Benchmarks) -> list[Section]:
    """A section for each benchmark that the data has rows of, with the figures that it publishes."""
    sections = []
    if benchmarks.rewardbench_2 is not None:
        sections.append(_rewardbench_2(benchmarks.rewardbench_2))
    if benchmarks.rm_bench is not None:
        sections.append(_rm_bench(benchmarks.rm_bench))
    if benchmarks.rmb is not None:
        sections.append(_rmb(benchmarks.rmb))
    return sections


def _rewardbench_2(figures: RewardBench2) -> Section:
    rows = [
        Row(name, (f"{figures.n_rows[name]:,}", percent(accuracy)))
        for name, accuracy in figures.subsets.items()
    ]
    if (ties := figures.ties) is not None:
        rows.append(Row("Ties", (f"{ties.n_ref + ties.n_tied:,}", percent(ties.score))))
    rows.append(Row("score (mean of subsets)", ("", percent(figures.score)), strong=True))
    notes = []
    if figures.missing_subsets:
        missing = ", ".join(figures.missing_subsets)
        notes.append(f"Not in the data: {missing}. The score is not the leaderboard's.")
    tables = [
        TextTable(
            "RewardBench 2",
            ("subset", "rows", "score %"),
            rows,
            [*notes, *_left_out(figures.n_left_out)],
        )
    ]
    if ties is not None:
        tables.append(
            explained(
                "The subset Ties",
                [
                    ("accuracy, one correct", f"{percent(ties.ref_accuracy)} %", "it is above every other"),
                    (
                        "accuracy, several correct",
                        f"{percent(ties.tied_accuracy)} %",
                        "all are above every other",
                    ),
                    (
                        "correctness preferred",
                        f"{percent(ties.correctness_preferred)} %",
                        "the margin to the wrong ones exceeds the spread of the correct ones",
                    ),
                    (
                        "the same in both forms",
                        f"{percent(ties.correctness_preferred_hard)} %",
                        "the smaller of both margins does",
                    ),
                    ("margin score", number(ties.margin_score), "mean of tanh(margin / spread − 1)"),
                ],
            )
        )
    return Section(
        "rewardbench2",
        "RewardBench 2",
        "Best of four, as the benchmark publishes it (arXiv 2506.01937).",
        tables,
    )


def _rm_bench(figures: RMBench) -> Section:
    rows = [
        Row(
            name,
            (f"{d.n_rows:,}", percent(d.easy), percent(d.normal), percent(d.hard), percent(d.average)),
        )
        for name, d in figures.domains.items()
    ]
    mean = tuple(map(percent, (figures.easy, figures.normal, figures.hard, figures.average)))
    rows.append(Row("mean of domains", ("", *mean), strong=True))
    headers = ("domain", "rows", "easy %", "normal %", "hard %", "average %")
    notes = [
        "easy: the chosen candidate has the fancier style · normal: both have one style · hard: the rejected "
        "one has · the rows of safety-refuse and safety-response are pooled as one domain, safety.",
        *_left_out(figures.n_left_out),
    ]
    if figures.missing_domains:
        missing = ", ".join(figures.missing_domains)
        notes.insert(0, f"Not in the data: {missing}. The means are not the leaderboard's.")
    tables = [TextTable("RM-Bench", headers, rows, notes)]
    for name, domain in figures.domains.items():
        matrix = [
            Row(f"chosen {style.replace('_', ' ')}", tuple(map(percent, values)))
            for style, values in zip(STYLES, domain.matrix, strict=True)
        ]
        columns = ("", *(f"rejected {style.replace('_', ' ')} %" for style in STYLES))
        tables.append(TextTable(f"Accuracy by style: {name}", columns, matrix))
    return Section(
        "rm-bench",
        "RM-Bench",
        "Substance against style, as the benchmark publishes it (arXiv 2410.16184).",
        tables,
    )


def _rmb(figures: RMBSummary) -> Section:
    goals = [
        Row(name, (f"{goal.n_rows:,}", percent(goal.accuracy), percent(goal.macro_accuracy)))
        for name, goal in figures.goals.items()
    ]
    rows = sum(goal.n_rows for goal in figures.goals.values())
    goals.append(Row("all rows", (f"{rows:,}", percent(figures.accuracy), ""), strong=True))
    subsets = [
        Row(name, (f"{figures.n_rows[name]:,}", percent(accuracy)))
        for name, accuracy in figures.subsets.items()
    ]
    tables = [
        TextTable(
            "RMB, best of N",
            ("goal", "rows", "accuracy %", "mean of subsets %"),
            goals,
            ["The best candidate is above every other.", *_left_out(figures.n_left_out)],
        ),
        TextTable("RMB by subset", ("subset", "rows", "accuracy %"), subsets),
    ]
    return Section("rmb", "RMB", "Best of N, as the benchmark publishes it (arXiv 2410.09893).", tables)


def _left_out(n: int) -> list[str]:
    return [f"{count(n, 'row')} without finite scores, or not of the form: left out."] if n else []
