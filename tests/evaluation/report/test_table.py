from __future__ import annotations

import io
import re

import numpy as np
from rich.cells import cell_len
from rich.console import Console

from polar_ft.evaluation.figures import compute_figures
from polar_ft.evaluation.pairs import Categories, PairTable
from polar_ft.evaluation.report.report import Report
from polar_ft.evaluation.report.table import TABLE_WIDTH, metrics_table, notes, screen_tables
from polar_ft.evaluation.report.writing import markdown_report

from .conftest import run_info


def render(*tables):
    console = Console(width=TABLE_WIDTH, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def cells_of(text):
    return {name.strip(): rest.split() for name, rest in re.findall(r"^(.*?)  +(\S.*)$", text, re.MULTILINE)}


def test_table_shows_every_figure(four_pairs_report):
    cells = cells_of(render(metrics_table(four_pairs_report)))
    # pairs, accuracy, interval, ties, not finite, margin, log-loss, longer/shorter, like the reference,
    # shuffled references. chat: margins 1 and 0, log-loss (log(1 + 1/e) + log 2) / 2 = (0.3133 + 0.6931) / 2;
    # longer: one longer, one level; like the reference: one, one level; shuffled: margins −1 and 1.
    assert cells["chat"] == [
        *("2", "50.0", "9.5–90.5", "1", "0", "0.500", "0.503", "75.0/25.0", "75.0", "50.0"),
    ]
    assert cells["code"] == ["1", "–", "–", "0", "1", "–", "–", "–", "–", "0.0"]
    assert cells["all pairs"][:2] == ["4", "33.3"]
    # The mean of chat 1/2 and maths 0; code has no scored pair.
    assert cells["mean of subsets"][0] == "25.0"


def test_names_are_not_markup(four_pairs_report):
    assert "[bold]maths" in render(metrics_table(four_pairs_report))


def test_columns_without_a_figure_are_left_out():
    table = PairTable(chosen_score=np.array([1.0, 0.0]), rejected_score=np.array([0.0, 1.0]))
    text = render(
        *screen_tables(Report(metrics=compute_figures(table, samples=50), run=run_info(model=None)))
    )
    assert cells_of(text)["all pairs"] == ["2", "50.0", "9.5–90.5", "0", "0.000", "0.813"]
    for header in ("finite", "longer", "like", "shuf", "no\n"):
        assert header not in text


def test_every_table_fits_100_columns_at_its_widest(make_run):
    names = [
        "a very long name of a subset that goes on and on",
        "data/held_out/multilingual.jsonl",
        "数学题" * 9,
    ]
    report, _ = make_run(names)
    n = 200_000
    wide = PairTable(
        chosen_score=np.tile([-123456.789, np.nan], n // 2),
        rejected_score=np.tile([98765.4321, 1.0], n // 2),
        subsets={"subset": Categories(names, (np.arange(n) % 3).astype(np.int32))},
        chosen_chars=np.full(n, 2),
        rejected_chars=np.full(n, 1),
        chosen_rouge=np.ones(n),
        rejected_rouge=np.zeros(n),
    )
    figures = compute_figures(wide, samples=2)
    use = report.metrics.reference_use
    assert use is not None
    widest = report.model_copy(update={"metrics": figures.model_copy(update={"reference_use": use})})
    for shown in (report, widest):
        text = render(*screen_tables(shown))
        assert max(map(cell_len, text.splitlines())) <= TABLE_WIDTH
        assert "…" not in text  # nothing is cut off, long names go on in the next line
    assert "200000" in text
    assert "-2.2e+05" in text


def test_every_field_and_the_ranked_rows_have_a_table(make_run):
    text = render(*screen_tables(make_run(["chat", "code"])[0]))
    assert re.search(r"^language +pairs", text, re.MULTILINE)
    ranked = text[text.index("Ranked rows") : text.index("RM-Bench")]
    assert cells_of(ranked)["all rows"][0] == "24"
    assert "Kendall" in text


def test_the_summaries_of_benchmarks_are_on_the_screen(make_run):
    report, _ = make_run(["chat", "code"])
    text = render(*screen_tables(report))
    domains = report.metrics.benchmarks.rm_bench
    assert cells_of(text)["mean of domains"] == [
        f"{100 * share:.1f}" for share in (domains.easy, domains.normal, domains.hard, domains.average)
    ]
    assert re.search(r"^RM-Bench +rows", text, re.MULTILINE)
    rmb = report.metrics.benchmarks.rmb
    assert re.search(rf"^chat +6 +{100 * rmb.goals['chat'].accuracy:.1f} ", text, re.MULTILINE)
    assert "RM-Bench: easy: the chosen candidate has the fancier style" in "\n".join(notes(report))


def test_notes_say_what_the_figures_mean(four_pairs_report):
    text = "\n".join(notes(four_pairs_report))
    assert "correct / scored pairs = 1 / 3" in text
    assert "ties as half it is 50.0 %" in text
    # Of three scored pairs one longer, one level, one shorter is chosen; likewise for ROUGE-L.
    assert "the longer candidate wins 50.0 %" in text
    assert "the one most like the reference (ROUGE-L) 50.0 %" in text
    assert "WARNING: scores: 1 of 4 pairs have a score that is NaN or infinite" in text


def test_of_very_many_subsets_the_largest_are_shown(make_run):
    # s0 has two pairs, the others one.
    names = [f"s{i}" for i in range(600)]
    report, _ = make_run(names, 601)
    on_screen = render(metrics_table(report))
    assert re.search(r"^s0 +2 ", on_screen, re.MULTILINE)
    assert "500 smaller subsets are" in " ".join(on_screen.split())
    assert len(re.findall(r"^s\d+ ", on_screen, re.MULTILINE)) == 100
    in_file = markdown_report(report)
    assert "100 smaller subsets are in metrics.json alone." in in_file
