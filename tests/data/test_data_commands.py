"""The commands as a user types them: what they print, where, and how they exit."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from polar_ft.data.commands import data_app
from tests.data.converters.published import published, rmb_pairs
from tests.data.rows import WriteRows, pair, ranked

RMB_ROWS = rmb_pairs([("a", "c"), ("b", "c")], {"a": 3.0, "b": 2.0, "c": 1.0})


def polar_ft(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", "from polar_ft.cli import main; main()", "data", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


def test_check_of_good_rows(write_rows: WriteRows, tokenizer_folder: Path) -> None:
    path = write_rows("good.jsonl", [pair(subset="maths [hard]"), ranked(3, 2, 1, 1)])
    done = polar_ft("check", path, "--tokenizer", tokenizer_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{path}: 2 rows, 2 pairs, 2 prompts" in done.stdout
    assert "lengths in tokens (limits: 16,384 in all, 4,096 a response; BOS counted)" in done.stdout
    assert "maths [hard]" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) <= 100


def test_check_names_twenty_bad_rows_and_fails(write_rows: WriteRows) -> None:
    path = write_rows("bad.jsonl", [pair(), *[pair(chosen=[{"role": 1, "content": ""}])] * 30])
    done = polar_ft("check", path)
    assert done.returncode == 1
    for line in range(2, 22):
        assert f"bad row {path}:{line}: chosen[0].role: is the number 1 — must be a string" in done.stdout
    assert "bad.jsonl:22:" not in done.stdout
    assert "… and 10 bad rows more (--json lists them all)" in done.stdout
    assert "1 row, 1 pair, 1 prompt, 30 bad rows" in done.stdout
    assert "Traceback" not in done.stderr


def test_check_as_json_is_nothing_but_json(write_rows: WriteRows) -> None:
    path = write_rows("bad.jsonl", [pair(), pair(weight=0)])
    done = polar_ft("check", path, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert (report["rows"], report["bad_rows"], report["unit"]) == (1, 1, "characters")
    assert report["problems"][0] == {
        "file": str(path),
        "line": 2,
        "field": "weight",
        "reason": "is the number 0 — must be greater than 0",
    }


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (published("rm-bench"), "look like the format rm-bench; polar-ft data convert rm-bench in.jsonl OUT"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "polar-ft data convert chat-pairs in.jsonl OUT"),
        (
            {"question": "p", "better": "a", "worse": "b"},
            "--map prompt=question,chosen=better,rejected=worse",
        ),
        ({"instruction": "p", "input": "", "output": "a"}, "Alpaca's instructions with one answer each"),
        ({"conversations": [{"from": "human", "value": "p"}]}, "ShareGPT with one answer each"),
        ({"prompt": "p", "reference": "", "chosen": 3, "rejected": "b"}, ""),
    ],
)
def test_check_names_what_reads_another_layout(
    row: Mapping[str, Any], says: str, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows("in.jsonl", [row] * 3)
    done = CliRunner().invoke(data_app, ["check", "in.jsonl"])
    assert done.exit_code == 1
    assert says in done.stdout
    assert ("warning" in done.stdout) == bool(says)


def test_check_writes_the_good_rows(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [pair(id=n, prompt=f"{n}") for n in range(5)]
    path = write_rows("in.jsonl", [*rows, rows[0], pair(chosen=3), pair(prompt="again")])
    held_out = write_rows("held_out.jsonl", [rows[1]])
    done = polar_ft("check", path, "--held-out", held_out)
    assert done.returncode == 1
    assert f"prompt is held out: {path}:2\n" in done.stdout
    assert f"duplicates: {path}:6 (as {path}:1)\n" in done.stdout
    fixed = tmp_path / "fixed.jsonl"
    done = polar_ft("check", path, "--held-out", held_out, "--fix", fixed)
    assert (done.returncode, done.stderr) == (0, f"{fixed}: 5 good rows, 3 left out\n")
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == [
        rows[0],
        *rows[2:],
        pair(prompt="again"),
    ]


def test_convert_then_split_then_preview(
    write_rows: WriteRows, tmp_path: Path, tokenizer_folder: Path
) -> None:
    start = "\n\nHuman: Question"
    good = [
        {"chosen": f"{start} {i}\n\nAssistant: a", "rejected": f"{start} {i}\n\nAssistant: b"}
        for i in range(60)
    ]
    source = write_rows("hh.jsonl", [*good, {"chosen": "?", "rejected": "?"}])
    target = tmp_path / "pairs.jsonl"

    done = polar_ft("convert", "hh-rlhf", source, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bad row {source}:61: chosen: does not begin with" in done.stdout
    assert "60 pairs from 61 rows" in done.stdout
    again = polar_ft("convert", "hh-rlhf", source, target)
    assert again.returncode == 1
    assert "exists already; choose another name, or --force" in again.stderr
    assert polar_ft("convert", "hh-rlhf", source, target, "--force").returncode == 0
    assert polar_ft("convert", "hh-rlhf", source, target, "--force", "--strict").returncode == 1

    done = polar_ft("split", target, "--out-dir", tmp_path / "sides", "--fraction", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {
        name: (tmp_path / "sides" / f"{name}.jsonl").read_text().splitlines()
        for name in ("train", "held_out")
    }
    assert sum(map(len, lines.values())) == 60
    assert "exists already" in polar_ft("split", target, "--out-dir", tmp_path / "sides").stderr

    done = polar_ft("preview", target, "--tokenizer", tokenizer_folder, "--index", 59)
    assert (done.returncode, done.stderr) == (0, "")
    assert "⟦<|reward|>⟧" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) <= 100


def test_a_file_that_was_cut_off_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    content = gzip.compress(json.dumps([pair(id=f"{random.random()}") for _ in range(2000)]).encode())
    (tmp_path / "data" / "rows.json.gz").write_bytes(content[: len(content) * 2 // 3])
    target = tmp_path / "out.jsonl"
    target.write_text("earlier\n")

    done = polar_ft("convert", "ranked", "data", target, "--force", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 file cannot be used:" in done.stderr
    assert "data/rows.json.gz:13" in done.stderr
    assert "nothing was written; 1,3" in done.stderr
    assert target.read_text() == "earlier\n"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out.jsonl"}

    done = polar_ft("convert", "ranked", "data", target, "--force", "--keep-readable", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    count = len(target.read_text().splitlines())
    assert 1300 < count < 1340
    assert f"{count:,} pairs from {count:,} rows" in done.stdout
    assert "1 file could not be read to the end (named above)" in done.stdout


def test_convert_says_what_it_left_out(write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows("rmb.jsonl", [*rmb_pairs([("a", "b")], {"a": 2.0, "b": 1.0}, "One?"), *RMB_ROWS])
    done = polar_ft("convert", "rmb", source, tmp_path / "out.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{tmp_path}/out.jsonl: 1 pair from 3 rows of 2 prompts",
        "left out 2 pairs with the answer that became the reference",
        "left out 1 prompt of which no pair was left",
    ]
    source = write_rows("bench.jsonl", [published("rm-bench")])
    done = polar_ft("convert", "rm-bench", source, tmp_path / "ranked.jsonl")
    assert done.stdout == f"{tmp_path}/ranked.jsonl: 1 ranked row from 1 row\nto be read with --pairing all\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "missing.jsonl"], "missing.jsonl: no such file; check the spelling of the path"),
        (["check", "in.jsonl", "--max-length", 9], "count tokens; add --tokenizer FOLDER"),
        (["check", "in.jsonl", "--tokenizer", "no/such/folder"], "no such folder"),
        (["check", "in.jsonl", "--max-line-mb", 0], "max_line_mb"),
        (
            ["convert", "xml", "in.jsonl", "out.jsonl"],
            "xml: no such format; there are auto, arena, argilla, chat-pairs, ",
        ),
        (["convert", "ranked", "in.jsonl", "out.csv"], "the name must end in .jsonl or .jsonl.gz"),
        (["convert", "hh-rlhf", "in.jsonl", "out.jsonl", "--pairing", "all"], "is no option of the format"),
        (["convert", "ranked", "in.jsonl", "in.jsonl/out.jsonl"], "cannot be written"),
        (["split", "in.jsonl", "--out-dir", "out", "--fraction", 2], "must lie between 0 and 1"),
        (["preview", "in.jsonl", "--tokenizer", "TOKENIZER", "--index", 5], "its 1 rows are 0 to 0"),
        (["preview", "in.jsonl", "--tokenizer", "TOKENIZER", "--separator", "<sep>"], "has no token '<sep>'"),
    ],
)
def test_errors_are_one_message_and_status_1(
    write_rows: WriteRows, tmp_path: Path, tokenizer_folder: Path, arguments: list[object], message: str
) -> None:
    write_rows("in.jsonl", [pair()])
    done = polar_ft(*(tokenizer_folder if a == "TOKENIZER" else a for a in arguments), cwd=tmp_path)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_table_of_ones_own_is_recognised_mapped_and_exported(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("question;better;worse;note [x]\n2 + 2?;4;5;a\n2 + 3?;;6;b\n")
    done = polar_ft("convert", "auto", "own.csv", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "--map prompt=question,chosen=better,rejected=worse" in " ".join(done.stderr.split())

    names = ["--map", "prompt=question", "--map", "chosen=better,rejected=worse"]
    done = polar_ft("convert", "auto", "own.csv", "out.jsonl", *names, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "own.csv: chat-pairs (doubtful): it reads 1 of the 2 rows looked at" in done.stdout
    assert "it keeps note [x] as they are" in done.stdout
    assert "bad row own.csv:3: better: is missing, but --map chosen=better names it" in done.stdout
    assert "out.jsonl: 1 pair from 2 rows" in done.stdout

    done = polar_ft("export", "llama-factory", "out.jsonl", "--out", "dpo.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dpo.jsonl: 1 pair from 1 row" in done.stdout
    assert "1 pair had other fields: not written" in done.stdout
    assert '"dpo": {"file_name": "dpo.jsonl", "formatting": "sharegpt", "ranking": true' in done.stdout
