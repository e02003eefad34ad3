"""Typical mistakes, played through the command line: what a new user sees, how much of it, and how soon.

A mistake is an entry of the table. Seconds are of processor time, so that a busy machine does not decide;
lines are those of a terminal of 80 columns.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training.runs import REPOSITORY, edit_config, make_rows, write_rows


@dataclass(frozen=True)
class Mistake:
    """A command line that cannot work.

    Attributes:
        name: What is wrong.
        command: Arguments of ``polar-ft``, in a folder with the files of `project`.
        says: Regular expression that the output has to hold; a space stands for any white space.
        status: Exit status.
        seconds: Most processor time.
        lines: Most lines on a terminal.
    """

    name: str
    command: Sequence[str]
    says: str
    status: int = 1
    seconds: float = 3.0
    lines: int = 12


TRAIN = ("train", "tiny.py", "--cfg-options")

MISTAKES = [
    # The command line.
    Mistake(
        "mistyped command", ["trian", "tiny.py"], r"No such command 'trian'. Did you mean 'train'\?", status=2
    ),
    Mistake("mistyped command of data", ["data", "chek", "rows.jsonl"], r"Did you mean 'check'\?", status=2),
    Mistake("mistyped command of eval", ["eval", "cmopare", "a", "b"], r"Did you mean 'compare'\?", status=2),
    Mistake(
        "mistyped option", ["serve", "--prot", "1", "model"], r"No such option: --prot .*--port", status=2
    ),
    Mistake(
        "a word that is no number",
        ["plan", "tiny.py", "--gpus", "two"],
        r"--gpus.*Input should be a valid integer",
        status=2,
    ),
    Mistake("argument left out", ["convert", "tiny.py"], r"Missing argument 'CHECKPOINT'", status=2),
    Mistake(
        "data left out", ["eval", "model"], r"name a model folder and held-out data: polar-ft eval HF_DIR"
    ),
    # Files and folders.
    Mistake(
        "no such config",
        ["train", "no_such.py"],
        r"no_such\.py: no such config file; .*ls configs",
    ),
    Mistake(
        "no such data",
        ["data", "check", "no_such.jsonl"],
        r"no_such\.jsonl: no such file; check the spelling",
    ),
    Mistake(
        "no such scores", ["eval", "--from-scores", "none.csv", "--out", "o"], r"none\.csv: no such file"
    ),
    Mistake(
        "no such folder", ["eval", "./model", "rows.jsonl"], r"\./model: no such folder; check the spelling"
    ),
    Mistake(
        "a file as model", ["eval", "rows.jsonl", "rows.jsonl"], r"rows\.jsonl: is a file; name the folder"
    ),
    Mistake(
        "the hub is switched off",
        ["eval", "internlm/POLAR-1_8B", "rows.jsonl"],
        r"internlm/POLAR-1_8B: is no folder here, and .* switched off \(HF_HUB_OFFLINE\); unset it",
    ),
    Mistake("calibrating no folder", ["calibrate", "none", "rows.jsonl"], r"none: is no folder here"),
    Mistake(
        "output exists", ["data", "convert", "ranked", "rows.jsonl", "rows.jsonl"], r"rows\.jsonl.*--force"
    ),
    # Data.
    Mistake("a row without chosen", ["data", "check", "bad.jsonl"], r"bad\.jsonl:2.*chosen", lines=60),
    Mistake(
        "a broken row is split", ["data", "split", "bad.jsonl", "--out-dir", "s"], r"bad\.jsonl:2.*chosen"
    ),
    Mistake(
        "one prompt cannot be split",
        ["data", "split", "one.jsonl", "--out-dir", "s"],
        r"held-out side is empty: 1 prompt is too few to hold some out; add rows",
    ),
    Mistake(
        "the training side is split again",
        ["data", "split", str(REPOSITORY / "examples/data/alpaca_train.jsonl"), "--out-dir", "s"],
        r"these 276 prompts are one side of an earlier split with seed 0; .*another --seed",
    ),
    Mistake(
        "a share above one",
        ["data", "split", "rows.jsonl", "--out-dir", "s", "--fraction", "7"],
        r"fraction 7.*: must lie between 0 and 1, for instance 0\.1",
    ),
    Mistake(
        "lengths without a tokenizer",
        ["data", "check", "rows.jsonl", "--max-length", "9"],
        r"--max-length .* count tokens; add --tokenizer FOLDER",
    ),
    Mistake("no such format", ["data", "convert", "sharegtp", "rows.jsonl", "o.jsonl"], r"sharegtp.*hh-rlhf"),
    # Settings; all before a model is loaded.
    Mistake("mistyped setting", [*TRAIN, "val_dat=x.jsonl"], r"val_dat\b.*did you mean val_data\?"),
    Mistake(
        "another mistyped setting", [*TRAIN, "val_patince=3"], r"val_patince\b.*did you mean val_patience\?"
    ),
    Mistake("a rate as text", ["train", "rate.py"], r"rate\.py: lr.* number"),
    Mistake("no epoch", [*TRAIN, "max_epochs=0"], r"max_epochs\b.*\b(0|1)\b"),
    Mistake(
        "no such ZeRO stage",
        ["train", "tiny.py", "--deepspeed", "deepspeed_zero9"],
        r"--deepspeed deepspeed_zero9: no such file, .*deepspeed_zero2",
    ),
    Mistake(
        "mistyped option of training", ["train", "tiny.py", "--work_dir", "w"], r"did you mean --work-dir\?"
    ),
    Mistake(
        "the config that POLAR published",
        ["train", "POLAR_7B_full_varlenattn_custom_dataset"],
        r"needs flash_attn \(not installed\).*`polar-ft migrate .*varlenattn_custom_dataset\.py` writes this",
    ),
    Mistake("migrating our own", ["migrate", "tiny.py"], r"tiny\.py: is a config of polar_ft already"),
    Mistake("migrating a page", ["migrate", "notes.md"], r"notes\.md: is no config, which is a Python file"),
    Mistake(
        "no such tracking service",
        [*TRAIN, "track=wanbd"],
        r"'wanbd' is no tracking service; did you mean wandb",
    ),
    Mistake("a tracking service that is not installed", [*TRAIN, "track=neptune"], r"pip install neptune"),
    Mistake("watching no folder", ["watch", "none"], r"none: no such folder; name the work folder of a run"),
    Mistake("watching no run", ["watch", "work"], r"work: has no figures of a run"),
    Mistake("Markdown as config", ["train", "notes.md"], r"notes\.md: is no config, which is a Python file"),
    Mistake("data as config", ["train", "rows.jsonl"], r"rows\.jsonl: is no config, which is a Python file"),
    Mistake("data that is not there", [*TRAIN, "data=none.jsonl"], r"data: none\.jsonl: no such file"),
    # Folders.
    Mistake(
        "evaluating a training folder",
        ["eval", "work", "rows.jsonl"],
        r"work: is the folder of a training run, .*polar-ft convert",
    ),
    # Reading.
    Mistake("a table that is called JSON", ["data", "check", "table.jsonl"], r"looks like CSV"),
    Mistake("JSON over many lines", ["data", "check", "pretty.jsonl"], r"jq"),
    Mistake(
        "a conversation of ShareGPT",
        ["data", "check", "sharegpt.jsonl"],
        r"these rows look like ShareGPT with one answer each",
    ),
    Mistake(
        "thousands of bad rows",
        ["data", "check", "many.jsonl"],
        r"many\.jsonl:20\b.* 2,980 bad rows more",
        lines=60,
    ),
    # Servers.
    Mistake(
        "open to everybody",
        ["serve", "model", "--host", "0.0.0.0", "--port", "0"],
        r"other machines could reach the server, and no API key is set; give --api-key-file FILE",
    ),
    Mistake(
        "no server there",
        ["score", "rows.jsonl", "o.jsonl", "--server", "127.0.0.1:9"],
        r"127\.0\.0\.1:9: no connection",
    ),
    Mistake(
        "no such key file",
        ["serve", "model", "--api-key-file", "none.txt"],
        r"--api-key-file none\.txt: cannot be read",
    ),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a config, and files that are wrong."""
    folder = tmp_path_factory.mktemp("mistakes")
    rows = make_rows()
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "bad.jsonl", [rows[0], {name: rows[1][name] for name in ("prompt", "rejected")}])
    write_rows(folder / "one.jsonl", [rows[0], {**rows[0], "rejected": "No idea."}])
    (folder / "notes.md").write_text("# Notes\n\nlr = 1e-5\n")
    (folder / "table.jsonl").write_text("prompt,reference,chosen,rejected\nHi,Hello,Hello,Go\n")
    (folder / "pretty.jsonl").write_text("".join(json.dumps(row, indent=2) + "\n" for row in rows[:3]))
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write_rows(folder / "sharegpt.jsonl", [{"conversations": talk}] * 3)
    write_rows(folder / "many.jsonl", [{"prompt": "Hi"}] * 3000)
    (folder / "work").mkdir()
    for name in ("tiny.py", "iter_15.pth"):
        (folder / "work" / name).write_text("")
    (folder / "work/last_checkpoint").write_text(str(folder / "work/iter_15.pth"))
    data = str(folder / "rows.jsonl")
    edit_config("polar_tiny_cpu.py", folder / "tiny.py", data=data)
    edit_config("polar_tiny_cpu.py", folder / "rate.py", data=data, lr="1e-3")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "_"))
def test_mistake(mistake: Mistake, project: Path) -> None:
    environment = os.environ | {"COLUMNS": "80", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HOME": str(project)}
    environment.pop("POLAR_API_KEY", None)
    before = _processor_seconds()
    ended = subprocess.run(
        [sys.executable, "-m", "polar_ft.cli", *mistake.command],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    seconds = _processor_seconds() - before
    output = ended.stdout
    assert ended.returncode == mistake.status, output
    assert "Traceback" not in output
    # The terminal breaks lines.
    assert re.search(mistake.says, " ".join(output.split())), output
    assert sum(max(1, -(-len(line) // 80)) for line in output.splitlines()) <= mistake.lines, output
    assert seconds <= mistake.seconds, output


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
