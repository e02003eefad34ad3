"""What OpenRLHF and slime send: thoughts are removed, no answer gets the measured floor, and limits hold."""

from __future__ import annotations

import json
import logging
import time

import pytest

from polar_ft.data.answers import Thinking
from polar_ft.data.responses import END_TOKENS, without_end
from polar_ft.reward_scale import RewardScale
from polar_ft.serving.app import create_app
from polar_ft.serving.limits import Limits
from polar_ft.serving.telemetry import JsonFormatter
from tests.serving.conftest import http
from tests.serving.test_app import message
from tests.serving.tiny import running

QUESTION, REFERENCE = "What is the capital of China?", "Beijing."
LABEL = {"prompt": [{"role": "user", "content": QUESTION}], "reference": REFERENCE, "source": "ignored"}
TEMPLATED = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
ANSWERS = ["Shanghai.", "It is Beijing.", "北京。"]
FLOOR = -14.0


def openrlhf(*outputs: str, prompt: str = TEMPLATED, label: object = LABEL) -> dict:
    queries = [f"{prompt}{output}<|im_end|>\n<|endoftext|>" for output in outputs]
    return {"query": queries, "prompts": [prompt] * len(outputs), "labels": [label] * len(outputs)}


def slime(output: str, prompt: object = TEMPLATED, label: object = LABEL) -> dict:
    return {"prompt": prompt, "response": f"{output}<|im_end|>", "label": label}


@pytest.fixture
def floor(model_folder):
    """By hand: 1st percentile −12, minus a deviation of 2."""
    file = RewardScale(centre=-6.0, spread=2.0, quantiles={"p01": -12.0}).save(model_folder)
    yield
    file.unlink()


@pytest.fixture(scope="module")
def expected(scorer):
    rows = [{"prompt": QUESTION, "reference": REFERENCE, "output": answer} for answer in ANSWERS]
    return pytest.approx(scorer.score(rows), abs=2e-5)


def test_openrlhf(client, expected):
    first, *others = ANSWERS
    outputs = [f"<think>Hm. {REFERENCE}</think>\n\n{first}", *others]
    answer = client.post("/get_reward", json=openrlhf(*outputs)).json()
    assert answer["rewards"] == expected
    assert answer["scores"] == answer["rewards"]
    mean_length = sum(map(len, ANSWERS)) / 3
    assert answer["extra_logs"] == {"answered": 1.0, "truncated": 0.0, "length": pytest.approx(mean_length)}


def test_slime(client, expected):
    answers = [client.post("/slime", json=slime(f"<think>Hm.</think>{text}")) for text in ANSWERS]
    assert [answer.json() for answer in answers] == expected
    assert client.post("/slime", json=slime(ANSWERS[0], prompt=LABEL["prompt"])).json() == pytest.approx(
        expected.expected[0], abs=2e-5
    )


def test_several_references_give_the_greatest(client, scorer):
    references = ["Shanghai.", "北京。"]
    rows = [{"prompt": QUESTION, "reference": text, "output": "It is."} for text in references]
    label = {"prompt": QUESTION, "reference": None, "references": references}
    right = pytest.approx(max(scorer.score(rows)), abs=2e-5)
    assert client.post("/get_reward", json=openrlhf("It is.", label=label)).json()["rewards"] == [right]
    assert client.post("/slime", json=slime("It is.", label=label)).json() == right


NO_ANSWER = ["<think>It is Beijing", "", "<think>a</think>", "<think>a</think>b<think>c"]


