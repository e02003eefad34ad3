"""Schemathesis: whatever fits the server's OpenAPI, and what does not, gets an answer and never a 500."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("POST", "/v1/rewards"),
    ("POST", "/classify"),
    ("POST", "/pooling"),
    ("POST", "/v1/score"),
    ("POST", "/get_reward"),
    ("POST", "/slime"),
]


@pytest.fixture(scope="session")
def described(client):
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json".replace("//openapi", "/openapi"))


def test_the_list_is_complete(described):
    paths = described.raw_schema["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(
        OPERATIONS
    )


@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fits", "does not fit"]
)
@pytest.mark.parametrize(
    ("method", "path"), [operation for operation in OPERATIONS if operation[0] == "POST"]
)
def test_no_request_makes_the_server_fail(described, method, path, mode):
    # Bodies of these are deep, and take a second each to generate.
    examples = 10 if path in ("/get_reward", "/slime") else 40

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=described[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        case.validate_response(case.call(), checks=[not_a_server_error])

    ask()


@pytest.mark.parametrize(("method", "path"), [operation for operation in OPERATIONS if operation[0] == "GET"])
def test_what_takes_no_input_answers(described, method, path):
    case = described[path][method].Case()
    assert case.call().status_code == 200
