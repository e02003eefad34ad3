"""Servers that fail: the result is right, or an error that names the server; never None or another order."""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ft.client import RewardModelClient, RewardServerError, transport
from polar_ft.client.contact import probe_sequences
from tests.client.conftest import make_data
from tests.client.fake_server import Answer, FakeServer, reward_of
from tests.client.test_client import expected


def json_answer(value: Any) -> Answer:
    return Answer(body=json.dumps(value).encode())


def vllm(data: list[Any]) -> Answer:
    return json_answer({"data": [{"index": i, "data": d} for i, d in enumerate(data)]})


def nan(number: int, rewards: list[float]) -> Answer:
    return vllm([[[float("nan")]], *[[[r]] for r in rewards[1:]]])


# What a vLLM may answer in place of thirty rewards, and what the error then says.
WRONG_ANSWERS = {
    "too few": (lambda n, rewards: vllm([[[r]] for r in rewards[1:]]), "29 answers came for 30 inputs"),
    "too many": (lambda n, rewards: vllm([[[r]] for r in [*rewards, 0.0]]), "31 answers came for 30 inputs"),
    "none": (lambda n, rewards: vllm([]), "0 answers came for 30 inputs"),
    "NaN": (nan, "answer 0: the reward is nan"),
    "infinite": (lambda n, rewards: vllm([[[1e999]]] * 30), "the reward is inf"),
    "null": (lambda n, rewards: vllm([[[None]]] * 30), "the reward is null where a number belongs"),
    "text": (lambda n, rewards: vllm([[["-0.5"]]] * 30), "the reward is the string '-0.5'"),
    "true": (lambda n, rewards: vllm([[[True]]] * 30), "the reward is true"),
    "no token": (lambda n, rewards: vllm([[]] * 30), r'"data" is \[\] where a list with a score per token'),
    "an embedding": (lambda n, rewards: vllm([[0.1, 0.2, 0.3]] * 30), "is a reward model served"),
    "two scores": (lambda n, rewards: vllm([[[0.1, 0.9]]] * 30), "is a reward model served"),
    "a float": (lambda n, rewards: vllm([-1.5] * 30), '"data" is the number -1.5'),
    "the same index": (
        lambda n, rewards: json_answer({"data": [{"index": 0, "data": [[r]]} for r in rewards]}),
        "its answers have the indices a list of 30, not 0 to 29",
    ),
    "tokens cut": (
        lambda n, rewards: json_answer(
            {"data": [{"data": [[r]]} for r in rewards], "usage": {"prompt_tokens": 7}}
        ),
        "it says that it read 7 tokens where",
    ),
    "no data": (lambda n, rewards: json_answer({"object": "list"}), 'where an object with "data" belongs'),
    "a list": (lambda n, rewards: json_answer(rewards), 'where an object with "data" belongs'),
    "HTML": (lambda n, rewards: Answer(body=b"<html>hello</html>"), "its answer is not JSON"),
    "nothing": (lambda n, rewards: Answer(body=b""), "its answer is not JSON"),
    "half JSON": (lambda n, rewards: Answer(body=b'{"data": [{"index": 0, "da'), "its answer is not JSON"),
    "no UTF-8": (lambda n, rewards: Answer(body=b'{"data": "\xff\xfe"}'), "its answer is not JSON"),
    "deep JSON": (lambda n, rewards: Answer(body=b"[" * 100_000), "its answer is not JSON"),
    "a long number": (lambda n, rewards: Answer(body=b'{"data": ' + b"9" * 5000 + b"}"), "its answer is not"),
    "a redirect": (lambda n, rewards: Answer(302, headers={"Location": "http://127.0.0.1:9/"}), "HTTP 302"),
    "no content": (lambda n, rewards: Answer(204), "HTTP 204"),
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_a_wrong_answer_is_an_error_at_once(serve, connect, data, name):
    """Not retried: a garbled answer is no accident of the network, and must not be used quietly."""
    fault, message = WRONG_ANSWERS[name]
    server = serve("vllm", fault)
    with pytest.raises(RewardServerError, match=message) as caught:
        connect(server)(data)
    assert caught.value.server == server.address
    assert server.address in str(caught.value)
    assert server.n_requests == 1


@pytest.mark.parametrize("engine", ["vllm", "lmdeploy"])
def test_answers_are_put_in_the_order_of_their_indices(serve, connect, template, data, engine):
    server = serve(engine)
    right = server.payload

    def shuffled(*args: Any) -> Any:
        payload = right(*args)
        payload["data"].reverse()
        return payload

    server.payload = shuffled
    assert connect(server)(data) == expected(template, data)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 500])
