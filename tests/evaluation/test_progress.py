from __future__ import annotations

import io

import pytest
from rich.console import Console

from polar_ft.evaluation.progress import progress_text, scoring_progress


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 10, 0.0, 0.0), "0/10 pairs"),
        # 3 pairs in 6 s; a tenth of the work in 6 s, so nine tenths take 54 s.
        ((3, 10, 6.0, 0.1), "3/10 pairs, 0.5 pairs/s, 0:00:54 left"),
        ((10, 10, 3723.0, 1.0), "10/10 pairs, 0.0 pairs/s, took 1:02:03"),
    ],
)
def test_progress_text(arguments, text):
    assert progress_text(*arguments) == text


def test_a_log_file_gets_a_line_now_and_then(make_example):
    examples = [make_example(row, prompt="p" * 20) for row in range(10)]
    console = Console(file=io.StringIO(), width=40)
    seconds = iter(range(0, 1000, 10))  # each look at the clock is 10 s later
    with scoring_progress("scoring", examples, console, clock=lambda: next(seconds)) as on_chunk:
        for example in examples:
            on_chunk([example])
    # Started at 0 s; a line after 30, 60 and 90 s, and at the end.
    assert console.file.getvalue().splitlines() == [
        "scoring: 3/10 pairs, 0.1 pairs/s, 0:01:10 left",
        "scoring: 6/10 pairs, 0.1 pairs/s, 0:00:40 left",
        "scoring: 9/10 pairs, 0.1 pairs/s, 0:00:10 left",
        "scoring: 10/10 pairs, 0.1 pairs/s, took 0:01:40",
    ]


def test_a_terminal_gets_a_bar(make_example):
    examples = [make_example(row) for row in range(4)]
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with scoring_progress("scoring", examples, console) as on_chunk:
        on_chunk(examples)
    last = console.file.getvalue()
    assert "100 %" in last
    assert "4/4 pairs" in last
    assert "pairs/s, took 0:00:00" in last


def test_time_left_goes_by_characters_not_by_pairs(make_example):
    # One example of 90 % of the characters, scored first: of 10 s a tenth is left, not ten times as much.
    short = [make_example(row, prompt="", reference="", candidates=("a", "b")) for row in range(5)]
    long = make_example(9, prompt="", reference="", candidates=("a" * 45, "b" * 45))
    console = Console(file=io.StringIO(), width=200)
    seconds = iter([0.0, 45.0])
    with scoring_progress("scoring", [long, *short], console, clock=lambda: next(seconds)) as on_chunk:
        on_chunk([long])
    assert console.file.getvalue() == "scoring: 1/6 pairs, 0.0 pairs/s, 0:00:05 left\n"
