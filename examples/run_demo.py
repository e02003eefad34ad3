"""Runs the main workflow from end to end: `polar-ft fit` on two data sets; run by `make demo`.

- ``domain_rm``: a catalogue in which only the reference determines which answer is right
    (examples/domain_rm).
- ``alpaca``: ranked answers of real models (examples/data).

Then the scores of each model are compared with what transformers computes from its folder
(examples/check_export.py). Writes ``work_dirs/demo/summary.json``; ends with status 1 if a command fails or
the domain is not learned.

    python examples/run_demo.py [--work-dir work_dirs/demo]
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.errors import PolarError

ROOT = Path(__file__).resolve().parents[1]

# What the domain part has to reach; for the slice of real answers nothing is required.
MIN_DOMAIN_ACCURACY = 0.95
MAX_DOMAIN_ACCURACY_SHUFFLED = 0.60
MAX_SCORE_DIFF = 1e-4


@dataclass(frozen=True)
class Part:
    """One part of the demo.

    Attributes:
        name: Name of its folder and key in the summary.
        data: What `polar-ft fit` is given.
        held_out: Held-out data; shares no prompt with ``data``.
        make_data: Command that makes the data first, if any.
    """

    name: str
    data: Path
    held_out: Path
    make_data: Sequence[str | Path] = ()


class PartSummary(BaseModel):
    """Results of a part, as stored in summary.json.

    Attributes:
        n_pairs: Held-out pairs that were scored.
        accuracy: Share of them with the chosen answer scored above the rejected one; a tie is not.
        accuracy_ci95: Its 95 % interval; by prompt where a prompt has several pairs, else Wilson's.
        accuracy_shuffled_reference: The same with references shuffled between rows.
        accuracy_length_baseline: Of "the longer answer wins" on the same pairs; equal lengths count half.
        accuracy_shorter_baseline: Of "the shorter answer wins".
        train_seconds: Wall-clock time of training.
        hf_dir: The exported folder.
        max_abs_score_diff_export: See examples/check_export.py.
        eval_dir: Where metrics.json and scores.jsonl are.
        train_dir: Where checkpoints, logs and TensorBoard files are.
    """

    n_pairs: int
    accuracy: float
    accuracy_ci95: tuple[float, float]
    accuracy_shuffled_reference: float
    accuracy_length_baseline: float
    accuracy_shorter_baseline: float
    train_seconds: float
    hf_dir: str
    max_abs_score_diff_export: float
    eval_dir: str
    train_dir: str


@dataclass
class Runner:
    """Runs commands in the root of the repository.

    Attributes:
        console: Where commands and their times are shown.
    """

    console: Console
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        # The commands of this environment come first, whether it is activated or not. One thread: for models
        # this small a second one gains nothing, and next to other programs it takes several times as long.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        self.environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}

    def __call__(self, command: Sequence[str | Path], log: Path | None = None) -> str:
        """Runs a command.

        Args:
            command: The words.
            log: File for what it prints; None shows it as it comes.

        Returns:
            What is in the log.

        Raises:
            PolarError: It failed; the message holds the end of its log.
        """
        words = [_relative(word) for word in command]
        shown = shlex.join(words)
        self.console.print(f"[dim]$[/] {escape(shown)}", highlight=False, soft_wrap=True)
        self.console.file.flush()
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        output = None if log is None else log.open("wb")
        try:
            done = subprocess.run(
                words, stdout=output, stderr=output, cwd=ROOT, env=self.environment, check=False
            )
        except FileNotFoundError as error:
            raise PolarError(f"{words[0]}: no such command; run `make install` first") from error
        finally:
            if output is not None:
                output.close()
        text = "" if log is None else log.read_text(encoding="utf-8", errors="replace")
        if done.returncode != 0:
            tail = "".join(f"\n{line}" for line in text.splitlines()[-30:])
            where = "" if log is None else f"; the complete log: {log}"
            raise PolarError(f"{shown}{tail}\nfailed with status {done.returncode}{where}")
        return text


def parts(work_dir: Path) -> list[Part]:
    """The two parts."""
    catalogue, slice_dir = work_dir / "catalogue", ROOT / "examples" / "data"
    return [
        Part(
            name="domain_rm",
            make_data=["examples/domain_rm/make_data.py", catalogue],
            data=catalogue / "train.jsonl",
            held_out=catalogue / "held_out.jsonl",
        ),
        Part(
            name="alpaca",
            data=slice_dir / "alpaca_train.jsonl",
            held_out=slice_dir / "alpaca_held_out.jsonl",
        ),
    ]


def run_part(part: Part, out: Path, run: Runner) -> PartSummary:
    """Runs all commands of a part.

    Args:
        part: The part.
        out: Folder of its fit.
        run: Runs a command.

    Raises:
        PolarError: A command failed.
    """
    python, logs = "python", out.parent / "logs"
    if part.make_data:
        run([python, *part.make_data], logs / f"{part.name}_data.log")
    run(["polar-ft", "fit", part.data, "--held-out", part.held_out, "--out", out, "--yes"])
    steps = json.loads((out / "fit.json").read_text(encoding="utf-8"))["done"]
    checkpoint = Path(steps["train"]["result"]["checkpoint"])
    compare: list[str | Path] = [python, "examples/check_export.py", out / "config.py", checkpoint]
    compared = run([*compare, out / "model", part.held_out], logs / f"{part.name}_check_export.log")
    metrics = json.loads((out / "eval" / "model" / "metrics.json").read_text(encoding="utf-8"))
    return summarize(metrics, json.loads(compared.splitlines()[-1]), steps["train"]["seconds"], out)


def summarize(metrics: Mapping, compared: Mapping, train_seconds: float, out: Path) -> PartSummary:
    """The summary of a part from metrics.json and the output of check_export.py."""
    overall = metrics["metrics"]["overall"]
    return PartSummary(
        n_pairs=overall["n_scored"],
        accuracy=overall["accuracy"],
        # By prompt where a prompt has several pairs, as the report shows it.
        accuracy_ci95=overall.get("accuracy_ci95_by_prompt") or overall["accuracy_ci95"],
        accuracy_shuffled_reference=metrics["metrics"]["reference_use"]["shuffled"]["overall"]["accuracy"],
        accuracy_length_baseline=metrics["metrics"]["baselines"]["longer_wins"]["overall"],
        accuracy_shorter_baseline=metrics["metrics"]["baselines"]["shorter_wins"]["overall"],
        train_seconds=round(train_seconds, 1),
        hf_dir=_relative(out / "model"),
        max_abs_score_diff_export=compared["max_abs_score_diff_export"],
        eval_dir=_relative(out / "eval" / "model"),
        train_dir=_relative(out / "train"),
    )


def shortfalls(summary: Mapping[str, PartSummary]) -> list[str]:
    """The promises of the demo that were not met, in words; empty if all were met."""
    domain = summary["domain_rm"]
    found = []
    if domain.accuracy < MIN_DOMAIN_ACCURACY:
        found.append(f"domain_rm: accuracy {domain.accuracy:.1%} is below {MIN_DOMAIN_ACCURACY:.0%}")
    if domain.accuracy_shuffled_reference > MAX_DOMAIN_ACCURACY_SHUFFLED:
        found.append(
            f"domain_rm: accuracy with shuffled references {domain.accuracy_shuffled_reference:.1%} is above "
            f"{MAX_DOMAIN_ACCURACY_SHUFFLED:.0%}: something other than the reference reveals the answer"
        )
    for name, part in summary.items():
        difference = part.max_abs_score_diff_export
        if not difference <= MAX_SCORE_DIFF:  # NaN is one too
            found.append(
                f"{name}: exported scores differ by {difference:.1e}, more than {MAX_SCORE_DIFF:.0e}"
            )
    return found


def results_table(summary: Mapping[str, PartSummary]) -> Table:
    """The results, a column for each part."""
    table = Table(title="Held-out preference accuracy")
    table.add_column()
    for name in summary:
        table.add_column(name, justify="right")
    rows = {
        "pairs": lambda p: f"{p.n_pairs:,}",
        "accuracy": lambda p: f"[bold]{p.accuracy:.1%}",
        "  95 % interval": lambda p: f"{p.accuracy_ci95[0]:.1%} – {p.accuracy_ci95[1]:.1%}",
        "  references shuffled": lambda p: f"{p.accuracy_shuffled_reference:.1%}",
        '"the longer answer wins"': lambda p: f"{p.accuracy_length_baseline:.1%}",
        '"the shorter answer wins"': lambda p: f"{p.accuracy_shorter_baseline:.1%}",
        "training": lambda p: f"{p.train_seconds:.0f} s",
        "score difference after export": lambda p: f"{p.max_abs_score_diff_export:.1e}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(part) for part in summary.values()))
    return table


def _relative(path: str | Path) -> str:
    """As a user at the top of the repository would type it."""
    if isinstance(path, Path) and path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return str(path)


def main(
    work_dir: Annotated[Path, typer.Option(help="What was in it is replaced.")] = Path("work_dirs/demo"),
) -> None:
    """Runs the demo and prints its results."""
    console = Console()
    work_dir = work_dir.resolve()
    shutil.rmtree(work_dir, ignore_errors=True)
    start = time.perf_counter()
    summary: dict[str, PartSummary] = {}
    try:
        for part in parts(work_dir):
            console.rule(part.name)
            summary[part.name] = run_part(part, work_dir / part.name, Runner(console))
    except PolarError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    file = work_dir / "summary.json"
    content = {name: part.model_dump() for name, part in summary.items()}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    console.print(results_table(summary))
    for part_summary in summary.values():
        for path in (str(Path(part_summary.hf_dir).with_name("report.html")), part_summary.hf_dir):
            console.print(f"  {path}", highlight=False)
    console.print(f"  {_relative(file)}    ({time.perf_counter() - start:.0f} s in all)", highlight=False)
    if missed := shortfalls(summary):
        console.print("\n".join(missed), style="red", highlight=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
