"""Contract tests of SGLang's multi-item scoring (``--enable-mis``), against a server that follows its source.

SGLang 0.5.23: ``entrypoints/openai/serving_score.py`` and ``protocol.py`` (request, answer, errors),
``managers/tokenizer_manager_score_mixin.py`` (the fused sequence), ``layers/attention/flashinfer_backend.py``
(positions) with FlashInfer's mask of multi-item scoring (what a token sees), ``layers/pooler.py`` (pooling).
Not run against the engine, which needs a GPU.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from polar_ft.client import RewardModelClient, RewardServerError
from polar_ft.client.contact import probe_sequences
from polar_ft.client.wire import request_body
from tests.client.conftest import make_data
from tests.client.fake_server import FakeServer, reward_of
from tests.client.test_client import expected

DELIMITER = 9999  # constants.py; no control token, any id of the vocabulary


def fused(query: list[int], items: list[list[int]]) -> tuple[list[int], list[int]]:
    """Query, delimiter, item, delimiter, item, …, delimiter; and where the delimiters are."""
    ids, delimiters = list(query), []
    for item in items:
        delimiters.append(len(ids))
        ids += [DELIMITER, *item]
    delimiters.append(len(ids))
    return [*ids, DELIMITER], delimiters


def seen_from(index: int, ids: list[int], delimiters: list[int]) -> list[tuple[int, int]]:
    """(position, id) of what the token at an index sees, by position."""
    prefix = delimiters[0]
    in_item = [k - max((d for d in delimiters if d <= k), default=k) for k in range(len(ids))]
    position = [k if k < prefix else prefix + in_item[k] - 1 for k in range(len(ids))]
    # FlashInfer: the prefix, and of what follows only tokens behind the own item's delimiter.
    visible = [k for k in range(index + 1) if k < prefix or k > index - in_item[index]]
    return sorted((position[k], ids[k]) for k in visible)


def pooled(query: list[int], items: list[list[int]]) -> list[float]:
    """The scores of a model: at the token before each delimiter, the first delimiter's left out."""
    ids, delimiters = fused(query, items)
    scores = []
    for delimiter in delimiters[1:]:
        seen = seen_from(delimiter - 1, ids, delimiters)
        assert [position for position, _ in seen] == list(range(len(seen)))
        scores.append(reward_of([token for _, token in seen]))
    return scores


