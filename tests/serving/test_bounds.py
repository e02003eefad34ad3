"""One client cannot bring the server down: bodies, connections, slow clients, and lines of the log."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from pydantic import TypeAdapter

from polar_ft.serving.app import create_app
from polar_ft.serving.bodies import read_body
from polar_ft.serving.connections import RESERVED
from polar_ft.serving.inputs import InputReader, TooLargeError
from polar_ft.serving.limits import Limits
from polar_ft.serving.telemetry import FewOfAKind, JsonFormatter
from polar_ft.serving.wire import AnyRewardRequest, ClassifyRequest, PoolingRequest
from tests.encoding import encode, ids_of
from tests.serving.conftest import http
from tests.serving.tiny import running

ASK = {"prompt": "Which city?", "reference": "Beijing.", "candidates": ["Beijing.", "Shanghai."]}
HALF_A_HEADER = b"POST /v1/rewards HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-"
HALF_A_BODY = (
    b"POST /v1/rewards HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000\r\n\r\n{"prompt": '
)


@contextmanager
def served(scorer, **limits: Any) -> Iterator[str]:
    with running(create_app(scorer, limits=Limits(**limits))) as address:
        yield address


@contextmanager
def open_sockets(address: str, number: int, sent: bytes, source: str = "127.0.0.1") -> Iterator[list[Any]]:
    """Connections on which something was sent, which the server has read."""
    port = int(address.rsplit(":", 1)[1])
    with ExitStack() as stack:
        opened = []
        for _ in range(number):
            connection = socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0))
            opened.append(stack.enter_context(connection))
            connection.sendall(sent)
        time.sleep(0.2)
        yield opened


def rest_of(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection; fails if it does not within 5 s."""
    connection.settimeout(5)
    came = b""
    try:
        while part := connection.recv(65536):
            came += part
    except ConnectionResetError:
        pass
    return came