@pytest.mark.parametrize("output", NO_ANSWER)
def test_no_answer_gets_the_floor_and_is_counted(client, expected, floor, output):
    counter = 'polar_ft_unanswered_total{{route="{}"}} {}'.format

    def counted(route: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        start = counter(route, "")
        return next((float(line.removeprefix(start)) for line in lines if line.startswith(start)), 0.0)

    before = counted("/get_reward"), counted("/slime")
    answer = client.post("/get_reward", json=openrlhf(ANSWERS[0], output, *ANSWERS[1:])).json()
    assert answer["rewards"].pop(1) == FLOOR
    assert answer["rewards"] == expected
    assert answer["extra_logs"]["answered"] == 0.75
    assert client.post("/get_reward", json=openrlhf(output)).json()["rewards"] == [FLOOR]
    assert client.post("/slime", json=slime(output)).json() == FLOOR
    assert (counted("/get_reward") - before[0], counted("/slime") - before[1]) == (2, 1)


def test_without_a_measured_floor_no_answer_is_refused(client, model_folder):
    for path, body in (("/get_reward", openrlhf("Yes.", "<think>")), ("/slime", slime("<think>"))):
        response = client.post(path, json=body)
        assert response.status_code == 400
        assert "polar-ft calibrate" in message(response)
        assert str(model_folder) not in message(response)
    assert "output 1 has no answer" in message(client.post("/get_reward", json=openrlhf("Yes.", "<think>")))


def test_a_prompt_that_opens_the_tag(client, floor, expected):
    """As Qwen3's and DeepSeek's templates do: without a closing tag everything is thought."""
    opened = f"{TEMPLATED}<think>\n"
    answer = client.post(
        "/get_reward", json=openrlhf(f"Hm.</think>{ANSWERS[0]}", "Hm.", prompt=opened)
    ).json()
    assert answer["rewards"] == [pytest.approx(expected.expected[0], abs=2e-5), FLOOR]
    assert client.post("/slime", json=slime("Hm.", prompt=opened)).json() == FLOOR
    assert client.post("/slime", json=slime("Hm.")).json() != FLOOR


def test_other_tags(scorer, floor, expected):
    app = create_app(scorer, thinking=Thinking("[T]", "[/T]", opened_by_prompt=True))
    with running(app) as address, http(address) as client:
        assert client.post("/slime", json=slime("Hm.")).json() == FLOOR
        reward = client.post("/slime", json=slime(f"<think>[/T]{ANSWERS[0]}")).json()
        assert reward == pytest.approx(expected.expected[0], abs=2e-5)


def test_a_prompt_that_was_cut(client, expected):
    """OpenRLHF keeps the end of a prompt that is too long."""
    body = openrlhf(*ANSWERS)
    body["query"] = [query[30:] for query in body["query"]]
    assert client.post("/get_reward", json=body).json()["rewards"] == expected


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (
            "/get_reward",
            {**openrlhf("a"), "query": ["other"]},
            400,
            "query[0]: does not begin with its prompt",
        ),
        ("/get_reward", {**openrlhf("a"), "query": []}, 422, "query: List should have at least 1 item"),
        ("/get_reward", {**openrlhf("a", "b"), "labels": [LABEL]}, 422, "must have the same length"),
        ("/get_reward", openrlhf("a", label=None), 422, 'labels[0]: must be {"prompt": …, "reference": …}'),
        ("/get_reward", openrlhf("a", label="4"), 422, 'labels[0]: must be {"prompt": …, "reference": …}'),
        ("/get_reward", openrlhf("a", label={"prompt": "p"}), 422, 'must have "reference" or "references"'),
        (
            "/get_reward",
            openrlhf("a", label={"prompt": 7, "reference": "r"}),
            422,
            "labels[0].prompt: must be",
        ),
        ("/get_reward", {"query": "a", "prompts": ["a"], "labels": [LABEL]}, 422, "query: Input should be"),
        ("/slime", slime("a", label=None), 422, 'label: must be {"prompt": …, "reference": …}'),
        ("/slime", {"prompt": "a", "response": "b"}, 422, "label: Field required"),
        ("/slime", {"prompt": "a", "response": None, "label": LABEL}, 422, "response: Input should be"),
    ],
)
def test_what_cannot_be_scored_is_named(client, path, body, status, says):
    response = client.post(path, json=body)
    assert response.status_code == status
    assert says in message(response)


def test_labels_are_counted_before_they_are_validated(client, monkeypatch):
    monkeypatch.setattr("polar_ft.serving.bodies.MAX_CANDIDATES", 3)
    of_two = {"prompt": "p", "references": ["r", "s"]}
    for path, body in (
        ("/get_reward", openrlhf(*"abcd")),
        ("/get_reward", openrlhf(*"ab", label=of_two)),
        ("/slime", slime("a", label={**of_two, "references": ["r"] * 4})),
    ):
        assert client.post(path, json=body).status_code == 413, body
    assert client.post("/get_reward", json=openrlhf(*"abc")).status_code == 200


def test_ten_faults_are_listed(client):
    response = client.post("/get_reward", json=openrlhf(*["a"] * 2000, label={"reference": "r"}))
    assert response.status_code == 422
    assert message(response).count("; ") == 9
    assert message(response).endswith(" (and more)")


def test_texts_and_bodies_are_bounded(client, scorer):
    long = client.post("/slime", json=slime("a" * 4801))
    assert (long.status_code, message(long)[:27]) == (413, "candidates[0] has 4801 byte")
    limits = Limits(max_body=2000)
    with running(create_app(scorer, limits=limits)) as address, http(address) as small:
        assert small.post("/slime", json=slime("a" * 2000)).status_code == 413
        assert small.post("/get_reward", json=openrlhf("a" * 2000)).status_code == 413


def test_hostile_outputs_take_no_time():
    """Quadratic in the length, these would take hours."""
    started = time.monotonic()
    assert without_end("a" + "".join(END_TOKENS) * 50_000) == "a"
    assert Thinking().answer("<think>" * 500_000 + "</think>" * 500_000) is None
    assert time.monotonic() - started < 5


def test_logs_hold_no_text_of_users(client, caplog, floor):
    secret = "hunter2-passw0rd"
    label = {"prompt": secret, "reference": secret}
    with caplog.at_level(logging.INFO):
        client.post("/get_reward", json=openrlhf(secret, f"<think>{secret}", label=label))
        client.post("/slime", json=slime(secret, prompt=secret, label={secret: secret}))
        for _ in range(100):  # logged after the answer was sent
            records = [record for record in caplog.records if record.name == "polar_ft.serving"]
            if len(records) >= 2:
                break
            time.sleep(0.05)
    lines = [JsonFormatter().format(record) for record in records]
    assert [json.loads(line)["status"] for line in lines] == [200, 422]
    assert json.loads(lines[0])["unanswered"] == 1
    assert secret not in "".join(lines)
