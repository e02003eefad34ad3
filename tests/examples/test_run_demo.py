"""The demo's own code: what it runs, what it takes for a failure, and what it promises."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from examples.run_demo import (
    PartSummary,
    Runner,
    parts,
    results_table,
    run_part,
    shortfalls,
    summarize,
)
from polar_ft.errors import PolarError

GOOD = {
    "n_pairs": 800,
    "accuracy": 0.98,
    "accuracy_ci95": (0.96, 0.99),
    "accuracy_shuffled_reference": 0.5,
    "accuracy_length_baseline": 0.5,
    "accuracy_shorter_baseline": 0.5,
    "train_seconds": 60.0,
    "hf_dir": "hf",
    "max_abs_score_diff_export": 1e-6,
    "eval_dir": "eval",
    "train_dir": "train",
}


def runner() -> Runner:
    return Runner(Console(file=io.StringIO()))


def test_each_part_is_a_call_of_fit(tmp_path: Path) -> None:
    """Nothing is set: what a newcomer gets is what `polar-ft fit` chooses."""
    commands = []

    def run(command: list[str | Path], log: Path | None = None) -> str:
        commands.append(command)
        if command[1] == "fit":
            raise PolarError("enough")
        return ""

    for part in parts(tmp_path):
        with pytest.raises(PolarError, match="enough"):
            run_part(part, tmp_path / part.name, run)  # type: ignore[arg-type]
        assert part.held_out.name in ("held_out.jsonl", "alpaca_held_out.jsonl")
        assert commands[-1] == [
            *("polar-ft", "fit", part.data, "--held-out", part.held_out),
            *("--out", tmp_path / part.name, "--yes"),
        ]


def test_a_command_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    command = ["python", "-c", "print('the reason [/x]'); raise SystemExit(3)"]
    with pytest.raises(PolarError, match=r"(?s)the reason \[/x\].*status 3.*a\.log"):
        runner()(command, log)
    assert "the reason" in log.read_text(encoding="utf-8")


def test_a_command_that_is_not_installed_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PolarError, match="no-such-command: no such command; run `make install` first"):
        runner()(["no-such-command"], tmp_path / "a.log")


def test_commands_run_in_this_environment(tmp_path: Path) -> None:
    output = runner()(["python", "-c", "import polar_ft; print('found')"], tmp_path / "a.log")
    assert output.splitlines()[-1] == "found"


def test_summary_has_the_keys_that_were_promised(tmp_path: Path) -> None:
    metrics = {
        "metrics": {
            "overall": {"n_scored": 4, "accuracy": 0.75, "accuracy_ci95": [0.3, 0.95]},
            "reference_use": {"shuffled": {"overall": {"accuracy": 0.5}}},
            "baselines": {"longer_wins": {"overall": 0.6}, "shorter_wins": {"overall": 0.4}},
        }
    }
    summary = summarize(metrics, {"max_abs_score_diff_export": 1e-6}, 12.34, tmp_path)
    assert {
        "n_pairs": 4,
        "accuracy": 0.75,
        "accuracy_ci95": [0.3, 0.95],
        "accuracy_shuffled_reference": 0.5,
        "accuracy_length_baseline": 0.6,
        "train_seconds": 12.3,
        "hf_dir": str(tmp_path / "model"),
        "max_abs_score_diff_export": 1e-6,
    }.items() <= summary.model_dump(mode="json").items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"accuracy": 0.94}, "accuracy 94.0% is below 95%"),
        ({"accuracy_shuffled_reference": 0.61}, "61.0% is above 60%"),
        ({"max_abs_score_diff_export": 2e-4}, "differ by 2.0e-04"),
        ({"max_abs_score_diff_export": float("nan")}, "differ by nan"),
    ],
)
def test_shortfalls(change: dict, message: str | None) -> None:
    found = shortfalls({"domain_rm": PartSummary(**{**GOOD, **change})})
    assert len(found) == (message is not None)
    assert message is None or re.search(re.escape(message), found[0])


def test_table_fits_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table({"domain_rm": PartSummary(**GOOD), "alpaca": PartSummary(**GOOD)}))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "98.0%" in output
    assert "96.0% – 99.0%" in output