def test_other_statuses_are_not_retried(serve, connect, data, status):
    body = json.dumps({"error": {"message": "the input is too long"}}).encode()
    server = serve("sglang", lambda number, rewards: Answer(status, body))
    with pytest.raises(
        RewardServerError, match=f"{server.address}: HTTP {status}: the input is too"
    ) as caught:
        connect(server)(data)
    assert (caught.value.status, server.n_requests) == (status, 1)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_retried_until_it_answers(serve, connect, template, data, status):
    server = serve("lmdeploy", lambda number, rewards: Answer(status) if number < 2 else None)
    assert connect(server)(data) == expected(template, data)
    assert server.n_requests == 3


@pytest.mark.parametrize("answer", [Answer(reset=True), Answer(half=True), Answer(503)])
def test_gives_up_with_the_reason(serve, connect, data, answer):
    server = serve("sglang", lambda number, rewards: answer)
    with pytest.raises(RewardServerError, match=f"{server.address}: no answer after 3 tries") as caught:
        connect(server)(data)
    assert ("HTTP 503" in str(caught.value)) == (answer.status == 503)
    assert server.n_requests == 3


def test_retry_after_is_honoured(serve, connect, template, data):
    """A busy server is left alone for as long as it says, and asked no oftener than it says."""
    times: list[float] = []

    def busy(number: int, rewards: list[float]) -> Answer | None:
        times.append(time.monotonic())
        return Answer(429, headers={"Retry-After": "1"}) if number == 0 else None

    server = serve("sglang", busy)
    assert connect(server)(data) == expected(template, data)
    assert len(times) == 2
    assert times[1] - times[0] >= 1.0


def test_waiting_for_its_turn_is_no_waiting_for_servers(serve, connect, template):
    """Ten requests, one at a time: the ninth breaks off once, long after max_wait, and is tried again."""

    def fault(number: int, rewards: list[float]) -> Any:
        return Answer(reset=True) if number == 8 else time.sleep(0.1)

    data = [{"prompt": "Q?", "reference": "r", "output": f"Answer {i}"} for i in range(10)]
    client = connect(serve(fault=fault), concurrency=1, tokens_per_request=1, max_wait=0.3)
    assert client(data) == expected(template, data)


def test_busy_is_no_failure_but_has_an_end(serve, connect, data):
    """429 does not count against max_retries; after max_wait seconds it is enough."""
    server = serve("sglang", lambda number, rewards: Answer(429))
    client = connect(server, max_wait=1.0, max_retries=1)
    client.servers()
    with pytest.raises(RewardServerError, match="gave up waiting; HTTP 429"):
        client(data)
    assert server.n_requests > 2


def test_a_wait_longer_than_allowed_is_reported_at_once(serve, connect, data):
    server = serve("sglang", lambda number, rewards: Answer(429, headers={"Retry-After": "3600"}))
    start = time.monotonic()
    with pytest.raises(RewardServerError, match="gave up waiting; HTTP 429"):
        connect(server)(data)
    assert time.monotonic() - start < 5


def test_slow_server(serve, connect, template, data):
    """It is given up after the time-out, and the other server takes the request."""
    never = threading.Event()
    slow = serve("sglang", lambda number, rewards: Answer(wait=never))
    well = serve("sglang")
    client = connect(slow, well, timeout=0.5, tokens_per_request=300, concurrency=1)
    try:
        assert client(data) == expected(template, data)
        with pytest.raises(RewardServerError, match=r"no answer within 0.5 s \(timeout\)"):
            connect(slow, timeout=0.5, max_retries=1)(data)
    finally:
        never.set()


def test_dripping_server(serve, connect, data):
    """A byte now and then is no answer: the time-out is for the complete request."""
    server = serve("sglang")
    stop = threading.Event()

    def drip(status: int, payload: Any) -> None:
        while not stop.wait(0.05):
            pass

    server.payload = lambda *args: stop.wait(10) or []
    del drip
    try:
        with pytest.raises(RewardServerError, match="timeout"):
            connect(server, timeout=0.3, max_retries=1, check_raw=False)(data)
    finally:
        stop.set()


def test_one_of_three_down(serve, connect, template, caplog):
    data = make_data(90)
    servers = [serve("sglang") for _ in range(3)]
    servers[1].stop()
    with caplog.at_level(logging.WARNING, "polar_ft.client"):
        rewards = connect(*servers, tokens_per_request=300)(data)
    assert rewards == expected(template, data)
    assert servers[1].address in caplog.text
    assert servers[0].n_requests
    assert servers[2].n_requests


def test_killed_mid_request(serve, connect, template):
    """Connections are reset while requests are under way, and none is taken any more."""
    data = make_data(60)
    dying = serve("vllm")

    def die(number: int, rewards: list[float]) -> Answer | None:
        if number < 2:
            return None
        threading.Thread(target=dying.stop).start()
        return Answer(reset=True)

    dying.fault = die
    assert connect(dying, serve("vllm"), tokens_per_request=200)(data) == expected(template, data)


def test_all_down(serve, connect, data):
    servers = [serve("sglang") for _ in range(2)]
    for server in servers:
        server.stop()
    with pytest.raises(RewardServerError) as caught:
        connect(*servers)(data)
    assert all(str(caught.value).count(server.address) >= 1 for server in servers)


