"""`report.html`: one file that opens offline, without a script, a font or a style from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

import polar_ft
from polar_ft.evaluation.report.checks import make_checks, verdict
from polar_ft.evaluation.report.plots.drawing import Plot, to_svg
from polar_ft.evaluation.report.report import Report
from polar_ft.evaluation.report.sections import Section, TextTable, make_sections
from polar_ft.evaluation.report.texts import count, number, percent, percent_interval, visible
from polar_ft.evaluation.report.worst import FieldText, WorstPair

# Of a long text this much is shown at once, the rest when it is unfolded.
SHOWN_CHARS = 700
SHOWN_LINES = 12
# And no more than this much of it goes into the file: twenty pairs of book chapters are not a report.
KEPT_CHARS = 20_000


@dataclass(frozen=True)
class _DrawnPlot:
    title: str
    explanation: str
    svg: Markup


@dataclass(frozen=True)
class _DrawnSection:
    id: str
    title: str
    explanation: str
    tables: list[TextTable]
    plots: list[_DrawnPlot]


@dataclass(frozen=True)
class _Figure:
    name: str
    value: str
    explanation: str


@dataclass(frozen=True)
class _Part:
    """A piece of a text: read by the model or cut, its beginning, the rest, and what is in no file."""

    cut: bool
    size: str
    head: str
    rest: str
    n_left_out: str


@dataclass(frozen=True)
class _Field:
    parts: list[_Part]
    n_cut: str


def html_report(report: Report, plots: Sequence[Plot], worst: Sequence[WorstPair]) -> str:
    """The page.

    Args:
        report: The figures.
        plots: The plots of `make_plots`.
        worst: The pairs to show, lowest margin first.
    """
    drawn = {plot.name: _DrawnPlot(plot.title, plot.explanation, Markup(to_svg(plot))) for plot in plots}
    overall = report.metrics.overall
    page = {
        "title": f"Preference accuracy of {_name(report)}",
        "accuracy": f"{percent(overall.accuracy)} %",
        "subline": (
            f"of {count(overall.n_scored, 'scored pair')} right, 95 % interval "
            f"{percent_interval(overall.interval)}"
        ),
        "verdict": verdict(report),
        "figures": _figures(report),
        "checks": make_checks(report),
        "sections": [_draw(section, drawn) for section in make_sections(report)],
        "worst": [_pair(pair) for pair in worst],
        "worst_explanation": _worst_explanation(report, worst),
        "footer": f"Made by polar_ft {polar_ft.__version__}, {report.run.created}.",
    }
    css = (files(__package__) / "report.css").read_text(encoding="utf-8")
    return _template().render(page=page, css=Markup(css))


@lru_cache(maxsize=1)
def _template() -> Template:
    # Whatever the page shows passes `_shown` and is escaped: no text has to be thought of one by one.
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown)
    environment.filters["percent"] = percent
    return environment.from_string((files(__package__) / "report.html.j2").read_text(encoding="utf-8"))


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _name(report: Report) -> str:
    return report.run.model or ", ".join(file.path for file in report.run.data) or "saved scores"


def _draw(section: Section, drawn: dict[str, _DrawnPlot]) -> _DrawnSection:
    plots = [drawn[name] for name in section.plots if name in drawn]
    return _DrawnSection(section.id, section.title, section.explanation, section.tables, plots)


def _figures(report: Report) -> list[_Figure]:
    figures = report.metrics
    overall = figures.overall
    shown = []
    if figures.macro is not None:
        shown.append(
            _Figure(
                "mean of subsets",
                f"{percent(figures.macro.accuracy)} %",
                f"{count(figures.macro.n_subsets, 'subset')}, each counting the same; "
                f"95 % interval {percent_interval(figures.macro.interval)}",
            )
        )
    shown.append(
        _Figure(
            "ties",
            f"{overall.n_ties:,}",
            f"exactly equal scores, not correct; as half: {percent(overall.accuracy_ties_half)} %",
        )
    )
    if overall.n_nonfinite:
        shown.append(_Figure("not finite", f"{overall.n_nonfinite:,}", "pairs with a NaN or infinite score"))
    shown.append(_Figure("mean margin", number(overall.mean_margin), "chosen − rejected score"))
    shown.append(_Figure("log-loss", number(overall.log_loss), "−log σ(margin); 0.693 is knowing nothing"))
    if figures.calibration is not None:
        shown.append(
            _Figure(
                "calibration error",
                number(figures.calibration.ece),
                "accuracy against confidence; 0 is perfect",
            )
        )
    if figures.length is not None and figures.length.length_controlled_accuracy is not None:
        shown.append(
            _Figure(
                "length-controlled",
                f"{percent(figures.length.length_controlled_accuracy)} %",
                "accuracy if both candidates were equally long",
            )
        )
    if figures.ranking is not None:
        shown.append(
            _Figure(
                "best of N",
                f"{percent(figures.ranking.overall.best_of_n)} %",
                f"{count(figures.ranking.overall.n_scored, 'ranked row')}; chance is "
                f"{percent(figures.ranking.overall.chance)} %",
            )
        )
    return shown


def _worst_explanation(report: Report, worst: Sequence[WorstPair]) -> str:
    if not worst:
        return "There is no scored pair to show."
    overall = report.metrics.overall
    n_wrong = overall.n_scored - overall.n_correct - overall.n_ties
    said = (
        f"The {count(len(worst), 'pair')} with the lowest margins; {n_wrong:,} of {overall.n_scored:,} are "
        f"wrong. "
    )
    if all(pair.texts is None for pair in worst):
        return f"{said}Scores alone are known, so there are no texts to show."
    return f"{said}What was cut to the model's limits is marked: the model has not read it."


def _pair(pair: WorstPair) -> dict[str, object]:
    return {
        "name": pair.id or f"row {pair.row + 1}",
        "subset": None if pair.subset is None else pair.subset,
        "outcome": "wrong" if pair.margin < 0 else "tie" if pair.margin == 0 else "right",
        "margin": number(pair.margin).replace("-", "−"),
        "chosen_score": number(pair.chosen_score).replace("-", "−"),
        "rejected_score": number(pair.rejected_score).replace("-", "−"),
        "fields": {
            "prompt": _field(pair.texts.prompt),
            "references": [_field(reference) for reference in pair.texts.references],
            "chosen": _field(pair.texts.chosen),
            "rejected": _field(pair.texts.rejected),
        }
        if pair.texts is not None
        else None,
    }


def _field(field: FieldText) -> _Field:
    text, start, stop = field.text, field.start, field.stop
    pieces = [(True, text[:start]), (False, text[start:stop]), (True, text[stop:])]
    n_cut = len(text) - (stop - start)
    return _Field(
        [_part(piece, cut) for cut, piece in pieces if piece],
        f"{n_cut:,} of {len(text):,}" if n_cut else "",
    )


def _part(text: str, cut: bool) -> _Part:
    kept = text[:KEPT_CHARS]
    end = min(SHOWN_CHARS, sum(map(len, kept.splitlines(keepends=True)[:SHOWN_LINES])))
    if len(kept) < 1.25 * end:  # a fold of a few words is a nuisance
        end = len(kept)
    left_out = max(0, len(text) - KEPT_CHARS)
    return _Part(cut, f"{len(text):,}", kept[:end], kept[end:], f"{left_out:,}" if left_out else "")
