"""`polar-ft serve` as a process of its own, and what it refuses before it loads anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.errors import PolarError
from polar_ft.scoring.scorer import RewardScorer
from tests.serving.conftest import http

KEY = "correct-horse"
SECRET = "hunter2"


@contextmanager
def serving(
    *arguments: object, files: int | None = None, **environment: str
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address and the process, which may open so many files; its stderr is a pipe."""
    command = [sys.executable, "-m", "polar_ft.cli", "serve", *map(str, arguments), "--port", "0"]
    if files is not None:
        command = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *command]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, process.communicate()[1]
        yield line.split(" at ")[1].split()[0], process
    finally:
        process.kill()
        process.communicate()


def test_what_was_taken_is_answered_before_it_ends(model_folder: Path, scorer: RewardScorer):
    """A request of a few seconds is in the queue when SIGTERM comes."""
    inputs = [
        {
            "prompt": f"{SECRET} {number}",
            "reference": "Beijing. " * 8,
            "candidates": ["no " * 12, "z" * 40] * 8,
        }
        for number in range(60)
    ]
    with serving(model_folder, POLAR_API_KEY=KEY) as (address, process):
        headers = {"Authorization": f"Bearer {KEY}"}
        with http(address, headers=headers) as client, ThreadPoolExecutor(1) as pool:
            assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
            answer = pool.submit(client.post, "/v1/rewards", json={"inputs": inputs})
            while "polar_ft_queue_tokens 0.0" in client.get("/metrics").text:
                assert not answer.done()
            process.send_signal(signal.SIGTERM)
            response = answer.result(60)
        _, log = process.communicate(timeout=60)
    assert response.status_code == 200
    rewards = response.json()["rewards"]
    assert [len(group) for group in rewards] == [16] * 60
    first = [{"prompt": f"{SECRET} 0", "reference": "Beijing. " * 8, "output": "no " * 12}]
    assert rewards[0][0] == pytest.approx(scorer.score(first)[0], abs=2e-5)
    assert process.returncode == 0

    lines = [json.loads(line) for line in log.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert {"route", "status", "ms", "id"} <= requests[0].keys()
    (scored,) = (line for line in requests if line["route"] == "/v1/rewards")
    assert (scored["status"], scored["candidates"]) == (200, 960)
    assert SECRET not in log
    assert KEY not in log


def test_more_connections_than_files_and_the_end_at_ctrl_c(model_folder: Path):
    """With 120 files, of which the process itself needs some, 150 clients connect and say nothing."""
    with serving(model_folder, files=120) as (address, process), ExitStack() as stack:
        place = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
        for _ in range(150):
            stack.enter_context(socket.create_connection(place, 5))
        for _ in range(3):
            with http(address) as client:
                assert client.get("/health").status_code == 200
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert len(log) < 20_000
    assert "socket.accept" not in log


def refused(*arguments: object, **environment: str) -> str:
    result = CliRunner(env=environment).invoke(app, ["serve", "no-such-model", *map(str, arguments)])
    assert isinstance(result.exception, PolarError)
    return str(result.exception)


def test_nothing_beyond_this_machine_without_a_key():
    for host in ("0.0.0.0", "::"):
        message = refused("--host", host, "--port", 0)
        assert "--api-key-file" in message
        assert "--allow-unauthenticated" in message
    # With a key or the option, it continues with the model.
    assert "no-such-model" in refused("--host", "0.0.0.0", "--port", 0, POLAR_API_KEY=KEY)
    assert "no-such-model" in refused("--host", "0.0.0.0", "--port", 0, "--allow-unauthenticated")


@pytest.mark.parametrize("content", ["", "  \n", "two words", "schlüssel"])
def test_a_key_that_no_client_could_send(tmp_path, content):
    file = tmp_path / "key"
    file.write_text(content)
    assert f"--api-key-file {file}: a key is one word" in refused("--api-key-file", file)


def test_a_key_file_that_is_not_there(tmp_path):
    assert "cannot be read" in refused("--api-key-file", tmp_path / "none")


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: Address already in use" in refused("--port", port)


def test_a_device_that_is_not_there(model_folder):
    result = CliRunner().invoke(app, ["serve", str(model_folder), "--port", "0", "--device", "warp:9"])
    assert str(result.exception).startswith("device warp:9: ")


def test_an_empty_tag_of_thoughts():
    assert "leave them out" in refused("--think-end", "")
