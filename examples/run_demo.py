"""Runs the main workflow from end to end with the commands that a user types; run by `make demo`.

Two parts, each: data → polar-ft data check → xtuner train → tools/pth_to_hf.py → tools/eval_preference.py.

- ``domain_rm``: a catalogue in which only the reference determines which answer is right
    (examples/domain_rm).
- ``alpaca``: ranked answers of real models (examples/data).

Writes ``work_dirs/demo/summary.json``; ends with status 1 if a command fails or the domain is not learned.

    python examples/run_demo.py [--work-dir work_dirs/demo]
"""

from __future__ import annotations

import json
import os
import re
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
CONFIG = ROOT / "configs" / "polar_tiny_cpu.py"

# What the domain part has to reach; for the slice of real answers nothing is required.
MIN_DOMAIN_ACCURACY = 0.95
MAX_DOMAIN_ACCURACY_SHUFFLED = 0.60
MAX_SCORE_DIFF = 1e-4


@dataclass(frozen=True)
class Part:
    """One part of the demo.

    Attributes:
        name: Name of its folder and key in the summary.
        train: Training data.
        held_out: Held-out data; shares no prompt with ``train``.
        base: Arguments of examples/tiny_base.py.
        settings: Lines at the top of the config that this part edits.
        make_data: Command that makes the data first, if any.
    """

    name: str
    train: Path
    held_out: Path
    base: Sequence[str]
    settings: Mapping[str, object]
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
        train_seconds: Wall-clock time of the `xtuner train` command.
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
    """Runs commands in the root of the repository, each with its own log.

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

    def __call__(self, command: Sequence[str | Path], log: Path) -> tuple[str, float]:
        """Runs a command and shows the last line of its log meanwhile.

        Returns:
            What it printed on stdout and stderr, and its seconds.

        Raises:
            PolarError: It failed; the message holds the end of its log.
        """
        words = [_relative(word) for word in command]
        shown = shlex.join(words)
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with log.open("wb") as output, self.console.status(escape(shown)) as status:
            try:
                process = subprocess.Popen(
                    words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=self.environment
                )
            except FileNotFoundError as error:
                raise PolarError(f"{words[0]}: no such command; run `make install` first") from error
            while process.poll() is None:
                time.sleep(0.2)
                status.update(f"{escape(shown)}\n  [dim]{escape(_last_line(log))}")
        seconds = time.perf_counter() - start
        text = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode != 0:
            tail = "\n".join(text.splitlines()[-30:])
            raise PolarError(
                f"{shown}\n{tail}\nfailed with status {process.returncode}; the complete log: {log}"
            )
        self.console.print(
            f"[green]✓[/] [dim]{seconds:5.1f} s[/]  {escape(shown)}", highlight=False, soft_wrap=True
        )
        return text, seconds


def parts(work_dir: Path) -> list[Part]:
    """The two parts, with the settings in which their configs differ."""
    domain, slice_dir = work_dir / "domain_rm" / "data", ROOT / "examples" / "data"
    return [
        Part(
            name="domain_rm",
            make_data=["examples/domain_rm/make_data.py", domain],
            train=domain / "train.jsonl",
            held_out=domain / "held_out.jsonl",
            base=["--vocab-size", "768", "--hidden", "96", "--heads", "8"],
            settings={"lr": 3e-3, "max_epochs": 8, "global_batch_pairs": 64},
        ),
        Part(
            name="alpaca",
            train=slice_dir / "alpaca_train.jsonl",
            held_out=slice_dir / "alpaca_held_out.jsonl",
            base=["--vocab-size", "4096", "--hidden", "96"],
            settings={"max_epochs": 2},
        ),
    ]


def run_part(part: Part, work_dir: Path, run: Runner) -> PartSummary:
    """Runs all commands of a part.

    Args:
        part: The part.
        work_dir: Folder of the part, which is created.
        run: Runs a command.

    Raises:
        PolarError: A command failed.
    """
    python = "python"
    base, train_dir, hf_dir, eval_dir = (work_dir / name for name in ("base", "train", "hf", "eval"))
    logs = work_dir / "logs"
    if part.make_data:
        run([python, *part.make_data], logs / "data.log")
    run([python, "examples/tiny_base.py", base, part.train, *part.base], logs / "base.log")
    check: list[str | Path] = ["polar-ft", "data", "check", part.train, part.held_out, "--tokenizer", base]
    run(check, logs / "check.log")

    config = work_dir / "config.py"
    paths = {"pretrained_model_name_or_path": str(base), "data": str(part.train)}
    config.write_text(edit_config(CONFIG.read_text(encoding="utf-8"), {**paths, **part.settings}), "utf-8")
    _, seconds = run(["xtuner", "train", config, "--work-dir", train_dir], logs / "train.log")
    checkpoint = last_checkpoint(train_dir, logs / "train.log")

    run([python, "tools/pth_to_hf.py", config, checkpoint, hf_dir], logs / "convert.log")
    evaluate: list[str | Path] = [
        python,
        "tools/eval_preference.py",
        hf_dir,
        part.held_out,
        "--out",
        eval_dir,
    ]
    run([*evaluate, "--shuffle-references", "0"], logs / "eval.log")
    compared, _ = run(
        [python, "examples/check_export.py", config, checkpoint, hf_dir, part.held_out],
        logs / "check_export.log",
    )
    metrics = json.loads((eval_dir / "metrics.json").read_text(encoding="utf-8"))
    return summarize(metrics, json.loads(compared.splitlines()[-1]), seconds, work_dir)


def edit_config(text: str, settings: Mapping[str, object]) -> str:
    """Sets top-level names of a config, as a user edits the lines at its top.

    Raises:
        PolarError: The config has no such line.

    >>> edit_config("lr = 1e-5  # low\\nmax_epochs = 1\\n", {"lr": 0.003})
    'lr = 0.003\\nmax_epochs = 1\\n'
    """
    for name, value in settings.items():
        lines = re.split(rf"^{name} = .*$", text, flags=re.MULTILINE)
        if len(lines) != 2:
            raise PolarError(f"{CONFIG}: has {len(lines) - 1} lines `{name} = …`; one was expected")
        text = f"{name} = {value!r}".join(lines)
    return text


def last_checkpoint(train_dir: Path, log: Path) -> Path:
    """The last checkpoint of a run.

    Raises:
        PolarError: There is none; the command of xtuner 0.2.0 exits with 0 even if training failed.
    """
    pointer = train_dir / "last_checkpoint"
    if not pointer.is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise PolarError(f"{tail}\n`xtuner train` saved no checkpoint; the complete log: {log}")
    return Path(pointer.read_text(encoding="utf-8").strip())


def summarize(metrics: Mapping, compared: Mapping, train_seconds: float, work_dir: Path) -> PartSummary:
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
        hf_dir=_relative(work_dir / "hf"),
        max_abs_score_diff_export=compared["max_abs_score_diff_export"],
        eval_dir=_relative(work_dir / "eval"),
        train_dir=_relative(work_dir / "train"),
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


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-2000:].decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:110] for line in reversed(lines) if line.strip()), "")


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
        for path in (part_summary.hf_dir, part_summary.eval_dir, part_summary.train_dir):
            console.print(f"  {path}", highlight=False)
    console.print(f"  {_relative(file)}    ({time.perf_counter() - start:.0f} s in all)", highlight=False)
    if missed := shortfalls(summary):
        console.print("\n".join(missed), style="red", highlight=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
