"""The routes: one reward in every format, errors, limits, keys, and what is logged."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from polar_ft.client import RewardModelClient
from polar_ft.reward_scale import RewardScale
from polar_ft.serving.app import create_app
from polar_ft.serving.limits import Limits
from polar_ft.serving.telemetry import JsonFormatter
from tests.encoding import encode, ids_of
from tests.serving.conftest import http
from tests.serving.tiny import running

PROMPT, REFERENCE = "What is the capital of China?", "Beijing."
CANDIDATES = ["Beijing.", "Shanghai.", "北京。", "It is Beijing, I think."]
ASK = {"prompt": PROMPT, "reference": REFERENCE, "candidates": CANDIDATES}
PUBLISHED = [f"{PROMPT}\n{REFERENCE}<|reward|>{PROMPT}\n{text}[UNUSED_TOKEN_130]" for text in CANDIDATES]


@pytest.fixture(scope="session")
def expected(scorer):
    rows = [{"prompt": PROMPT, "reference": REFERENCE, "output": text} for text in CANDIDATES]
    return pytest.approx(scorer.score(rows), abs=2e-5)


@pytest.fixture(scope="session")
def sequences(scorer):
    return ids_of(encode(scorer.template, PROMPT, REFERENCE, CANDIDATES))


def message(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return error["message"]


class TestFormats:
    def test_own(self, client, expected):
        answer = client.post("/v1/rewards", json=ASK).json()
        assert answer["rewards"] == expected
        assert answer["model"] == "tiny"
        assert answer["cut"] == {"prompt": 0, "reference": 0, "candidates": [0, 0, 0, 0]}

    def test_own_several_with_messages(self, client, expected):
        as_messages = {
            "prompt": [{"role": "user", "content": PROMPT}],
            "reference": [{"role": "assistant", "content": REFERENCE}],
            "candidates": [[{"role": "assistant", "content": text}] for text in CANDIDATES[:2]],
        }
        rest = {**ASK, "candidates": CANDIDATES[2:]}
        answer = client.post("/v1/rewards", json={"inputs": [as_messages, rest]}).json()
        assert [reward for rewards in answer["rewards"] for reward in rewards] == expected
        assert [len(rewards) for rewards in answer["rewards"]] == [2, 2]
        assert [cut["candidates"] for cut in answer["cut"]] == [[0, 0], [0, 0]]

    @pytest.mark.parametrize(
        ("combine", "join"), [("max", max), ("mean", lambda both: sum(both) / len(both))]
    )
    def test_own_with_several_references(self, client, scorer, combine, join):
        rows = [
            {"prompt": PROMPT, "reference": reference, "output": text}
            for text in CANDIDATES
            for reference in ("Beijing.", "z" * 200)
        ]
        scored = iter(scorer.score(rows))
        right = [join(both) for both in zip(scored, scored, strict=True)]
        ask = {"prompt": PROMPT, "references": ["Beijing.", "z" * 200], "candidates": CANDIDATES}
        alone = client.post("/v1/rewards", json={**ask, "combine": combine}).json()
        assert alone["rewards"] == pytest.approx(right, abs=2e-5)
        assert alone["cut"] == {"prompt": 0, "reference": 121, "candidates": [0, 0, 0, 0]}
        answer = client.post("/v1/rewards", json={"inputs": [ASK, {**ask, "combine": combine}]}).json()
        assert answer["rewards"][1] == pytest.approx(alone["rewards"], abs=1e-5)
        assert [cut["reference"] for cut in answer["cut"]] == [0, 121]

    def test_own_with_the_wrong_number_of_references(self, client):
        for wrong, says in (
            ({"reference": "r", "references": ["r"]}, 'must have either "reference" or "references"'),
            ({}, 'must have either "reference" or "references"'),
            ({"references": []}, "references: List should have at least 1 item"),
        ):
            ask = {"prompt": "p", "candidates": ["c"], **wrong}
            assert says in message(client.post("/v1/rewards", json=ask))
            assert says in message(client.post("/v1/rewards", json={"inputs": [ask]}))

    def test_own_says_what_was_cut(self, client, scorer):
        """One token a byte for these letters: 200 of them and BOS are 201, the limit is 80."""
        answer = client.post("/v1/rewards", json={**ASK, "candidates": ["z" * 200, "z" * 79]}).json()
        assert answer["cut"]["candidates"] == [121, 0]
        assert answer["rewards"][0] == pytest.approx(answer["rewards"][1], abs=1e-5)

    def test_sglang(self, client, expected, sequences):
        for body in ({"text": PUBLISHED}, {"input_ids": sequences}):
            results = client.post("/classify", json={"model": "any", **body}).json()
            assert [result["embedding"][0] for result in results] == expected
            assert [result["meta_info"]["prompt_tokens"] for result in results] == list(map(len, sequences))

    def test_sglang_gives_a_bare_object_for_a_single_input(self, client, expected, sequences):
        for body in ({"text": PUBLISHED[1]}, {"input_ids": sequences[1]}):
            (reward,) = client.post("/classify", json=body).json()["embedding"]
            assert reward == pytest.approx(expected.expected[1], abs=2e-5)

    @pytest.mark.parametrize("path", ["/pooling", "/vllm/pooling"])
    def test_vllm(self, client, expected, sequences, path):
        for given in (PUBLISHED, sequences):
            body = {"model": "any", "input": given, "use_activation": False}
            answer = client.post(path, json=body).json()
            assert [item["data"][-1][0] for item in answer["data"]] == expected
            assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
            assert answer["usage"]["prompt_tokens"] == sum(map(len, sequences))

    def test_vllm_gives_the_sigmoid_only_where_it_is_asked_for(self, client, expected, sequences):
        raw = client.post("/pooling", json={"input": sequences}).json()
        assert [item["data"][-1][0] for item in raw["data"]] == expected
        asked = client.post("/pooling", json={"input": sequences, "use_activation": True}).json()
        assert [item["data"][-1][0] for item in asked["data"]] == pytest.approx(
            [1 / (1 + math.exp(-item["data"][-1][0])) for item in raw["data"]], abs=1e-6
        )

    def test_lmdeploy(self, client, scorer, expected, sequences):
        answer = client.post("/lmdeploy/pooling", json={"input": PUBLISHED}).json()
        assert [item["data"] for item in answer["data"]] == expected
        with running(create_app(scorer, pooling_format="lmdeploy")) as address, http(address) as lmdeploy:
            (item,) = lmdeploy.post("/pooling", json={"input": sequences[2]}).json()["data"]
            assert item["data"] == pytest.approx(expected.expected[2], abs=2e-5)
            body = {"input": sequences[2], "use_activation": False}  # which only vLLM's clients send
            (told,) = lmdeploy.post("/pooling", json=body).json()["data"]
            assert told["data"] == [[pytest.approx(item["data"], abs=1e-6)]]

    def test_scale_only_where_it_is_asked_for(self, client, model_folder, expected):
        refused = client.post("/v1/rewards", json={**ASK, "scale": True})
        assert refused.status_code == 400
        assert "polar-ft calibrate" in message(refused)
        file = RewardScale(centre=1.0, spread=4.0, within_spread=1.0).save(model_folder)
        try:
            assert client.get("/v1/models").json()["data"][0]["has_scale"]
            raw = client.post("/v1/rewards", json=ASK).json()["rewards"]
            scaled = client.post("/v1/rewards", json={**ASK, "scale": True}).json()["rewards"]
        finally:
            file.unlink()
        assert raw == expected
        assert scaled == pytest.approx([(reward - 1.0) / 4.0 for reward in raw], abs=1e-5)

    def test_own_replies_with_all_forms_of_a_reward(self, client, model_folder, expected):
        """By hand: (reward − 1) / 4, and reward / 0.5."""
        before = client.post("/v1/rewards", json=ASK).json()
        assert (before["raw"], before["tempered"]) == (expected, None)
        file = RewardScale(centre=1.0, spread=4.0, temperature=0.5).save(model_folder)
        try:
            one = client.post("/v1/rewards", json={**ASK, "scale": True}).json()
            several = client.post("/v1/rewards", json={"inputs": [ASK, ASK]}).json()
            file.write_text("damaged")
            damaged = client.post("/v1/rewards", json=ASK).json()
        finally:
            file.unlink()
        assert one["raw"] == several["raw"][1] == several["rewards"][1] == expected
        assert one["rewards"] == pytest.approx([(reward - 1.0) / 4.0 for reward in one["raw"]], abs=1e-5)
        for tempered in (one["tempered"], several["tempered"][0]):
            assert tempered == pytest.approx([reward / 0.5 for reward in one["raw"]], abs=1e-5)
        assert (damaged["rewards"], damaged["tempered"]) == (expected, None)

    def test_sglang_score(self, client, expected, sequences):
        """What all share, and the rest of each; split elsewhere, the ids are the same."""
        query = f"{PROMPT}\n{REFERENCE}<|reward|>{PROMPT}\n"
        for body in (
            {"query": query, "items": [f"{text}[UNUSED_TOKEN_130]" for text in CANDIDATES]},
            {"query": sequences[0][:7], "items": [ids[7:] for ids in sequences], "label_token_ids": [1, 2]},
        ):
            answer = client.post("/v1/score", json={"model": "any", **body}).json()
            assert [reward for (reward,) in answer["scores"]] == expected
            assert (answer["object"], answer["model"]) == ("scoring", "tiny")
            assert answer["usage"]["prompt_tokens"] == sum(map(len, sequences))
        body = {"query": query, "items": f"{CANDIDATES[1]}[UNUSED_TOKEN_130]"}
        assert client.post("/v1/score", json=body).json()["scores"] == [
            [pytest.approx(expected.expected[1], abs=2e-5)]
        ]

    def test_many_clients_at_once(self, client, expected, sequences):
        with ThreadPoolExecutor(16) as pool:
            asked = [sequences[i % 4] for i in range(64)]
            answers = pool.map(lambda ids: client.post("/classify", json={"input_ids": ids}).json(), asked)
            rewards = [answer["embedding"][0] for answer in answers]
        for start in range(0, 64, 4):
            assert rewards[start : start + 4] == expected

    @pytest.mark.parametrize(
        ("server_type", "suffix"), [("auto", ""), ("sglang", ""), ("vllm", ""), ("lmdeploy", "/lmdeploy")]
    )
    def test_the_client_of_this_package(self, client, scorer, model_folder, server_type, suffix):
        rows = [
            {"prompt": prompt, "reference": reference, "output": output, "wrapper": wrapper}
            for prompt in (PROMPT, "首都是哪里？ " * 30)
            for reference in ("", "Beijing.", "z" * 200)
            for output in ("", "Shanghai.", "no " * 100, "<|reward|>[UNUSED_TOKEN_130]")
            for wrapper in ("sft", "pretrain")
        ]
        address = f"{client.base_url.host}:{client.base_url.port}{suffix}"
        rewards = RewardModelClient(model_folder, server_type=server_type, server_address=address)(rows)
        assert rewards == pytest.approx(scorer.score(rows), abs=2e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "body", "status", "says"),
        [
            ("/v1/rewards", {**ASK, "candidates": []}, 422, "candidates: List should have at least 1 item"),
            (
                "/v1/rewards",
                {**ASK, "reference": 7},
                422,
                "reference: must be a string or a list of messages",
            ),
            ("/v1/rewards", {**ASK, "candidate": "x"}, 422, "candidate: Extra inputs"),
            ("/v1/rewards", {"inputs": [ASK, {**ASK, "wrapper": "chat"}]}, 422, "inputs[1].wrapper:"),
            ("/v1/rewards", {**ASK, "candidates": ["\ud83d"]}, 422, "candidates[0]: holds half"),
            ("/v1/rewards", [], 422, "body:"),
            ("/classify", {"text": "Hello"}, 400, "does not end with"),
            ("/classify", {"input_ids": [5, 6]}, 400, "ends with id 6"),
            ("/classify", {}, 422, 'must have either "text" or "input_ids"'),
            ("/classify", {"text": []}, 422, "text: must be a text or a list of texts"),
            ("/classify", {"text": [5]}, 422, "text: "),
            ("/classify", {"input_ids": "5"}, 422, "input_ids: "),
            ("/classify", {"input_ids": [[]]}, 400, "input 0 has no token ids"),
            ("/classify", {"text": ["a", 5]}, 422, "text[1]: Input should be a valid string"),
            ("/classify", {"text": PUBLISHED, "input_ids": [1]}, 422, "either"),
            ("/pooling", {"input": []}, 422, "input: must be a text, a list of texts"),
            ("/v1/score", {"query": "a", "items": []}, 422, "items: must be a text, a list of texts or"),
            ("/v1/score", {"query": "a", "items": [[5]]}, 422, "must both be texts, or both token ids"),
            ("/v1/score", {"query": [5], "items": ["a"]}, 422, "must both be texts, or both token ids"),
            ("/v1/score", {"query": [5], "items": [[6, 7]]}, 400, "input 0 ends with id 7"),
            ("/v1/score", {"query": "a", "items": ["b"], "apply_softmax": True}, 422, "apply_softmax"),
            ("/v1/score", {"query": "a", "items": ["b"], "item_first": True}, 422, "item_first"),
            ("/pooling", {"input": [[5, 299], "a"]}, 422, "input[1]"),
            ("/pooling", {"input": [True]}, 422, "input[0]"),
            ("/pooling", {"input": PUBLISHED, "encoding_format": "base64"}, 422, "encoding_format"),
            ("/pooling", {"input": PUBLISHED, "truncate_prompt_tokens": 5}, 422, "truncate_prompt_tokens"),
        ],
    )
    def test_what_cannot_be_scored_is_named(self, client, path, body, status, says):
        content = json.dumps(body).encode()
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        assert says in message(response)

    def test_no_json(self, client):
        response = client.post("/v1/rewards", content=b"{", headers={"Content-Type": "application/json"})
        assert response.status_code == 422
        assert message(response)

    def test_no_such_route_or_method(self, client):
        assert client.get("/nope").status_code == 404
        assert client.get("/v1/rewards").status_code == 405
        assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere

    def test_a_model_that_fails(self, held, caplog):
        def fail(groups):
            raise RuntimeError("secret text of a user")

        held.score_groups = fail
        with running(create_app(held)) as address, http(address) as client:
            response = client.post("/v1/rewards", json=ASK)
            assert response.status_code == 500
            assert "secret" not in response.text
            assert client.get("/ready").status_code == 200
        (record,) = (record for record in caplog.records if record.getMessage() == "the model failed")
        line = JsonFormatter().format(record)
        assert json.loads(line)["error"] == "RuntimeError"
        assert "secret" not in line


class TestLimits:
    def test_body(self, scorer):
        limits = Limits(max_body=1000)
        with running(create_app(scorer, limits=limits)) as address, http(address) as client:
            body = json.dumps({**ASK, "prompt": "p" * 2000}).encode()
            headers = {"Content-Type": "application/json"}
            assert client.post("/v1/rewards", content=body, headers=headers).status_code == 413
            chunks = (body[i : i + 100] for i in range(0, len(body), 100))  # sent without a length
            assert client.post("/v1/rewards", content=chunks, headers=headers).status_code == 413
            assert client.post("/v1/rewards", json=ASK).status_code == 200

    def test_tokens_of_a_request(self, scorer):
        limits = Limits(max_queue_tokens=100)
        with running(create_app(scorer, limits=limits)) as address, http(address) as client:
            response = client.post("/v1/rewards", json={**ASK, "candidates": ["z" * 79] * 3})
            assert response.status_code == 413
            assert "more than the 100" in message(response)

    def test_candidates_of_a_request(self, client, monkeypatch):
        monkeypatch.setattr("polar_ft.serving.bodies.MAX_CANDIDATES", 3)
        assert client.post("/v1/rewards", json=ASK).status_code == 413
        assert client.post("/classify", json={"text": PUBLISHED}).status_code == 413
        assert client.post("/v1/score", json={"query": "a", "items": PUBLISHED}).status_code == 413
        other_form = {"text": PUBLISHED, "inputs": [], "label": 1}  # another route's fields hide nothing
        assert client.post("/classify", json=other_form).status_code == 413
        of_two = {"prompt": "p", "references": ["r", "s"], "candidates": ["a", "b"]}
        assert client.post("/v1/rewards", json=of_two).status_code == 413
        assert client.post("/v1/rewards", json={"inputs": [of_two]}).status_code == 413
        assert client.post("/classify", json={"text": PUBLISHED[:3]}).status_code == 200

    @pytest.mark.parametrize("limit", ["max_requests", "max_queue_tokens"])
    def test_a_full_queue(self, held, limit):
        ask = {**ASK, "candidates": CANDIDATES[:1]}
        tokens = len(ids_of(encode(held.template, PROMPT, REFERENCE, CANDIDATES[:1]))[0])
        limits = Limits(**{limit: {"max_requests": 2, "max_queue_tokens": 3 * tokens - 1}[limit]})
        with (
            running(create_app(held, limits=limits)) as address,
            http(address) as client,
            ThreadPoolExecutor(2) as pool,
        ):
            answers = [pool.submit(client.post, "/v1/rewards", json=ask) for _ in range(2)]
            while f"polar_ft_queue_tokens {2.0 * tokens}" not in client.get("/metrics").text:
                pass
            refused = client.post("/v1/rewards", json=ask)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            held.go.set()
            assert [answer.result(10).status_code for answer in answers] == [200, 200]
            assert client.post("/v1/rewards", json=ask).status_code == 200

    def test_time(self, held):
        limits = Limits(timeout=0.2)
        with running(create_app(held, limits=limits)) as address, http(address) as client:
            assert client.post("/v1/rewards", json=ASK).status_code == 504
            held.go.set()

    def test_a_client_that_goes_away_is_not_scored(self, held):
        ask = {**ASK, "candidates": CANDIDATES[:1]}
        with running(create_app(held)) as address, http(address) as client, ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.post, "/v1/rewards", json=ask)
            assert held.begun.wait(10)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/rewards", json=ASK, timeout=0.3, trust_env=False)
            while (
                'polar_ft_requests_total{route="/v1/rewards",status="499"} 1.0'
                not in client.get("/metrics").text
            ):
                pass
            held.go.set()
            assert first.result(10).status_code == 200
            assert client.post("/v1/rewards", json=ask).status_code == 200
        assert held.batches == [1, 1]


class TestAccess:
    KEY = "correct-horse"

    @pytest.fixture
    def address(self, scorer):
        with running(create_app(scorer, api_key=self.KEY)) as address:
            yield address

    def test_every_route_but_health_asks_for_the_key(self, scorer, address):
        routes = [
            (method, route.path)
            for route in create_app(scorer).routes
            for method in sorted(getattr(route, "methods", None) or {"GET"})
            if method != "HEAD"
        ]
        assert ("POST", "/v1/rewards") in routes
        with http(address) as client:
            for method, path in [*routes, ("GET", "/nope"), ("GET", "/openapi.json")]:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": self.KEY}):
                    response = client.request(method, path, headers=headers)
                    assert response.status_code == (200 if path == "/health" else 401), (method, path)

    def test_the_key_opens(self, address, expected):
        with http(address, headers={"Authorization": f"Bearer {self.KEY}"}) as client:
            assert client.post("/v1/rewards", json=ASK).json()["rewards"] == expected
            assert client.get("/ready").json() == {"status": "ready"}

    def test_the_refused_page_is_where_the_key_is_typed(self, address):
        with http(address) as client:
            page = client.get("/")
            assert page.status_code == 401
            assert 'id="key"' in page.text

    def test_other_hosts_are_refused_on_loopback(self, scorer):
        with running(create_app(scorer, loopback_only=True)) as address, http(address) as client:
            assert client.get("/v1/models").status_code == 200
            for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
                assert client.get("/v1/models", headers={"Host": host}).status_code == 421


def test_status_routes(client, scorer):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["owned_by"]) == ("tiny", "polar_ft")
    assert (card["max_model_len"], card["max_response_length"]) == (300, 80)
    assert card["template"] == scorer.template.fingerprint


def test_metrics_count_what_was_shared(scorer):
    with running(create_app(scorer)) as address, http(address) as client:
        client.post("/v1/rewards", json=ASK)
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    encoded = encode(scorer.template, PROMPT, REFERENCE, CANDIDATES)
    flat = sum(map(len, ids_of(encoded)))
    assert float(values["polar_ft_sequence_tokens_total"]) == flat
    assert float(values["polar_ft_computed_tokens_total"]) == flat - 3 * len(encoded.prefix)
    assert float(values["polar_ft_candidates_total"]) == 4
    assert float(values["polar_ft_queue_tokens"]) == 0
    assert float(values['polar_ft_requests_total{route="/v1/rewards",status="200"}']) == 1


def test_logs_hold_no_text_of_users(client, caplog):
    secret = "hunter2-passw0rd"
    with caplog.at_level(logging.INFO):
        client.post("/v1/rewards", json={**ASK, "prompt": secret, "candidates": [secret]})
        client.post("/v1/rewards", json={**ASK, "prompt": {secret: 1}})
        client.post("/classify", json={"text": secret})
        client.get(f"/{secret}?q={secret}", headers={"X-Secret": secret})
        # A request is logged after its answer was sent, so the last line may come a moment later.
        for _ in range(100):
            records = [record for record in caplog.records if record.name == "polar_ft.serving"]
            if len(records) >= 4:
                break
            time.sleep(0.05)
    lines = [JsonFormatter().format(record) for record in records]
    assert len(lines) == 4
    statuses = [json.loads(line)["status"] for line in lines]
    assert statuses == [200, 422, 400, 404]
    assert secret not in "".join(lines)


def test_threads_end_with_the_server(scorer):
    before = {thread.name for thread in threading.enumerate()}
    with running(create_app(scorer)) as address, http(address) as client:
        client.post("/v1/rewards", json=ASK)
    left = [t for t in threading.enumerate() if t.name not in before and t.name.startswith("polar-ft")]
    assert left == []
