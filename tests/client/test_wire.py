"""Contract tests: request and answer bodies in the shapes that SGLang, vLLM and LMDeploy document.

These replay bodies; they are not the engines. A real vLLM is tested in `tests/engines`.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.client.errors import WireError
from polar_ft.client.wire import WIRES, read_rewards, request_body

IDS = [np.array([1, 58, 622], dtype=np.int32), np.array([1, 9], dtype=np.int32)]
LENGTHS = [3, 2]

# Bodies as of SGLang 0.5.23 (POST /classify), vLLM 0.32 and LMDeploy 0.18 (POST /pooling).
SGLANG = """[
  {"embedding": [-0.5703],
   "meta_info": {"id": "a1", "finish_reason": null, "prompt_tokens": 3, "e2e_latency": 0.05}},
  {"embedding": [-11.03],
   "meta_info": {"id": "b2", "finish_reason": null, "prompt_tokens": 2, "e2e_latency": 0.05}}
]"""
VLLM = """{
  "id": "pooling-9f", "object": "list", "created": 1763000000, "model": "internlm/POLAR-7B",
  "data": [
    {"index": 0, "object": "pooling", "data": [[0.25], [1.5], [-0.5703]]},
    {"index": 1, "object": "pooling", "data": [[0.25], [-11.03]]}
  ],
  "usage": {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0, "prompt_tokens_details": null}
}"""
LMDEPLOY = """{
  "id": "pool-7", "object": "list", "created": 1763000000, "model": "internlm/POLAR-7B",
  "data": [{"index": 0, "object": "pooling", "data": -0.5703},
           {"index": 1, "object": "pooling", "data": -11.03}],
  "usage": {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
}"""
SGLANG_MIS = """{
  "scores": [[-0.5703], [-11.03]], "pooled_hidden_states": null, "token_logprobs": null, "model": "default",
  "usage": {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}, "object": "scoring"
}"""
BODIES = {"sglang": SGLANG, "sglang-mis": SGLANG_MIS, "vllm": VLLM, "lmdeploy": LMDEPLOY}


def test_requests():
    assert request_body("sglang", IDS, {}) == {"input_ids": [[1, 58, 622], [1, 9]]}
    assert request_body("vllm", IDS, {"use_activation": False}) == {
        "input": [[1, 58, 622], [1, 9]],
        "use_activation": False,
    }
    assert request_body("lmdeploy", IDS, {}) == {"input": [[1, 58, 622], [1, 9]]}
    json.dumps(request_body("sglang", IDS, {}))  # numpy's numbers are no JSON


@pytest.mark.parametrize("wire", WIRES)
def test_documented_answers(wire):
    assert read_rewards(wire, json.loads(BODIES[wire]), LENGTHS) == [-0.5703, -11.03]


def test_bare_object_of_sglang():
    """A single input, where it is not sent in a list."""
    answer = json.loads(SGLANG)[0]
    assert read_rewards("sglang", answer, [3]) == [-0.5703]
    with pytest.raises(WireError, match="1 answer came for 2 inputs"):
        read_rewards("sglang", answer, LENGTHS)


def test_pooler_of_the_last_token():
    """vLLM gives [s] in place of [[s], …] where the model's task is "classify"."""
    answer = {"data": [{"index": 0, "data": [-2.5]}]}
    assert read_rewards("vllm", answer, [3]) == [-2.5]


@pytest.mark.parametrize("wire", WIRES)
def test_tokens_that_the_engine_cut_or_added(wire):
    """Every format says how many tokens were read."""
    with pytest.raises(WireError, match=r"it says that it read . tokens where . were sent"):
        read_rewards(wire, json.loads(BODIES[wire]), [3, 3])


@pytest.mark.parametrize(
    ("wire", "other", "message"),
    [
        ("sglang", VLLM, "where a list of rewards belongs"),
        ("sglang", LMDEPLOY, "where a list of rewards belongs"),
        ("vllm", SGLANG, 'where an object with "data" belongs'),
        ("vllm", LMDEPLOY, "where a list with a score per token belongs"),
        ("lmdeploy", SGLANG, 'where an object with "data" belongs'),
        ("lmdeploy", VLLM, "the reward is a list of 3 where a number belongs"),
    ],
)
def test_answers_of_another_engine(wire, other, message):
    with pytest.raises(WireError, match=message):
        read_rewards(wire, json.loads(other), LENGTHS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["data", "index", "embedding", "usage", "prompt_tokens", "scores", "meta_info", "x"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@given(
    wire=st.sampled_from(WIRES), answer=VALUES, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3)
)
def test_any_json_is_rewards_or_an_error(wire, answer, lengths):
    try:
        rewards = read_rewards(wire, answer, lengths)
    except WireError:
        return
    assert len(rewards) == len(lengths)
    assert all(type(reward) is float and math.isfinite(reward) for reward in rewards)
