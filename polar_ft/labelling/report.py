"""How well labellers agree with each other and with themselves, and whether they favour a side.

Agreement is Krippendorff's alpha for nominal data (K. Krippendorff, "Computing Krippendorff's
Alpha-Reliability", University of Pennsylvania, 2011): for any number of labellers, of whom each may have seen
other pairs. 1 is agreement on every pair, 0 what chance gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from polar_ft.data.report import many, number_table
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError, printable
from polar_ft.evaluation.statistics.accuracy import wilson_interval
from polar_ft.labelling.decisions import Decision

# What a labelled row says of one labeller.
_OF_ONE = ("labeller", "decision", "number", "repeat", "seconds", "labelled_at")


class Share(BaseModel):
    """A share with its 95 % Wilson interval; both are None where it is a share of nothing.

    >>> Share.of(3, 4).text()
    '3 of 4 (75 %, 30–95)'
    """

    count: int
    of_all: int
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, count: int, of_all: int) -> Share:
        """Counts a share."""
        return cls(count=count, of_all=of_all, interval=wilson_interval(count, of_all) if of_all else None)

    def text(self) -> str:
        """The share in words."""
        if self.interval is None:
            return "none"
        low, high = (round(100 * bound) for bound in self.interval)
        return f"{self.count:,} of {self.of_all:,} ({self.count / self.of_all:.0%}, {low}–{high})".replace(
            "%", " %"
        )


class LabellerReport(BaseModel):
    """What one labeller did.

    Attributes:
        decided: Pairs decided or tied, second looks left out.
        ties: How many of them are ties.
        skipped: Pairs skipped.
        seconds: Median time of a decision, in seconds.
        consistent: Second looks at a pair that gave the same answer or a tie again.
        same_side: Second looks that gave the other answer, on the same side of the page.
        left: Decisions for the answer on the left, of those that are no tie, second looks included.
        with_model: Decisions for the answer to which the model gives the higher reward.
    """

    decided: int
    ties: int
    skipped: int
    seconds: float | None
    consistent: Share
    same_side: int
    left: Share
    with_model: Share


class AgreementReport(BaseModel):
    """What all labellers did.

    Attributes:
        labellers: By name.
        pairs: Pairs that somebody decided.
        shared: How many of them at least two labellers decided.
        alpha: Krippendorff's alpha of the shared ones; None without any.
        two: For each two labellers how often they gave the same answer, by "name, name".
    """

    labellers: dict[str, LabellerReport]
    pairs: int
    shared: int
    alpha: float | None
    two: dict[str, Share]


def report_on(decisions: Sequence[Decision]) -> AgreementReport:
    """Counts decisions of one or several labellers."""
    names = sorted({one.labeller for one in decisions})
    votes = votes_of(decisions)
    two = {}
    for first, second in combinations(names, 2):
        both = [of_pair for of_pair in votes.values() if first in of_pair and second in of_pair]
        same = sum(of_pair[first].winner == of_pair[second].winner for of_pair in both)
        two[f"{first}, {second}"] = Share.of(same, len(both))
    return AgreementReport(
        labellers={
            name: _report_on_one([one for one in decisions if one.labeller == name]) for name in names
        },
        pairs=len(votes),
        shared=sum(len(of_pair) > 1 for of_pair in votes.values()),
        alpha=krippendorff_alpha([[one.winner for one in of_pair.values()] for of_pair in votes.values()]),
        two=two,
    )


def votes_of(decisions: Iterable[Decision]) -> dict[str, dict[str, Decision]]:
    """By pair and labeller the decisions that count: no skips, no second looks."""
    votes: dict[str, dict[str, Decision]] = {}
    for one in decisions:
        if not one.repeat and one.choice != "skip":
            votes.setdefault(one.pair, {})[one.labeller] = one
    return votes


def _report_on_one(decisions: Sequence[Decision]) -> LabellerReport:
    given = [one for one in decisions if one.choice != "skip"]
    first = {one.pair: one for one in given if not one.repeat}
    again = [(first[one.pair], one) for one in given if one.repeat and one.pair in first]
    chosen = [one for one in given if one.winner is not None]
    sided = [one for one in chosen if one.left is not None]
    scored = [one.model_margin for one in chosen if one.model_margin is not None and not one.repeat]
    seconds = [one.seconds for one in given if one.seconds is not None]
    return LabellerReport(
        decided=len(first),
        ties=sum(one.winner is None for one in first.values()),
        skipped=sum(one.choice == "skip" and not one.repeat for one in decisions),
        seconds=median(seconds) if seconds else None,
        consistent=Share.of(sum(was.winner == now.winner for was, now in again), len(again)),
        same_side=sum(was.winner != now.winner and was.choice == now.choice for was, now in again),
        left=Share.of(sum(one.winner == one.left for one in sided), len(sided)),
        with_model=Share.of(sum(margin > 0 for margin in scored), len(scored)),
    )


def krippendorff_alpha(units: Iterable[Sequence[int | None]]) -> float | None:
    """Krippendorff's alpha for nominal data: 1 − (n − 1) · Σ o_ck / Σ n_c n_k, both sums over c ≠ k.

    Here o_ck counts the ordered pairs of values c and k of one unit, each divided by the unit's number of
    values less 1, n_c how often value c occurs, and n all values. Which of two answers is called 0 is
    arbitrary, so that chance is taken to give each of them equally often: n_0 and n_1 are replaced by their
    mean.

    Args:
        units: For each pair the labellers' answers, 0, 1 or None for a tie; units of one value do not count.

    Four pairs, two labellers, one disagreement: o_01 + o_10 = 2, n = 8, n_0 = 5, n_1 = 3, their mean 4:
    1 − 7 · 2 / (4 · 4 + 4 · 4) = 0.5625.

    >>> krippendorff_alpha([[0, 0], [1, 1], [0, 0], [0, 1], [1]])
    0.5625
    """
    differing = 0.0
    counts: Counter[int | None] = Counter()
    for values in units:
        if len(values) > 1:
            here = Counter(values)
            counts += here
            same = sum(count * (count - 1) for count in here.values())
            differing += (len(values) * (len(values) - 1) - same) / (len(values) - 1)
    n, ties = counts.total(), counts[None]
    either = (n - ties) / 2
    by_chance = 2 * either * either + 4 * either * ties
    return 1 - (n - 1) * differing / by_chance if by_chance else None


def write_agreed(decisions: Iterable[Decision], path: Path) -> tuple[int, int]:
    """Writes a row for each pair of which more than half of its labellers prefer the same answer.

    Args:
        decisions: The decisions, with their rows.
        path: The .jsonl file; replaced if it exists.

    Returns:
        Number of pairs written, and of those left out.

    Raises:
        PolarError: There is none to write.
    """
    left_out = 0
    with open_rows(path) as out:
        for votes in votes_of(decisions).values():
            (winner, count), *_ = Counter(one.winner for one in votes.values()).most_common(1)
            if winner is None or 2 * count <= len(votes):
                left_out += 1
                continue
            row = next(one.row for one in votes.values() if one.winner == winner)
            kept = {name: value for name, value in row.items() if name not in _OF_ONE}
            out.write(kept | {"labellers": sorted(votes), "agreement": round(count / len(votes), 3)})
        if not out.count:
            raise PolarError(f"{path}: on no pair do more than half of the labellers agree")
        return out.count, left_out


def show(console: Console, report: AgreementReport) -> None:
    """Prints a report."""
    table = number_table(["", "decided", "ties", "skipped", "seconds"])
    for name, one in report.labellers.items():
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        cells = (f"{one.decided:,}", f"{one.ties:,}", f"{one.skipped:,}", seconds)
        table.add_row(escape(printable(name)), *cells)
    console.print(table)
    for name, one in report.labellers.items():
        lines: list[Any] = [f"consistent on second looks: {one.consistent.text()}"]
        if one.same_side:
            lines[0] += f"; {many(one.same_side, 'time')} the other answer, on the same side"
        bias = one.left.interval is not None and not one.left.interval[0] <= 0.5 <= one.left.interval[1]
        note = "  [yellow]← favours a side[/]" if bias else ""
        lines.append(f"chose the left one: {one.left.text()}{note}")
        if one.with_model.of_all:
            lines.append(f"chose as the model would: {one.with_model.text()}")
        console.print(f"\n[bold]{escape(printable(name))}[/]", *lines, sep="\n  ", soft_wrap=True)
    console.print(
        f"\n{many(report.pairs, 'pair')} decided, {report.shared:,} of them by at least two labellers",
        soft_wrap=True,
    )
    for names, share in report.two.items():
        console.print(f"  {escape(printable(names))}: the same answer for {share.text()}", soft_wrap=True)
    if report.alpha is not None:
        console.print(f"Krippendorff's alpha: [bold]{report.alpha:.2f}[/] (1: always agree, 0: as by chance)")
