"""``report.html`` of a fit and the result on the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import polar_ft
from polar_ft.evaluation.report.plots.axes import (
    DASHED,
    HEIGHT,
    WIDTH,
    add_grid,
    add_legend,
    new_axes,
    thousands,
)
from polar_ft.evaluation.report.plots.drawing import Plot, Spell, Theme, to_svg
from polar_ft.evaluation.report.texts import percent, percent_interval, signed_points, visible
from polar_ft.files import write_atomically
from polar_ft.fit.choices import Choice
from polar_ft.fit.config_file import as_code
from polar_ft.fit.steps import Result
from polar_ft.fit.verdict import Outcome, Side

# What follows it on a model card is the result of a fit.
_MARK = "\n<!-- polar-ft fit: result -->\n"


def write_report(
    file: Path,
    outcome: Outcome,
    choices: Sequence[Choice],
    *,
    title: str,
    training: Result,
    facts: Sequence[tuple[str, str]],
    steps: Mapping[str, float],
) -> None:
    """Writes the page: one file that opens offline.

    Args:
        file: The page.
        outcome: The result.
        choices: How it was trained, and why so.
        title: Heading.
        training: What training found.
        facts: Of the data and machine, name and text.
        steps: Name of each step to its seconds.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters.update(percent=percent, interval=percent_interval, points=signed_points, code=as_code)
    css = (files("polar_ft.evaluation.report.pages") / "report.css").read_text(encoding="utf-8")
    template = environment.from_string((files(__package__) / "report.html.j2").read_text(encoding="utf-8"))
    plots = [accuracy_plot(outcome)]
    if len(_with_accuracy(training)) > 1:
        plots.append(training_plot(training))
    if len(outcome.curve) > 1:
        plots.append(curve_plot(outcome))
    page = template.render(
        title=title,
        outcome=outcome,
        sides=_sides(outcome),
        choices=choices,
        facts=facts,
        steps=steps,
        plots=[(plot, Markup(to_svg(plot))) for plot in plots],
        css=Markup(css),
        version=polar_ft.__version__,
    )
    write_atomically(file, page)


def accuracy_plot(outcome: Outcome) -> Plot:
    """The new model next to what it is held against."""
    sides = _sides(outcome)
    names = ["new model", "base model" if outcome.base.interval else outcome.base.name, "best rule"]
    names = names[: len(sides)]

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes = new_axes(figure, theme)
        places = np.arange(len(sides))[::-1]
        colours = [theme.first, *([theme.faint] * (len(sides) - 1))]
        axes.barh(places, [side.accuracy for side in sides], height=0.6, color=colours)
        for place, side in zip(places, sides, strict=True):
            if side.interval is not None:
                low, high = side.interval
                axes.plot([low, high], [place, place], color=theme.ink, linewidth=2)
            axes.text(0.02, place, f"{percent(side.accuracy)} %", va="center", color=theme.paper, fontsize=12)
        axes.axvline(0.5, color=theme.ink, linewidth=1, linestyle=DASHED)
        axes.set_yticks(places, names)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))

    shown = ", ".join(f"{name} {percent(side.accuracy)} %" for name, side in zip(names, sides, strict=True))
    return Plot(
        name="accuracy",
        title="Held-out pairs ordered rightly",
        explanation="Lines are 95 % intervals, the dashed line is guessing.",
        alt=f"Accuracy on held-out pairs: {shown}.",
        size=(WIDTH, 0.75 * HEIGHT),
        draw=draw,
    )


def training_plot(training: Result) -> Plot:
    """Accuracy of the validations by step."""
    rows = _with_accuracy(training)
    steps = [row["step"] for row in rows]
    accuracy = np.array([row["accuracy"] for row in rows], dtype=float)
    best = training.get("best_step")

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes = new_axes(figure, theme)
        low = np.array([row["accuracy_low"] for row in rows], dtype=float)
        high = np.array([row["accuracy_high"] for row in rows], dtype=float)
        axes.fill_between(steps, low, high, color=theme.first, alpha=0.15, linewidth=0, label="95 % interval")
        axes.plot(steps, accuracy, color=theme.first, marker="o", markersize=4, label="accuracy")
        if best in steps:
            place = steps.index(best)
            axes.plot(
                [float(steps[place])],
                [accuracy[place]],
                "o",
                color=theme.second,
                markersize=8,
                label="best, kept",
            )
        axes.set_xlabel("optimizer step", color=theme.ink)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_formatter(thousands())
        add_grid(axes, theme, "y")
        add_legend(figure, axes, theme)

    return Plot(
        name="training",
        title="Validation during training",
        explanation="On rows that are neither trained on nor held out; they choose the checkpoint.",
        alt=f"Validation accuracy from {accuracy[0]:.1%} at step {steps[0]} to {accuracy[-1]:.1%} at step "
        f"{steps[-1]}.",
        size=(WIDTH, HEIGHT),
        draw=draw,
    )


def _with_accuracy(training: Result) -> list[Result]:
    """Validations without those that tie most pairs, which is no accuracy of 0: a head of zeros does."""
    rows = training.get("validations", [])
    return [
        row
        for row in rows
        if row["accuracy"] is not None and (row.get("ties_half") or 0) - row["accuracy"] < 0.25
    ]


def curve_plot(outcome: Outcome) -> Plot:
    """Held-out accuracy by the share of the data that was trained on."""
    points = outcome.curve
    shares = [point.share for point in points]
    accuracy = np.array([point.accuracy for point in points])

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes = new_axes(figure, theme)
        low, high = np.array([point.interval for point in points], dtype=float).T
        errors = np.maximum(np.stack([accuracy - low, high - accuracy]), 0.0)
        axes.errorbar(shares, accuracy, yerr=errors, color=theme.first, marker="o", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.minorticks_off()
        axes.set_xlabel("share of the training data", color=theme.ink)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        add_grid(axes, theme, "y")

    return Plot(
        name="curve",
        title="Learning curve",
        explanation="Trainings on parts of the data, measured on the same held-out pairs. Where it still "
        "rises, more data helps.",
        alt=", ".join(f"{point.share:.0%} of the data: {point.accuracy:.1%}" for point in points),
        size=(WIDTH, HEIGHT),
        draw=draw,
    )


def extend_card(card: Path, outcome: Outcome, choices: Sequence[Choice]) -> None:
    """Adds the result to a model card, in place of that of an earlier fit."""
    text, _, _ = card.read_text(encoding="utf-8").partition(_MARK)
    rows = [f"| {side.name} | {percent(side.accuracy)} % | {_interval(side)} |" for side in _sides(outcome)]
    trained = ", ".join(
        f"{choice.name} {as_code(choice.value)}"
        for choice in choices
        if choice.name in ("lr", "max_epochs", "global_batch_pairs", "lora", "deepspeed")
    )
    lines = [
        "## Result",
        "",
        outcome.first,
        "",
        f"| {outcome.n_pairs:,} held-out pairs, {outcome.n_prompts:,} prompts | accuracy | 95 % interval |",
        "|---|---:|---:|",
        *rows,
        "",
        *outcome.more,
        "",
        f"Trained by polar_ft {polar_ft.__version__} (`polar-ft fit`): {trained}.",
        "",
    ]
    write_atomically(card, f"{text}{_MARK}\n" + "\n".join(lines))


def _sides(outcome: Outcome) -> list[Side]:
    sides = [outcome.model, outcome.base]
    return sides if outcome.rule.name == "chance" else [*sides, outcome.rule]


def _interval(side: Side) -> str:
    return "" if side.interval is None else percent_interval(side.interval)
