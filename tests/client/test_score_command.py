"""`polar-ft score`: every row once, in order; the output is complete or missing; killed runs resume."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.client.bulk import scoring
from polar_ft.client.bulk.journal import open_journal
from polar_ft.client.bulk.rows import parse_row_to_score
from polar_ft.client.bulk.scoring import score_data_set
from polar_ft.data.reading import DataSource
from polar_ft.data.records import RowError
from polar_ft.errors import DataError, PolarError
from polar_ft.template import PolarTemplate
from tests.client.fake_server import Answer, FakeServer, reward_of
from tests.encoding import encode, ids_of


def make_rows(n: int) -> list[dict[str, Any]]:
    """Rows of all forms, with fields that are none of our business."""
    forms = [
        {"output": "one"},
        {"candidates": ["one", "two", "三"]},
        {"chosen": "one", "rejected": "two"},
        {
            "responses": [
                {"content": "a", "rank": 2},
                {"content": "b", "rank": 1},
                {"content": "c", "rank": 3},
            ]
        },
    ]
    rows = []
    for i in range(n):
        row = {"prompt": f"Prompt {i}", **forms[i % 4], "id": i, "note": {"kept": [i]}}
        rows.append(row if "responses" in row else {**row, "reference": f"Reference {i}"})
    return rows


def expected_row(template: PolarTemplate, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its rewards, worked out apart from the code under test."""

    def rewards(reference: str, candidates: list[str]) -> list[float]:
        return [reward_of(ids) for ids in ids_of(encode(template, row["prompt"], reference, candidates))]

    if "output" in row:
        return {**row, "reward": rewards(row["reference"], [row["output"]])[0]}
    if "candidates" in row:
        return {**row, "rewards": rewards(row["reference"], row["candidates"])}
    if "chosen" in row:
        return {**row, "rewards": rewards(row["reference"], [row["chosen"], row["rejected"]])}
    # "b" has rank 1 and becomes the reference.
    first, third = rewards("b", ["a", "c"])
    return {**row, "rewards": [first, None, third]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BATCH_ROWS", 5)


@pytest.fixture
def score(connect: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Scores a file with servers."""

    def run(data: Path, *servers: FakeServer, out: str = "out.jsonl", **settings: Any) -> scoring.Result:
        client = connect(*servers, tokens_per_request=400, concurrency=2)
        return score_data_set(
            client, DataSource(path=str(data)), tmp_path / out, batches_under_way=4, **settings
        )

    return run


def test_all_forms_in_order(score, serve, template, tmp_path):
    rows = make_rows(83)
    result = score(write(tmp_path / "in.jsonl", rows), serve("sglang"), serve("vllm"))
    assert read(tmp_path / "out.jsonl") == [expected_row(template, row) for row in rows]
    assert (result.n_rows, result.n_resumed, result.n_cut) == (83, 0, 0)
    # Nothing else is left behind.
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_gzip_both_ways(score, serve, template, tmp_path):
    rows = make_rows(7)
    data = tmp_path / "in.jsonl.gz"
    data.write_bytes(gzip.compress(write(tmp_path / "in.jsonl", rows).read_bytes()))
    score(data, serve("lmdeploy"), out="out.jsonl.gz")
    lines = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).decode().splitlines()
    assert [json.loads(line) for line in lines] == [expected_row(template, row) for row in rows]


def test_bad_rows_are_named_before_anything_is_scored(score, serve, tmp_path):
    rows = make_rows(6)
    rows[2] = {"prompt": "p", "reference": "r", "candidates": ["a", 7]}
    rows[4] = {"prompt": "p"}
    server = serve()
    with pytest.raises(DataError) as caught:
        score(write(tmp_path / "in.jsonl", rows), server)
    assert "in.jsonl:3: candidates[1]" in str(caught.value)
    assert "in.jsonl:5: has nothing to score" in str(caught.value)
    assert server.bodies == []
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "p", "reference": "r", "candidates": []}, "candidates"),
        ({"prompt": "p", "reference": "r", "candidates": "abc"}, "candidates"),
        ({"prompt": "p", "output": "o"}, "reference"),
        ({"prompt": "p", "reference": "r", "output": [{"content": "c"}]}, "output[0].role"),
        ({"prompt": "p", "reference": "r", "output": "o", "reward": 1}, "reward"),
        ({"prompt": "p", "reference": "r", "chosen": "c", "rejected": "d", "rewards": []}, "rewards"),
        ({"prompt": "p", "references": ["r", "s"], "chosen": "c", "rejected": "d"}, "references"),
    ],
)
def test_wrong_rows(row, field):
    with pytest.raises(RowError) as caught:
        parse_row_to_score(row)
    assert caught.value.field == field


def test_failed_run_resumes(score, serve, template, tmp_path):
    """What was answered is not asked again; what was under way is."""
    rows = make_rows(60)
    data = write(tmp_path / "in.jsonl", rows)
    broken = serve("sglang", lambda number, rewards: Answer(500) if number == 9 else None)
    with pytest.raises(PolarError, match=r"HTTP 500(.|\n)*rows are scored and kept; the same command"):
        score(data, broken)
    assert not (tmp_path / "out.jsonl").exists()

    well = serve("sglang")
    result = score(data, well)
    assert result.n_resumed > 0
    assert read(tmp_path / "out.jsonl") == [expected_row(template, row) for row in rows]
    # 60 rows have 15 * (1 + 3 + 2 + 2) candidates, no two of them the same.
    n_resumed = sum(len(parse_row_to_score(row).group.candidates) for row in rows) - len(well.scored)
    assert n_resumed > 0
    assert len({tuple(ids) for ids in well.scored}) == len(well.scored)


def test_journal_cut_off_in_a_line(score, serve, template, tmp_path):
    rows = make_rows(40)
    data = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(PolarError):
        score(data, serve("sglang", lambda number, rewards: Answer(500) if number == 7 else None))
    journal = tmp_path / ".out.jsonl.journal"
    journal.write_bytes(journal.read_bytes()[:-9])
    score(data, serve("sglang"))
    assert read(tmp_path / "out.jsonl") == [expected_row(template, row) for row in rows]


def test_other_data_is_another_run(score, serve, template, tmp_path):
    data = write(tmp_path / "in.jsonl", make_rows(40))
    with pytest.raises(PolarError):
        score(data, serve("sglang", lambda number, rewards: Answer(500) if number == 7 else None))
    rows = make_rows(41)[1:]
    write(data, rows)
    with pytest.raises(PolarError, match="is of a run with another data; give --restart"):
        score(data, serve("sglang"))
    score(data, serve("sglang"), restart=True)
    assert read(tmp_path / "out.jsonl") == [expected_row(template, row) for row in rows]


def test_another_model_is_another_run(score, serve, tmp_path):
    data = write(tmp_path / "in.jsonl", make_rows(40))
    with pytest.raises(PolarError):
        score(data, serve("sglang", lambda number, rewards: Answer(500) if number == 7 else None))
    with pytest.raises(PolarError, match="is of a run with another model"):
        score(data, serve("sglang", reward=lambda ids: reward_of(ids) - 2))


def test_two_runs_at_once_are_refused(tmp_path):
    with open_journal(tmp_path / "j", {}, restart=False):
        second = open_journal(tmp_path / "j", {}, restart=False)
        with pytest.raises(PolarError, match="another run is writing it"):
            second.__enter__()


def test_data_that_changes_meanwhile(score, serve, tmp_path):
    data = write(tmp_path / "in.jsonl", make_rows(30))

    def change(number: int, rewards: list[float]) -> None:
        if number == 0:
            text = data.read_text(encoding="utf-8").replace("Prompt 29", "Prompt xx")
            data.write_text(text, encoding="utf-8")

    with pytest.raises(PolarError, match="the data changed during the run"):
        score(data, serve("sglang", change))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_that_becomes_bad_is_named_and_so_is_the_change(score, serve, tmp_path):
    data = write(tmp_path / "in.jsonl", make_rows(30))

    def change(phase: str, done: int, total: int | None) -> None:
        if phase == "scoring":
            data.write_text(data.read_text(encoding="utf-8").replace('"candidates"', '"candidate"'))

    with pytest.raises(PolarError, match=r"in\.jsonl:2: has nothing to score.*; the data changed during"):
        score(data, serve("sglang"), show=change)
    assert not (tmp_path / "out.jsonl").exists()


def test_checking_ends_after_many_bad_lines(score, serve, tmp_path, monkeypatch):
    """Also where the lines are not JSON at all."""
    monkeypatch.setattr(scoring, "MOST_PROBLEMS", 3)
    data = tmp_path / "in.jsonl"
    data.write_text("not JSON\n" * 10)
    with pytest.raises(DataError) as caught:
        score(data, serve())
    assert len(caught.value.problems) == 3


def test_row_that_does_not_fit_is_named(connect, serve, tmp_path):
    rows = [{"prompt": "p", "reference": "r" * n, "output": "o"} for n in (1, 99)]
    client = connect(serve(), max_length=132, max_response_length=64)
    data = DataSource(path=str(write(tmp_path / "in.jsonl", rows)))
    with pytest.raises(PolarError, match=r"in.jsonl:2: a reference of 64 tokens"):
        score_data_set(client, data, tmp_path / "out.jsonl", batches_under_way=4)


def test_rows_ahead_are_bounded(score, serve, tmp_path, monkeypatch):
    """However many rows there are, few are read ahead of those that are scored."""
    server = serve("sglang", lambda number, rewards: time.sleep(0.002))
    n_parsed = 0
    furthest = 0

    def counting(row: dict[str, Any]) -> Any:
        nonlocal n_parsed, furthest
        n_parsed += 1
        # The first pass, which checks, has read all 800 of them.
        furthest = max(furthest, n_parsed - 800 - n_scored())
        return parse_row_to_score(row)

    def n_scored() -> int:
        with server.lock:
            return len(server.scored)

    monkeypatch.setattr(scoring, "parse_row_to_score", counting)
    rows = [{"prompt": f"p{i}", "reference": "r", "output": "o"} for i in range(800)]

    class StopError(Exception):
        pass

    def show(phase: str, done: int, total: int | None) -> None:
        if phase == "writing":
            raise StopError

    with pytest.raises(StopError):
        score(write(tmp_path / "in.jsonl", rows), server, show=show)
    # 4 batches of 5 rows are under way, the fifth is being filled.
    assert 0 < furthest <= 5 * 5 + 1


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "polar_ft.cli", "score", *map(str, arguments)]


def test_command(serve, template, tokenizer_dir, tmp_path):
    rows = make_rows(21)
    data = write(tmp_path / "in.jsonl", rows)
    servers = [serve("vllm", card={"root": str(tokenizer_dir)}), serve("vllm")]
    arguments = [data, tmp_path / "out.jsonl", "--server", servers[0].address, "--server", servers[1].address]
    ended = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "wrote 21 rows" in ended.stdout
    assert "vLLM 0.32.0" in ended.stderr
    assert read(tmp_path / "out.jsonl") == [expected_row(template, row) for row in rows]

    again = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    for server in servers:
        server.stop()
    down = subprocess.run(command(*arguments, "--force"), capture_output=True, text=True, check=False)
    assert down.returncode == 1
    assert servers[0].address in down.stderr
    assert "Traceback" not in down.stderr


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["score", *map(str, arguments)])
    assert isinstance(result.exception, PolarError)
    return str(result.exception)


def test_an_output_that_cannot_be_written_is_found_before_a_server_is_asked(serve, tokenizer_dir, tmp_path):
    server = serve()
    data = write(tmp_path / "in.jsonl", make_rows(2))
    out = tmp_path / "in.jsonl" / "new" / "out.jsonl"
    message = refused(data, out, "--server", server.address, "--model", tokenizer_dir)
    assert message.startswith(f"{out}: cannot be written")
    assert "name another output" in message
    assert server.connections == []


def test_a_wrong_key_names_the_option(serve, tokenizer_dir, tmp_path):
    data = write(tmp_path / "in.jsonl", make_rows(2))
    key = tmp_path / "key"
    key.write_text("old")
    server = serve("sglang", key="new")
    message = refused(
        data,
        tmp_path / "out.jsonl",
        "--server",
        server.address,
        "--model",
        tokenizer_dir,
        "--api-key-file",
        key,
    )
    assert "HTTP 401" in message
    assert "check the key: --api-key-file FILE" in message


def test_killed_command_resumes(serve, template, tokenizer_dir, tmp_path):
    """SIGKILL in the middle; every input that was answered and noted is asked once, over both runs."""
    rows = [{"prompt": f"p{i}", "reference": "r", "output": "o" * 400} for i in range(900)]
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    gate = threading.Event()
    server = serve("sglang", lambda number, rewards: gate.wait(10) and None if number >= 12 else None)
    arguments = command(data, out, "--server", server.address, "--model", tokenizer_dir)
    arguments += ["--tokens-per-request", "10000", "--concurrency", "2"]
    journal = tmp_path / ".out.jsonl.journal"
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            journal.exists() and journal.read_bytes().count(b"\n") > 1
        ):
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGKILL)
    assert not out.exists()
    kept = sum(len(json.loads(line)["rewards"]) for line in journal.read_bytes().splitlines()[1:])
    gate.set()
    while server.at_once:  # requests of the killed process
        time.sleep(0.02)
    before = len(server.scored)
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{kept:,} rows had been scored by an earlier run" in ended.stderr
    assert kept > 0
    assert len(server.scored) - before == 900 - kept
    assert read(out) == [expected_row(template, row) for row in rows]
