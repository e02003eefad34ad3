"""A real vLLM against the scorer, the embedded server, transformers and the training code.

The model is random, in float32, with rewards of about ±20; everything has to agree to 1e-4.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from polar_ft.client import RewardModelClient, RewardServerError
from polar_ft.groups import TokenGroup
from polar_ft.parity.inputs import ParityInput, parity_inputs
from polar_ft.scoring.scorer import RewardScorer
from tests.encoding import ids_of
from tests.engines.conftest import ENVIRONMENT, MAX_LENGTH, MAX_RESPONSE_LENGTH
from tests.engines.servers import Vllm, vllm_server

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def scorer(model: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(model)


@pytest.fixture(scope="module")
def inputs(scorer: RewardScorer) -> list[ParityInput]:
    return parity_inputs(scorer.template, 50)


@pytest.fixture(scope="module")
def rows(inputs: list[ParityInput]) -> list[dict]:
    return [row for item in inputs for row in item.rows()]


@pytest.fixture(scope="module")
def encoded(scorer: RewardScorer, inputs: list[ParityInput]) -> list[TokenGroup]:
    return scorer.template.encode([item.group() for item in inputs])


@pytest.fixture(scope="module")
def ids(encoded: list[TokenGroup]) -> list[list[int]]:
    return [ids for item in encoded for ids in ids_of(item)]


@pytest.fixture(scope="module")
def by_scorer(scorer: RewardScorer, rows: list[dict]) -> list[float]:
    return scorer.score(rows)


def test_the_inputs_are_what_can_go_wrong(inputs, encoded, ids, by_scorer):
    assert len(ids) == 200
    lengths = sorted(map(len, ids))
    assert lengths[0] < 40
    assert lengths[-1] > 800
    assert {item.kind for item in inputs} >= {
        "Chinese",
        "several turns",
        "empty reference",
        "empty candidate",
    }
    assert sum(bool(item.cut.prompt) for item in encoded) >= 3
    assert sum(bool(item.cut.reference) for item in encoded) >= 3
    assert max(map(abs, by_scorer)) > 10


def test_client_through_vllm(vllm: Vllm, model, rows, by_scorer):
    with RewardModelClient(model, server_type="vllm", server_address=vllm.address) as client:
        assert client(rows) == pytest.approx(by_scorer, abs=TOLERANCE, rel=0)


def test_the_published_calls_through_vllm(vllm: Vllm, model, rows, by_scorer):
    """As published scripts do it: encode, then the engine's own call; ids travel with the strings."""
    with RewardModelClient(model, server_address=vllm.address, server_type="vllm") as client:
        texts = client.encode(rows)
        assert all(isinstance(text, str) for text in texts)
        assert client.vllm_request_reward(texts) == pytest.approx(by_scorer, abs=TOLERANCE, rel=0)


def test_vllm_by_hand(vllm: Vllm, ids, by_scorer):
    """Without the client: token ids of the template, and the engine's own wire format."""
    found = vllm.pooling(ids, use_activation=False)
    assert found == pytest.approx(by_scorer, abs=TOLERANCE, rel=0)


def test_client_through_the_embedded_server(polar: str, model, rows, by_scorer):
    with RewardModelClient(model, server_address=polar) as client:
        assert client(rows) == pytest.approx(by_scorer, abs=TOLERANCE, rel=0)


def test_template_on_the_embedded_server(polar: str, inputs, by_scorer):
    """`POST /v1/rewards` takes texts: the server applies the template."""
    body = {
        "inputs": [
            {
                "prompt": item.prompt,
                "reference": item.reference,
                "candidates": list(item.candidates),
                "wrapper": item.wrapper,
            }
            for item in inputs
        ]
    }
    answer = httpx.post(f"http://{polar}/v1/rewards", json=body, timeout=120).raise_for_status().json()
    found = [reward for rewards in answer["rewards"] for reward in rewards]
    assert found == pytest.approx(by_scorer, abs=TOLERANCE, rel=0)


def test_parity_command(vllm: Vllm, polar: str, model, tmp_path):
    """Training code and transformers with the checkpoint's own code too, in one command."""
    report = _parity(model, tmp_path, "--server", f"vllm={vllm.address}", "--server", polar)
    names = [way["name"] for way in report["comparisons"]]
    assert names == ["training code", "transformers", f"vllm {vllm.address}", polar]
    assert report["n_texts"] == 200
    for way in report["comparisons"]:
        assert way["error"] is None
        assert sum(length["n"] for length in way["lengths"]) == 200, way
        assert way["max_abs_diff"] <= TOLERANCE, way
        assert way["n_order_changes"] == 0, way
    assert report["ok"]


def test_left_to_itself_vllm_returns_a_sigmoid(vllm: Vllm, ids, by_scorer):
    """What the client has to notice: the default of vLLM 0.32 for InternLM2ForRewardModel."""
    found = vllm.pooling(ids[:20])
    # The sigmoid's slope is 1/4 at most.
    sigmoid = [1 / (1 + math.exp(-reward)) for reward in by_scorer[:20]]
    assert found == pytest.approx(sigmoid, abs=TOLERANCE / 4, rel=0)


def test_a_vllm_that_cannot_turn_the_sigmoid_off_is_refused(vllm: Vllm, model, rows):
    """A proxy that loses `use_activation` stands for a version that does not know it."""
    with _losing_the_switch(vllm.address) as address:
        for server_type in ("vllm", "auto"):
            client = RewardModelClient(model, server_type=server_type, server_address=address, max_retries=1)
            with client, pytest.raises(RewardServerError, match="--pooler-config") as error:
                client(rows[:4])
            assert address in str(error.value)


def test_started_as_the_client_says_vllm_returns_rewards(model, ids, rows, by_scorer, tmp_path):
    """With the option that the refusal names, even requests without the switch get raw rewards."""
    assert ENVIRONMENT
    option = ("--pooler-config", '{"use_activation": false}')
    with vllm_server(Path(ENVIRONMENT), model, tmp_path, *option) as server:
        assert server.pooling(ids[:40]) == pytest.approx(by_scorer[:40], abs=TOLERANCE, rel=0)
        with (
            _losing_the_switch(server.address) as address,
            RewardModelClient(model, server_type="vllm", server_address=address) as client,
        ):
            assert client(rows[:40]) == pytest.approx(by_scorer[:40], abs=TOLERANCE, rel=0)


def _parity(model: Path, folder: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "polar_ft.cli", "parity", str(model), "--json", "--trust-remote-code"]
    command += ["--inputs", "50", "--max-length", str(MAX_LENGTH)]
    command += ["--max-response-length", str(MAX_RESPONSE_LENGTH), "--tolerance", str(TOLERANCE), *options]
    # transformers keeps the code that it runs in its cache.
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return json.loads(result.stdout)


@contextmanager
def _losing_the_switch(target: str) -> Iterator[str]:
    """Hands requests on to a vLLM, without ``use_activation`` and ``activation``; its own address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._hand_on("GET", None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body.pop("use_activation", None)
            body.pop("activation", None)
            self._hand_on("POST", body)

        def _hand_on(self, method: str, body: object) -> None:
            answer = httpx.request(method, f"http://{target}{self.path}", json=body, timeout=120)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("content-type", "text/plain"))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