def test_servers_says_which_one_is_down(serve, connect):
    down = serve("sglang")
    down.stop()
    both = connect(down, serve("vllm")).servers()
    assert [profile and profile.engine for profile in both] == [None, "vllm"]
    with pytest.raises(RewardServerError, match=down.address):
        connect(down).servers()


def test_comes_back(serve, connect, template, data):
    """A server that was restarted is contacted again and used again."""
    server = serve("sglang")
    client = connect(server, max_retries=50)
    assert client(data) == expected(template, data)
    server.stop()
    later = threading.Timer(0.2, lambda: serve("sglang", port=server.port))
    later.start()
    assert client(data) == expected(template, data)
    later.join()


def test_comes_back_with_another_model(serve, connect, data, monkeypatch):
    """Restarted while nobody asked it, so that no request failed."""
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.0)
    server = serve("sglang")
    client = connect(server, max_retries=50)
    client(data)
    server.stop()
    serve("sglang", port=server.port, reward=lambda ids: reward_of(ids) + 3)
    with pytest.raises(RewardServerError, match=r"scores a known input .* where it scored it before"):
        client(data)


def test_expired_key(serve, connect, data):
    """Nobody else is asked: the key is wrong for all."""
    server = serve("sglang", key="new")
    other = serve("sglang", key="new")
    with pytest.raises(RewardServerError, match=r"HTTP 401: Unauthorized .*POLAR_API_KEY") as caught:
        connect(server, other, api_key="expired-secret")(data)
    assert caught.value.status == 401
    assert "expired-secret" not in str(caught.value)


def test_key_that_expires_later(serve, connect, data):
    server = serve("sglang", key="k")
    client = connect(server, api_key="k")
    client(data)
    server.key = "other"
    with pytest.raises(RewardServerError, match="HTTP 401"):
        client(data)


def test_input_longer_than_the_server_takes(serve, connect):
    """BOS, prompt, separator, prompt, reward token: 1 + 300 + 1 + 300 + 1 tokens."""
    server = serve("vllm", card={"max_model_len": 500})
    row = {"prompt": "p" * 300, "reference": "", "output": ""}
    with pytest.raises(RewardServerError, match="takes inputs of at most 500 tokens, and one has 603"):
        connect(server)([row])
    assert server.n_requests == 0


FAULTS = {
    "right": None,
    "reset": Answer(reset=True),
    "half": Answer(half=True),
    "502": Answer(502),
    "503": Answer(503, headers={"Retry-After": "0"}),
    "429": Answer(429),
    "400": Answer(400),
    "500": Answer(500),
    "not JSON": Answer(body=b"Internal Server Error"),
    "no rewards": json_answer([]),
    "null": json_answer(None),
    "one missing": "one missing",
    "dies": "dies",
}
# Mostly well, so that long runs of a client are reached too.
SCHEDULES = st.lists(
    st.one_of(st.just("right"), st.just("right"), st.sampled_from(sorted(FAULTS))), max_size=8
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    schedules=st.lists(SCHEDULES, min_size=1, max_size=3),
    engine=st.sampled_from(["sglang", "vllm", "lmdeploy"]),
    n_rows=st.integers(1, 25),
    tokens_per_request=st.sampled_from([150, 400, 32768]),
)
def test_right_or_an_error_that_names_the_server(
    tokenizer_dir, template, schedules, engine, n_rows, tokens_per_request
):
    data = make_data(n_rows)
    known = [ids.tolist() for ids in probe_sequences(template)]
    servers = [FakeServer(engine, known=known) for _ in schedules]
    for server, schedule in zip(servers, schedules, strict=True):
        server.fault = _planned(server, schedule)
    client = RewardModelClient(
        tokenizer_dir,
        server_address=[server.address for server in servers],
        max_retries=3,
        retry_delay=0.002,
        max_wait=5.0,
        tokens_per_request=tokens_per_request,
        concurrency=2,
    )
    rewards, problem = None, None
    try:
        with client:
            rewards = client(data)
    except RewardServerError as error:
        problem = str(error)
    finally:
        for server in servers:
            server.stop()
    if problem is None:
        assert rewards == expected(template, data)
    else:
        assert any(server.address in problem for server in servers)
        assert {fault for schedule in schedules for fault in schedule} - {"right"}


def _planned(server: FakeServer, schedule: list[str]) -> Any:
    def fault(number: int, rewards: list[float]) -> Any:
        name = schedule[number] if number < len(schedule) else "right"
        if name == "one missing":
            payload = server.payload("/classify" if server.engine == "sglang" else "/pooling", [[1]], [0.5])
            return json_answer(payload) if len(rewards) != 1 else None
        if name == "dies":
            threading.Thread(target=server.stop).start()
            return Answer(reset=True)
        return FAULTS[name]

    return fault