def message(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


class TestConnections:
    def test_an_unfinished_header_has_an_end(self, scorer):
        with served(scorer, read_timeout=0.3) as address, http(address) as client:
            assert client.get("/health").status_code == 200
            with open_sockets(address, 1, b"") as silent, open_sockets(address, 1, HALF_A_HEADER) as half:
                started = time.monotonic()
                for connection in (*silent, *half):
                    rest_of(connection)
                assert time.monotonic() - started < 3
            metrics = client.get("/metrics").text
            assert 'polar_ft_connections_ended_total{reason="slow header"} 2.0' in metrics
            # Open between two requests is no unfinished header: the connection is the first one still.
            assert "polar_ft_connections 1.0" in metrics

    def test_a_new_connection_takes_the_place_of_one_without_a_request(self, scorer):
        with (
            served(scorer, max_connections=3) as address,
            open_sockets(address, 3, HALF_A_HEADER) as idle,
            http(address) as client,
        ):
            assert client.post("/v1/rewards", json=ASK).status_code == 200
            assert rest_of(idle[0]) == b""
            idle[1].sendall(b"Length: 0\r\n\r\n")  # the others are still served
            assert idle[1].recv(100).startswith(b"HTTP/1.1 415")

    def test_health_has_a_place_when_all_are_busy(self, scorer):
        with (
            served(scorer, max_connections=2, read_timeout=20) as address,
            open_sockets(address, 2, HALF_A_BODY),
            open_sockets(address, RESERVED + 3, HALF_A_BODY),  # they are told, and keep no reserved place
        ):
            for _ in range(3):
                with http(address) as client:
                    health = client.get("/health")
                    assert (health.status_code, health.headers["Connection"]) == (200, "close")
                    refused = client.post("/v1/rewards", json=ASK)
                    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")

    def test_one_address_leaves_room_for_others(self, scorer):
        with (
            served(scorer, max_connections_per_address=2, read_timeout=20) as address,
            open_sockets(address, 2, HALF_A_BODY, source="127.0.0.2"),
            open_sockets(address, 1, b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n", "127.0.0.2") as third,
            http(address) as client,
        ):
            assert rest_of(third[0]).startswith(b"HTTP/1.1 503")
            assert client.post("/v1/rewards", json=ASK).status_code == 200

    def test_slow_bodies_are_no_work_and_have_an_end(self, scorer):
        with (
            served(scorer, max_requests=1, read_timeout=1) as address,
            open_sockets(address, 3, HALF_A_BODY) as slow,
            http(address) as client,
        ):
            assert client.post("/v1/rewards", json=ASK).status_code == 200
            for connection in slow:
                answer = rest_of(connection)
                assert answer.startswith(b"HTTP/1.1 408")
                assert b"the body is too slow: 11 bytes" in answer

    def test_the_rest_of_a_refused_body_is_thrown_away_slowly_and_the_connection_goes_on(self, scorer):
        with served(scorer, max_body=1000, read_timeout=0.5) as address, http(address) as client:
            started = time.monotonic()
            refused = client.post("/v1/rewards", content=b"a" * 20_000_000)
            # 76 parts of at most 256 KiB, and pauses of 10 ms between those that came after the answer: it
            # took 0.64 to 0.67 s, and 0.05 s without pauses.
            assert time.monotonic() - started > 38 * 0.01
            assert refused.status_code == 413
            time.sleep(0.6)  # an idle connection has no time-out for a header
            assert client.post("/v1/rewards", json=ASK).status_code == 200
            assert "polar_ft_connections 1.0" in client.get("/metrics").text
            assert "connections_ended_total{" not in client.get("/metrics").text


class TestBodies:
    def read(self, body: bytes, form: Any = AnyRewardRequest) -> HTTPException:
        with pytest.raises(HTTPException) as refused:
            read_body(body, "application/json", TypeAdapter(form), Limits())
        return refused.value

    def test_ten_faults_are_listed_however_many_there_are(self):
        for faulty in (
            {"inputs": [{}] * 16000},
            {**ASK, "candidates": [5] * 16000},
            {**ASK, "candidates": [[{"role": 1}] * 900] * 100},
        ):
            refused = self.read(json.dumps(faulty).encode())
            assert refused.status_code == 422
            assert refused.detail.count("; ") == 9
            assert refused.detail.endswith(" (and more)")
        assert "inputs[3].prompt: Field required" in self.read(b'{"inputs": [{}, {}, {}, {}]}').detail
        ids = self.read(json.dumps({"input_ids": [["a", "b"]] * 9000}).encode(), ClassifyRequest)
        assert "input_ids[9][0]: Input should be" in ids.detail
        assert "input_ids[0][1]" not in ids.detail
        fields = self.read(json.dumps({**ASK, **{str(i): 0 for i in range(50_000)}}).encode())
        assert fields.detail == "body: has 50003 fields, more than 32"
        turns = [{"role": "user", "content": "a"}] * 5000
        assert (
            "prompt: has 5000 messages, more than 1024"
            in self.read(json.dumps({**ASK, "prompt": turns}).encode()).detail
        )

    @pytest.mark.parametrize(
        "body",
        [
            b'{"inputs": [' + b"{}," * 2_000_000 + b"{}]}",
            b'{"input_ids": [' + b"[]," * 2_000_000 + b"[]]}",
            b'{"input_ids": [' + b"1," * 3_000_000 + b"1]}",
            b"[" * 1_000_000,
            b'{"inputs": [' + b"{}," * 17_000 + b"{}]}",
            json.dumps({**ASK, "candidates": ["a"] * 17_000}).encode(),
        ],
        ids=["objects", "lists", "numbers", "nested", "inputs", "candidates"],
    )
    def test_items_are_counted_before_they_are_validated(self, body, monkeypatch):
        monkeypatch.setattr(TypeAdapter, "validate_python", None)
        if len(body) > 500_000:  # and before Python objects are made of them
            monkeypatch.setattr("polar_ft.serving.bodies.json", None)
        assert self.read(body, PoolingRequest).status_code == 413

    def test_brackets_in_texts_are_no_items(self):
        text = '[{,"\\' * 100_000
        body = read_body(
            json.dumps({**ASK, "prompt": text}).encode(),
            "application/json; charset=utf-8",
            TypeAdapter(AnyRewardRequest),
            Limits(),
        )
        assert body.prompt == text

    def test_bodies_are_not_read_in_the_event_loop(self, scorer, monkeypatch):
        threads, go = [], threading.Event()

        def held(body: bytes, *rest: Any) -> Any:
            threads.append(threading.current_thread().name)
            assert len(body) < 1000 or go.wait(30)
            return read_body(body, *rest)

        monkeypatch.setattr("polar_ft.serving.server.read_body", held)
        with served(scorer) as address, http(address) as client, ThreadPoolExecutor(1) as pool:
            large = pool.submit(http(address).post, "/v1/rewards", json={**ASK, "more": "a" * 70_000})
            while not threads:
                assert not large.done()
            assert client.get("/health").status_code == 200
            assert client.post("/v1/rewards", json=ASK).status_code == 200  # small ones do not wait for it
            go.set()
            assert large.result(30).status_code == 422
        assert [name.partition("_")[0] for name in threads] == ["polar-ft read large", "polar-ft read"]

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
    def test_another_content_type_gets_a_hint(self, client, kind):
        headers = {} if kind is None else {"Content-Type": kind}
        response = client.post("/v1/rewards", content=json.dumps(ASK), headers=headers)
        assert response.status_code == 415
        assert "'Content-Type: application/json'" in message(response)

    def test_texts_are_bounded_before_they_are_tokenized(self, client, scorer, monkeypatch):
        most = 16 * 300
        monkeypatch.setattr(type(scorer.template), "encode", None)
        for asked, name in (
            ({**ASK, "prompt": "p" * (most + 1)}, "prompt"),
            ({**ASK, "candidates": ["a", "é" * (most // 2 + 1)]}, "candidates[1]"),
        ):
            response = client.post("/v1/rewards", json=asked)
            assert response.status_code == 413
            assert message(response).startswith(
                f"{name} has {most + 1 + (name != 'prompt')} bytes, more than"
            )
        response = client.post("/pooling", json={"input": "p" * (most + 1)})
        assert response.status_code == 413
        assert "text 0 has 4801 bytes, more than the 4800 that are read" in message(response)

    def test_tokens_of_all_sequences_are_bounded(self, scorer):
        """The prompt is in every sequence: a small body with many candidates makes many tokens."""
        reader = InputReader(scorer.template, scorer.vocab_size, max_tokens=1000)
        ids = ids_of(encode(scorer.template, "Which city?", "Beijing.", ["Beijing."]))[0]
        with pytest.raises(
            TooLargeError, match=f"{100 * len(ids)} tokens, more than the 1000 of one request"
        ):
            reader.from_ids([ids] * 100)
        with served(scorer, max_request_tokens=1000) as address, http(address) as client:
            response = client.post("/v1/rewards", json={**ASK, "prompt": "z" * 90, "candidates": ["a"] * 20})
            assert response.status_code == 413
            assert "tokens, more than the 1000 of one request" in message(response)
            response = client.post("/v1/rewards", json={**ASK, "prompt": "z" * 200, "candidates": ["a"] * 90})
            assert response.status_code == 413
            assert "bytes, more than 8000" in message(response)
            assert client.post("/v1/rewards", json=ASK).status_code == 200

    def test_a_query_that_many_items_share_is_counted_for_each(self, client, monkeypatch):
        """Before the sequences are made: these would have 16 million ids, and 80 MB of text."""
        monkeypatch.setattr(InputReader, "from_texts", None)
        monkeypatch.setattr(InputReader, "from_ids", None)
        ids = client.post("/v1/score", json={"query": [5] * 1000, "items": [[6]] * 16000})
        assert ids.status_code == 413
        assert "16016000 tokens, more than" in message(ids)
        texts = client.post("/v1/score", json={"query": "a" * 4800, "items": ["b"] * 16000})
        assert texts.status_code == 413
        assert "76816000 bytes, more than" in message(texts)
        assert "query has 4801 bytes" in message(
            client.post("/v1/score", json={"query": "a" * 4801, "items": ["b"]})
        )

    def test_a_prompt_with_many_references_is_counted_for_each(self, client, scorer, monkeypatch):
        monkeypatch.setattr(type(scorer.template), "encode", None)
        many = {"prompt": "é" * 2000, "references": [""] * 16000, "candidates": ["a"]}
        started = time.monotonic()
        response = client.post("/v1/rewards", json=many)
        assert response.status_code == 413
        assert "8393049 bytes, more than 8388608" in message(response)  # 1049 times 4000 + 4000 + 1
        assert time.monotonic() - started < 5

    def test_memory_of_all_requests_is_bounded_and_given_back(self, scorer):
        with served(scorer, max_memory=4000) as address, http(address) as client:
            response = client.post("/v1/rewards", json={**ASK, "prompt": "p" * 4000})
            assert response.status_code == 429
            assert "memory" in message(response)
            for _ in range(30):
                assert client.post("/v1/rewards", json=ASK).status_code == 200


def test_repeated_lines_of_the_log_are_counted():
    now = 0.0
    limit = FewOfAKind(most=3, clock=lambda: now)

    def logged(status: int, **fields: Any) -> list[dict[str, Any]]:
        passed = []
        for _ in range(10):
            record = logging.LogRecord("polar_ft.serving", logging.INFO, "", 0, "request", (), None)
            record.fields = {"route": "/v1/rewards", "status": status, **fields}
            if limit.filter(record):
                passed.append(json.loads(JsonFormatter().format(record)))
        return passed

    assert len(logged(413)) == 3
    assert len(logged(429)) == 3
    assert len(logged(200, tokens=7)) == 10  # who was scored is always logged
    assert len(logged(413)) == 0
    now = 61.0
    again = logged(413)
    assert [line.get("left_out") for line in again] == [17, None, None]
