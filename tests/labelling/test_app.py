"""The routes of the page, and `polar-ft label` as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polar_ft.cli import app as cli
from polar_ft.errors import PolarError
from tests.labelling.conftest import ROWS, labelling, lines
from tests.serving.conftest import http

KEY = "correct-horse"
SECRET = "hunter2"


def decide(client, state, choice_made, **changes):
    body = {"labeller": state["labeller"], "number": state["number"], "pair": state["pair"]["key"]}
    return client.post("/v1/decide", json=body | {"choice": choice_made, "seconds": 2.0} | changes)


def test_a_decision_is_on_the_disk_before_the_next_pair_is_sent(open_store, folder, monkeypatch):
    synced: list[int] = []
    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(len(lines(folder / "alice.jsonl")))

    monkeypatch.setattr(os, "fsync", noting_fsync)
    with labelling(open_store()) as (_, client):
        state = client.post("/v1/next", json={"labeller": "Alice"}).json()
        assert state["labeller"] == "alice"
        for number in range(4):
            assert (state["number"], state["done"], state["total"]) == (number, number, 4)
            state = decide(client, state, "left").json()
            assert number + 1 in synced
            assert len(lines(folder / "alice.jsonl")) == number + 1
        assert state["pair"] is None
        state = client.post("/v1/undo", json={"labeller": "alice", "number": 4}).json()
        assert state["pair"]["prompt"] == [{"role": "", "content": "Question 3?"}]
        assert len(lines(folder / "alice.jsonl")) == 3


def test_nothing_tells_where_an_answer_is_from_or_that_it_was_seen(open_store):
    rows = [{"prompt": "p", "chosen": "same", "rejected": "other", "chosen_policy": "secret-model"}]
    with labelling(open_store(rows, repeat=1.0)) as (_, client):
        first = client.post("/v1/next", json={"labeller": "alice"}).json()
        again = decide(client, first, "left").json()
    assert again["pair"]["answers"] == first["pair"]["answers"][::-1]
    for state in (first, again):
        assert state.keys() == {"labeller", "number", "done", "total", "pair"}
        assert state["pair"].keys() == {"key", "prompt", "reference", "answers"}
        assert not {"secret-model", "chosen", "rejected"} & set(json.dumps(state).split('"'))


def test_messages_in_the_layouts_that_are_read_are_shown(open_store):
    turns = [
        {"from": "human", "value": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
    ]
    with labelling(open_store([{"prompt": turns, "candidates": ["a", "b"]}])) as (_, client):
        pair = client.post("/v1/next", json={"labeller": "alice"}).json()["pair"]
    assert pair["prompt"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_what_does_not_fit_is_refused_with_a_sentence(open_store, folder):
    with labelling(open_store()) as (_, client):
        state = client.post("/v1/next", json={"labeller": "alice"}).json()
        assert decide(client, state, "left").status_code == 200
        answer = decide(client, state, "left")
        assert (answer.status_code, "another window" in answer.text) == (409, True)
        for wrong in ({"choice": "both"}, {"seconds": -1}, {"seconds": "x"}, {"more": 1}):
            assert decide(client, state, "left", **wrong).status_code == 422
        assert client.post("/v1/next", json={"labeller": "../x"}).status_code == 400
        assert client.post("/v1/next", json={"labeller": "x" * 20000}).status_code == 413
        assert client.post("/v1/next", content=b'{"labeller": "alice"}').status_code == 415
        assert client.get("/v1/next").status_code == 405
        assert client.get("/nothing").status_code == 404
    assert len(lines(folder / "alice.jsonl")) == 1
    assert [file.name for file in folder.parent.iterdir()] == ["labels"]


def test_only_who_has_the_key_gets_texts(open_store):
    with labelling(open_store(), api_key=KEY) as (address, client):
        page = client.get("/")
        assert page.status_code == 401
        assert "Which answer is better?" in page.text
        assert "Question" not in page.text
        body = {"labeller": "alice"}
        assert client.post("/v1/next", json=body).status_code == 401
        assert client.get("/health").status_code == 200
        with http(address, headers={"Authorization": f"Bearer {KEY}"}) as knowing:
            assert knowing.post("/v1/next", json=body).json()["pair"] is not None


def test_without_a_key_only_requests_to_this_machine_are_answered(open_store):
    with labelling(open_store(), loopback_only=True) as (_, client):
        for host, status in (("127.0.0.1:1", 200), ("localhost", 200), ("labels.example.org", 421)):
            answer = client.post("/v1/next", json={"labeller": "a"}, headers={"Host": host})
            assert answer.status_code == status
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "http" not in page.text  # nothing is loaded from elsewhere


@contextmanager
def label_process(*arguments: object, **environment: str):
    """The address and the process; its stderr is a pipe."""
    process = subprocess.Popen(
        [sys.executable, "-m", "polar_ft.cli", "label", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        assert process.stdout is not None
        said = []
        while " at http://" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
            said.append(line.strip())
        yield line.split(" at ")[1].split(",")[0], process, said
    finally:
        process.kill()
        process.communicate()


def test_the_command_killed_and_started_again(tmp_path: Path):
    data, out = tmp_path / "in.jsonl", tmp_path / "labels"
    rows = [{**row, "prompt": f"{SECRET} {row['prompt']}"} for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "p", "candidates": ["a"]}]))
    arguments = (data, "--out", out, "--repeat", 0)
    with label_process(*arguments) as (address, process, said):
        assert said == ["4 pairs from 4 rows, 1 row left out, in the order of the rows"]
        with http(address) as client:
            state = client.post("/v1/next", json={"labeller": "alice"}).json()
            for _ in range(2):
                state = decide(client, state, "tie").json()
        other = CliRunner().invoke(cli, ["label", *map(str, arguments), "--port", "0"])
        assert "another polar-ft label writes to this folder" in str(other.exception)
        process.send_signal(signal.SIGKILL)
        _, log = process.communicate(timeout=30)
    assert "in.jsonl:5: has 1 different answers" in log
    assert SECRET not in log
    assert '"route": "/v1/decide", "status": 200' in log
    with label_process(*arguments) as (address, process, said):
        assert said[1:] == ["alice continues after 2 of 4"]
        with http(address) as client:
            assert client.post("/v1/next", json={"labeller": "alice"}).json() == state
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130


def test_the_page_needs_no_torch():
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "xtuner", "scipy")))  # importing them fails
import polar_ft.labelling.app, polar_ft.labelling.commands
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_machines_need_a_key(tmp_path: Path):
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n")
    result = CliRunner().invoke(cli, ["label", str(data), "--host", "0.0.0.0", "--port", "0"])
    assert isinstance(result.exception, PolarError)
    assert "--api-key-file" in str(result.exception)
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ('{"prompt": "p"}\n', "has no row with two different answers")],
)
def test_nothing_to_label(tmp_path: Path, content, message):
    data = tmp_path / "in.jsonl"
    if content is not None:
        data.write_text(content)
    result = CliRunner().invoke(cli, ["label", str(data), "--out", str(tmp_path / "out"), "--port", "0"])
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_model_or_a_server_brings_the_least_certain_pairs_first(tmp_path: Path):
    """The order is that of the differences of the scorer's rewards, whichever way it was asked."""
    from polar_ft.labelling.pairs import model_scorer, ordered_pairs, parse_task, server_scorer
    from polar_ft.scoring.scorer import RewardScorer
    from polar_ft.serving.app import create_app
    from tests.serving.tiny import running, write_tiny_reward_model

    folder = write_tiny_reward_model(tmp_path)
    texts = ["Beijing.", "It is Shanghai, I think.", "No!"]
    rows = [
        {"prompt": f"Which city {n}?", "reference": "Beijing.", "candidates": texts[n % 2 :]}
        for n in range(4)
    ]
    tasks = [parse_task(row, "in.jsonl:1") for row in rows]
    scorer = RewardScorer.from_pretrained(folder)
    expected = {}
    for row in rows:
        inputs = [{**row, "output": text} for text in row["candidates"]]
        scores = scorer.score([{k: one[k] for k in ("prompt", "reference", "output")} for one in inputs])
        for a, text in enumerate(row["candidates"]):
            for b in range(a):
                names = (row["prompt"], *sorted((text, row["candidates"][b])))
                expected[names] = abs(scores[a] - scores[b])
    order = sorted(expected, key=expected.__getitem__)

    def shown(score):
        return [
            (pair.prompt, *(answer.text for answer in pair.answers))
            for pair in ordered_pairs(tasks, most=3, score=score)
        ]

    assert shown(model_scorer(str(folder), device="cpu")) == order
    with running(create_app(scorer, name="tiny")) as address:
        assert shown(server_scorer(address, None)) == order
