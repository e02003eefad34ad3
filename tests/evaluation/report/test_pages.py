"""`report.html` and `report.md`: what they say, and that texts of users stay texts."""

from __future__ import annotations

import html.parser

import pytest

from polar_ft.evaluation.report.pages.html import KEPT_CHARS, html_report
from polar_ft.evaluation.report.plots.plots import make_plots
from polar_ft.evaluation.report.worst import FieldText, PairTexts, WorstPair, worst_pairs
from polar_ft.evaluation.report.writing import markdown_report

from .conftest import HOSTILE


class Page(html.parser.HTMLParser):
    """The elements, attributes and visible text of a page; every element must be closed."""

    VOID = frozenset({"meta", "br", "hr", "link", "img"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def page_of(report, table, worst=()):
    return Page(html_report(report, make_plots(report, table), worst))


def texts(chosen, cut=0):
    whole = FieldText("text", 0, 4)
    return PairTexts(whole, (whole,), FieldText(chosen, 0, len(chosen) - cut), whole)


def pair(texts, **fields):
    values = {"row": 0, "id": "r0", "subset": None, "chosen_score": 0.0, "rejected_score": 1.5}
    return WorstPair(**{**values, **fields}, texts=texts)


def test_page_has_all_sections_and_needs_nothing_from_elsewhere(make_run):
    report, table = make_run(["chat", "code"])
    page = page_of(report, table, worst_pairs(table, lambda row: texts(f"answer {row}")))
    ids = [attrs["id"] for attrs in page.all("section")]
    assert ids == [
        "checks",
        "subsets",
        "margins",
        "length",
        "reference",
        "ranking",
        "rm-bench",
        "rmb",
        "run",
        "worst",
    ]
    assert len(page.all("figure")) == len(page.all("svg")) == 6
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table")) > 8
    assert len(page.all("article")) == 20
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    for _, attrs in page.tags:
        assert not {name for name in attrs if name.startswith("on")}
        assert all((attrs.get(name) or "#").startswith("#") for name in ("href", "src", "xlink:href"))
    assert [attrs["href"][1:] for attrs in page.all("a")] == ids[1:]


def test_figures_of_the_page(four_pairs, four_pairs_report):
    page = page_of(four_pairs_report, four_pairs, worst_pairs(four_pairs))
    assert "33.3 % of 3 scored pairs right, 95 % interval 6.1–79.2" in " ".join(page.text.split())
    # Of three scored pairs the rules get one, and one is level: 1/2.
    said = "50.0 % the best rule without a model: taking the shorter candidate The rule is better, by 16.7 p"
    assert said in " ".join(page.text.split())
    assert "The 3 pairs with the lowest margins; 1 of 3 are wrong." in page.text
    assert "Scores alone are known" in page.text


@pytest.mark.parametrize("place", ["model", "subset", "text", "warning", "version"])
def test_texts_of_users_stay_texts(make_run, place):
    name = HOSTILE if place == "subset" else "chat"
    report, table = make_run(
        [name, "code"],
        model=HOSTILE if place == "model" else "m",
        versions={HOSTILE: HOSTILE} if place == "version" else {},
    )
    if place == "warning":
        report = report.model_copy(update={"warnings": [HOSTILE]})
    worst = [pair(texts(HOSTILE), id=HOSTILE, subset=HOSTILE)] if place == "text" else []
    page = page_of(report, table, worst)
    assert not page.all("script")
    assert len(page.all("style")) == 1
    assert "<script>alert(1)</script></style>" in page.text
    assert "⟦U+202E⟧gnp.exe⟦U+001B⟧[31m" in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text

    markdown = markdown_report(report)
    assert "<script" not in markdown.replace("\\<", "")
    assert "\x1b" not in markdown
    if place in ("model", "subset", "warning", "version"):
        assert "\\<script\\>alert(1)\\</script\\>" in markdown


def test_what_was_cut_is_marked(four_pairs, four_pairs_report):
    page = page_of(four_pairs_report, four_pairs, [pair(texts("read, not read", cut=10))])
    assert [attrs["class"] for attrs in page.all("details")] == ["cut"]
    assert "10 of 14 characters cut" in page.text
    assert "cut, not read by the model: 10 characters" in page.text
    assert len(page.all("del")) == 1


def test_long_texts_are_folded_and_very_long_ones_not_kept(four_pairs, four_pairs_report):
    page = page_of(four_pairs_report, four_pairs, [pair(texts("word " * 10_000))])
    assert [attrs["class"] for attrs in page.all("details")] == ["more"]
    assert f"{50_000 - KEPT_CHARS:,} more characters are not kept in this file" in page.text
    assert page.text.count("word") == KEPT_CHARS // 5


def test_a_run_without_one_finite_score_has_a_page(four_pairs, four_pairs_report, make_run):
    report, table = make_run(["chat"], 3)
    table.chosen_score[:] = float("nan")
    table.__dict__.pop("margins", None)
    table.__dict__.pop("scored", None)
    from polar_ft.evaluation.figures import compute_figures

    report = report.model_copy(update={"metrics": compute_figures(table, samples=10)})
    page = page_of(report, table)
    assert "– %" in page.text
    assert not page.all("svg")
    assert "There is no scored pair to show." in page.text
    assert "– %" in markdown_report(report)


def test_markdown_tables_have_one_width(make_run):
    text = markdown_report(make_run(["a|b", "code"])[0])
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) > 8
    for block in blocks:
        widths = {line.replace("\\|", "").count("|") for line in block}
        assert len(widths) == 1
    assert "| a\\|b |" in text
    assert "### Reference use" in text
