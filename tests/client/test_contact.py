"""First contact: which engine, and whether its scores are raw rewards."""

from __future__ import annotations

import pytest

from polar_ft.client import RewardServerError
from polar_ft.client.commands import served_model
from polar_ft.client.contact import probe_sequences
from polar_ft.errors import PolarError
from tests.client.fake_server import reward_of, sigmoid
from tests.client.test_client import expected


@pytest.mark.parametrize(
    ("engine", "name", "wire"),
    [
        ("sglang", "SGLang 0.5.23", "sglang"),
        ("vllm", "vLLM 0.32.0", "vllm"),
        ("lmdeploy", "LMDeploy", "lmdeploy"),
        ("polar_ft", "polar-ft serve", "sglang"),
    ],
)
def test_which_engine(serve, connect, engine, name, wire):
    (profile,) = connect(serve(engine, card={"max_model_len": 9000})).servers()
    assert (profile.name, profile.wire, profile.model) == (name, wire, "polar-tiny")
    assert profile.max_tokens == 9000


def test_contact_is_made_once(serve, connect, data):
    server = serve("sglang")
    client = connect(server)
    for _ in range(3):
        client(data)
    assert len(server.bodies) == 3 + 1


def test_unknown_engine_has_to_be_named(serve, connect, template, data):
    server = serve("unknown")
    with pytest.raises(RewardServerError, match=r"does not say which engine it is .*server_type='sglang'"):
        connect(server)(data)
    # With its name the client takes its word, and the scores have to speak for themselves.
    assert connect(server, server_type="vllm")(data) == expected(template, data)


def test_another_engine_than_named(serve, connect, data):
    with pytest.raises(RewardServerError, match="is vLLM, not SGLang; say server_type='vllm'"):
        connect(serve("vllm"), server_type="sglang")(data)


def small(ids: list[int]) -> float:
    """Rewards of a model whose known inputs all score between 0 and 1, as those of a sigmoid do."""
    return 0.05 + (sum(ids) % 90) / 100


@pytest.mark.parametrize("reward", [reward_of, small])
@pytest.mark.parametrize(
    ("activation", "switch"), [("switch", "use_activation"), ("old switch", "activation"), ("none", None)]
)
def test_vllm_is_told_to_leave_the_activation_out(serve, connect, data, reward, activation, switch):
    server = serve("vllm", activation=activation, reward=reward)
    client = connect(server)
    if (activation, reward) == ("none", small):
        # No switch changes anything, and the scores might be a sigmoid's: no evidence, no use.
        with pytest.raises(RewardServerError, match="no switch shows otherwise"):
            client(data)
        return
    assert client(data) == [reward(ids) for ids in server.scored]
    if switch is not None:
        assert server.bodies[-1][switch] is False


@pytest.mark.parametrize("reward", [reward_of, small])
def test_vllm_that_always_applies_a_sigmoid(serve, connect, data, reward):
    server = serve("vllm", activation="sigmoid", reward=reward)
    with pytest.raises(RewardServerError, match="as a sigmoid's are") as caught:
        connect(server)(data)
    message = str(caught.value)
    assert server.address in message
    assert "vLLM 0.32.0" in message
    assert "vllm serve MODEL --runner pooling" in message
    assert """--pooler-config '{"use_activation": false}'""" in message


@pytest.mark.parametrize("engine", ["sglang", "lmdeploy"])
def test_other_engines_with_an_activation(serve, connect, data, engine):
    for activation, message in (
        ("sigmoid", "as a sigmoid's are"),
        ("softmax", "as a softmax over one class"),
    ):
        with pytest.raises(RewardServerError, match=message):
            connect(serve(engine, activation=activation))(data)


def test_softmax_of_vllm(serve, connect, data):
    with pytest.raises(RewardServerError, match="gives 1 for every input"):
        connect(serve("vllm", activation="softmax"))(data)


def test_embedded_server_needs_no_evidence(serve, connect, data):
    """It has no activation."""
    server = serve("polar_ft", reward=small)
    assert connect(server)(data) == [small(ids) for ids in server.scored]


@pytest.mark.parametrize("named", ["sglang", "vllm", "lmdeploy"])
def test_embedded_server_stands_for_any_engine(serve, connect, data, template, named):
    server = serve("polar_ft")
    assert connect(server, server_type=named)(data) == expected(template, data)


def test_check_can_be_left_out(serve, connect, data):
    server = serve("sglang", reward=small)
    assert connect(server, check_raw=False)(data) == [small(ids) for ids in server.scored]
    assert len(server.bodies) == 1
    # vLLM's switch is sent all the same.
    server = serve("vllm")
    assert connect(server, check_raw=False)(data) == [reward_of(ids) for ids in server.scored]


def test_fixed_point_of_the_sigmoid(serve, connect, data):
    """0.659 is its own sigmoid: equal scores with and without activation prove nothing."""
    server = serve("vllm", activation="none", reward=lambda ids: 0.659 + (sum(ids) % 7) / 1000)
    with pytest.raises(RewardServerError, match="no switch shows otherwise"):
        connect(server)(data)
    assert sigmoid(0.659) == pytest.approx(0.659, abs=1e-3)


def test_constant_scores(serve, connect, data):
    with pytest.raises(RewardServerError, match=r"gives -2 for each of 8 different inputs.*v_head"):
        connect(serve("sglang", reward=lambda ids: -2.0))(data)


def test_servers_with_different_models(serve, connect, data):
    servers = [serve("sglang"), serve("sglang", reward=lambda ids: reward_of(ids[:-2]))]
    client = connect(*servers)
    with pytest.raises(RewardServerError, match="is it the same model") as caught:
        client.servers()
    assert all(server.address in str(caught.value) for server in servers)


def test_servers_that_differ_by_rounding(serve, connect, data):
    """3 in 1000, as between engines in bf16."""
    servers = [serve("sglang"), serve("vllm", reward=lambda ids: 1.003 * reward_of(ids))]
    assert len(connect(*servers).servers()) == 2


def test_known_inputs_differ(template):
    known = {tuple(ids.tolist()) for ids in probe_sequences(template)}
    assert len(known) == 8
    assert all(ids[-1] == template.reward_token_id for ids in known)


def test_another_template_is_reported(serve, connect, data, template, caplog):
    connect(serve("polar_ft", card={"template": template.fingerprint})).servers()
    assert "another tokenizer" not in caplog.text
    connect(serve("polar_ft", card={"template": "0" * 16})).servers()
    assert "another tokenizer" in caplog.text


def test_served_model(serve, tokenizer_dir):
    assert served_model(serve(card={"root": str(tokenizer_dir)}).address) == str(tokenizer_dir)
    assert served_model(serve(card={"root": "internlm/POLAR-7B"}).address) == "internlm/POLAR-7B"
    with pytest.raises(PolarError, match="name the model's folder with --model"):
        served_model(serve().address)
    with pytest.raises(PolarError, match="not on this machine"):
        served_model(serve(card={"root": "/no/such/folder"}).address)
    with pytest.raises(RewardServerError, match="HTTP 401"):
        served_model(serve(key="k").address)