class Server:
    """SGLang with one model.

    Args:
        kind: "mis"; "single" for a server without the flag; "last token" for a model class that does not
            pool at delimiters.
        change: Of the answer.
        limit: Its context.
    """

    def __init__(
        self,
        kind: str = "mis",
        change: Callable[[dict[str, Any]], Any] = lambda answer: answer,
        limit: int = 0,
    ) -> None:
        self.kind, self.change, self.limit = kind, change, limit
        self.bodies: list[dict[str, Any]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"127.0.0.1:{self._http.server_address[1]}"

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def score(self, body: dict[str, Any]) -> tuple[int, Any]:
        query, items = body["query"], body["items"]
        assert set(body) == {"query", "items"}
        assert query
        assert all(items)
        if self.kind == "last token":
            message = (
                f"Expected {len(items) + 1} delimiter entries for multi-item scoring with {len(items)} items"
            )
            message = f"Internal server error: {message}, but got 1. Request ID: 5f"
            return 500, {"object": "error", "message": message, "type": "InternalServerError", "code": 500}
        tokens = len(fused(query, items)[0]) if self.kind == "mis" else sum(len(query + i) for i in items)
        if self.limit and tokens > self.limit:
            return 400, {"object": "error", "message": f"{tokens} tokens", "type": "BadRequest", "code": 400}
        scores = [[score] for score in pooled(query, items)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        answer = {"scores": scores, "pooled_hidden_states": None, "model": "default", "usage": usage}
        return 200, self.change({**answer, "object": "scoring"})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                card = {"id": "tiny", "object": "model", "owned_by": "sglang", "max_model_len": server.limit}
                version = {"version": "0.5.23", "enable_mis": server.kind == "mis"}
                known = {"/v1/models": {"object": "list", "data": [card]}, "/server_info": version}
                self.reply(200 if self.path in known else 404, known.get(self.path, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/score"
                server.bodies.append(body)
                self.reply(*server.score(body))

            def reply(self, status: int, payload: Any) -> None:
                content = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(*args: Any, **kwargs: Any) -> Server:
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def client_of(tokenizer_dir, server: Server | FakeServer, **settings: Any) -> RewardModelClient:
    settings = {"server_type": "sglang-mis", "retry_delay": 0.01, "max_retries": 2, **settings}
    return RewardModelClient(tokenizer_dir, server_address=server.address, **settings)


def test_the_reward_token_sees_what_it_sees_alone():
    """Prefix 1 2, items 3 4 and 5: positions go on from the prefix, and no delimiter is seen."""
    ids, delimiters = fused([1, 2], [[3, 4], [5]])
    assert ids == [1, 2, DELIMITER, 3, 4, DELIMITER, 5, DELIMITER]
    assert delimiters == [2, 5, 7]
    assert seen_from(4, ids, delimiters) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert seen_from(6, ids, delimiters) == [(0, 1), (1, 2), (2, 5)]
    assert pooled([1, 2], [[3, 4], [5]]) == [reward_of([1, 2, 3, 4]), reward_of([1, 2, 5])]


def test_a_group_is_one_request(start, tokenizer_dir, template, data):
    server = start()
    with client_of(tokenizer_dir, server) as client:
        assert client(data) == expected(template, data)
        (profile,) = client.servers()
    assert (profile.wire, profile.name) == ("sglang-mis", "SGLang 0.5.23")
    contact, groups = server.bodies[:2], server.bodies[2:]
    assert [len(body["items"]) for body in contact] == [6, 2]
    assert [len(body["items"]) for body in groups] == [3] * 10
    for body in groups:
        assert body["query"].count(template.separator_id) == 1
        assert all(item[-1] == template.reward_token_id for item in body["items"])


def test_order_is_kept_whatever_it_is(start, tokenizer_dir, template):
    data = [*make_data(30), {"prompt": "alone", "reference": "r", "output": "one"}]
    data += [data[4]] * 2  # equal candidates
    random.Random(0).shuffle(data)
    server = start()
    with client_of(tokenizer_dir, server) as client:
        assert client(data) == expected(template, data)
    assert len(server.bodies) == 2 + 11


def test_a_group_that_is_longer_than_the_context_is_divided(start, tokenizer_dir, template):
    rows = [{"prompt": "p" * 40, "reference": "r", "output": f"{i}" * 30} for i in range(8)]
    length = max(len(ids) for ids in probe_sequences(template))
    server = start(limit=max(300, 6 * length))
    with client_of(tokenizer_dir, server) as client:
        assert client(rows) == expected(template, rows)
    assert len(server.bodies) > 3


def test_an_input_has_to_leave_room_for_its_delimiters(start, tokenizer_dir, template):
    longest = max(len(ids) for ids in probe_sequences(template))
    row = {"prompt": "p", "reference": "r", "output": "a"}
    with client_of(tokenizer_dir, start(limit=10 * longest)) as client:
        row["output"] = "a" * (1 + 10 * longest - 2 - len(client.encode(row).ids))
        assert client([row]) == expected(template, [row])
        row["output"] += "a"
        with pytest.raises(RewardServerError, match=rf"at most {10 * longest - 2} tokens, and one has"):
            client([row])


def test_a_server_without_multi_item_scoring(start, tokenizer_dir, template, data):
    """The same route scores the inputs one by one, and says so by the number of tokens."""
    with client_of(tokenizer_dir, start("single")) as client:
        assert client(data) == expected(template, data)


def test_a_model_class_that_pools_the_last_token_only(start, tokenizer_dir, data):
    """As SGLang's LlamaForSequenceClassification and InternLM2ForRewardModel."""
    with client_of(tokenizer_dir, start("last token")) as client, pytest.raises(RewardServerError) as caught:
        client(data)
    assert "HTTP 500: Internal server error: Expected 7 delimiter entries" in str(caught.value)
    assert "--enable-mis --attention-backend flashinfer" in str(caught.value)
    assert "need server_type='sglang'" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: {**answer, "scores": answer["scores"][:-1]}, "5 answers came for 6 inputs"),
        (lambda answer: {**answer, "scores": [[0.1, 0.9]] * 6}, "where one number in a list belongs"),
        (lambda answer: {**answer, "usage": {"prompt_tokens": 50}}, "it says that it read 50 tokens where"),
        (lambda answer: answer["scores"], 'an object with "scores" belongs'),
    ],
)
def test_other_answers(start, tokenizer_dir, data, change, message):
    with (
        client_of(tokenizer_dir, start(change=change)) as client,
        pytest.raises(RewardServerError, match=message),
    ):
        client(data)


def test_another_engine(serve, tokenizer_dir, data):
    with (
        client_of(tokenizer_dir, serve("vllm")) as client,
        pytest.raises(RewardServerError, match="is vLLM, not SGLang; say server_type='vllm'"),
    ):
        client(data)


def test_request_body():
    inputs = [np.array(ids, dtype=np.int32) for ids in ([1, 7, 0, 7, 5, 9], [1, 7, 0, 7, 9])]
    body = request_body("sglang-mis", inputs, {})
    assert body == {"query": [1, 7, 0, 7], "items": [[5, 9], [9]]}
    json.dumps(body)
