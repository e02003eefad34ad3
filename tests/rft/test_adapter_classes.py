"""Adapters that build on a class of their framework, called as the framework calls them.

The frameworks are not in this environment: each stands in with the few names that its adapter imports, and
`make test-rft` runs those that can be installed.
"""

from __future__ import annotations

import asyncio
import importlib
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from polar_ft.client.errors import RewardServerError
from polar_ft.errors import PolarError
from polar_ft.rft.xtuner import make_reward_handler
from tests.rft.test_adapters import FLOOR, OUTPUTS, QUESTION, REFERENCE, rewards, settings  # noqa: F401

LABEL = {"prompt": QUESTION, "reference": "4"}
AWAY = {"server_address": "127.0.0.1:9", "floor": FLOOR, "max_wait": 0.2}


@pytest.fixture
def adapter(monkeypatch):
    """Imports an adapter with stand-ins for its framework's modules."""

    def load(name: str, modules: dict[str, dict[str, Any]]) -> ModuleType:
        for path, names in modules.items():
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                part = ".".join(parts[:end])
                if part not in sys.modules:
                    monkeypatch.setitem(sys.modules, part, ModuleType(part))
            vars(sys.modules[path]).update(names)
        monkeypatch.delitem(sys.modules, f"polar_ft.rft.{name}", raising=False)
        module = importlib.import_module(f"polar_ft.rft.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # taken out again afterwards
        return module

    return load


class RLVRWorkflow:
    """The part of AReaL's workflow (areal/workflow/rlvr.py) that concerns rewards."""

    def __init__(self, reward_fn, gconfig):
        self.reward_fn = reward_fn
        self.async_reward_fn = None  # AReaL's wrapper with the time-out

    async def score(self, completion, row):
        return await self.async_reward_fn("the templated prompt", completion, [1], [2], **row)


@pytest.fixture
def areal(adapter):
    return adapter("areal", {"areal.workflow.rlvr": {"RLVRWorkflow": RLVRWorkflow}})


ROW = {"messages": QUESTION, "reference": "4", "question": "another column", "prompt": "another"}


def test_areal_workflow(areal, settings, rewards):  # noqa: F811
    workflow = areal.PolarWorkflow(reward=settings, gconfig=None)

    async def episodes():
        return await asyncio.gather(*(workflow.score(f"{output}<|im_end|>", ROW) for output in OUTPUTS))

    assert asyncio.run(episodes()) == rewards
    with pytest.raises(PolarError, match="AReaL asks for one sample at a time"):
        areal.PolarWorkflow(reward={**settings, "normalise": "group"}, gconfig=None)


def test_areal_reward_fn_can_be_sent_to_a_process(areal, settings, rewards):  # noqa: F811
    reward_fn = pickle.loads(pickle.dumps(areal.make_reward_fn(**settings)))
    found = [reward_fn("the templated prompt", f"{output}<|im_end|>", [1], [2], **ROW) for output in OUTPUTS]
    assert found == rewards


def test_areal_never_gets_a_time_out_of_the_adapter(areal, tokenizer_dir):
    """It would take it for its own, and 0 for the reward."""
    reward_fn = areal.make_reward_fn(str(tokenizer_dir), **{**AWAY, "max_wait": 60.0}, timeout_seconds=0.5)
    with pytest.raises(PolarError, match=r"no reward within 0\.4 s") as raised:
        reward_fn("p", "a", [1], [2], **ROW)
    assert not isinstance(raised.value, TimeoutError)
    workflow = areal.PolarWorkflow(reward={"model": str(tokenizer_dir), **AWAY}, gconfig=None)
    with pytest.raises(RewardServerError):
        asyncio.run(workflow.score("a", ROW))


class EnvironmentReturn(SimpleNamespace):
    pass


@pytest.fixture
def nemo_rl(adapter):
    environments: dict[str, str] = {}
    return adapter(
        "nemo_rl",
        {
            "ray": {"remote": lambda cls: cls},
            "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": {}},
            "nemo_rl.distributed.virtual_cluster": {"PY_EXECUTABLES": SimpleNamespace(SYSTEM="python")},
            "nemo_rl.environments.interfaces": {
                "EnvironmentInterface": object,
                "EnvironmentReturn": EnvironmentReturn,
                "Tensor": torch.Tensor,
            },
            "nemo_rl.environments.utils": {"register_env": environments.__setitem__},
        },
    )


def conversation(output):
    return [{"role": "user", "content": "templated"}, {"role": "assistant", "content": output}]


def test_nemo_rl(nemo_rl, settings, rewards):  # noqa: F811
    environment = nemo_rl.PolarEnvironment(settings)
    metadata = [LABEL, {"ground_truth": LABEL}, LABEL]
    found = asyncio.run(environment.step(list(map(conversation, OUTPUTS)), metadata, True))
    assert found.rewards.tolist() == rewards
    assert found.rewards.dtype == torch.float32
    assert found.terminateds.tolist() == [True] * 3
    assert found.terminateds.dtype == torch.bool
    assert found.answers == OUTPUTS
    assert found.metadata == metadata
    assert len(found.observations) == len(found.next_stop_strings) == 3
    (single,) = asyncio.run(environment.step([conversation(OUTPUTS[0])], [LABEL])).rewards.tolist()
    assert [single, *found.rewards.tolist()[1:]] == rewards


def test_nemo_rl_normalises_batches(nemo_rl, settings):  # noqa: F811
    environment = nemo_rl.PolarEnvironment({**settings, "normalise": "group"})
    found = asyncio.run(environment.step(list(map(conversation, OUTPUTS)), [LABEL] * 3)).rewards
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std().item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(PolarError, match="NeMo-RL's asynchronous engine asks for one sample at a time"):
        asyncio.run(environment.step([conversation("4")], [LABEL]))


def test_nemo_rl_registers_its_environment(nemo_rl):
    nemo_rl.register()
    place = "polar_ft.rft.nemo_rl.PolarEnvironment"
    assert nemo_rl.register_env.__self__ == {"polar": place}
    assert dict(nemo_rl.ACTOR_ENVIRONMENT_REGISTRY) == {place: "python"}


def test_nemo_rl_server_away(nemo_rl, tokenizer_dir):
    environment = nemo_rl.PolarEnvironment({"model": str(tokenizer_dir), **AWAY})
    for count in (1, 2):
        with pytest.raises(RewardServerError):
            asyncio.run(environment.step([conversation("4")] * count, [LABEL] * count))


@pytest.fixture
def trinity(adapter):
    return adapter("trinity", {"trinity.common.rewards": {"RewardFn": object}})


def test_trinity(trinity, settings, rewards):  # noqa: F811
    reward_fn = trinity.PolarRewardFn(**settings)
    found = [reward_fn(response=output, truth=LABEL) for output in OUTPUTS]
    assert [sum(one.values()) for one in found] == rewards  # Trinity adds up the values
    with pytest.raises(PolarError, match="Trinity-RFT asks for one sample at a time"):
        trinity.PolarRewardFn(**settings, normalise="batch")


def test_trinity_server_away(trinity, tokenizer_dir):
    with pytest.raises(RewardServerError):
        trinity.PolarRewardFn(model=str(tokenizer_dir), **AWAY)(response="4", truth=LABEL)


@pytest.fixture
def verifiers(adapter):
    def reward(function, weight):
        function.weight = weight
        return function

    return adapter("verifiers", {"verifiers.v1": {"reward": reward}})


class Message(SimpleNamespace):
    def model_dump(self, include):
        return {name: vars(self)[name] for name in include}


def test_verifiers(verifiers, settings, rewards):  # noqa: F811
    polar = verifiers.make_reward(**settings, weight=0.5)
    assert (polar.__name__, polar.weight) == ("polar", 0.5)
    question = Message(role="user", content="2 + 2?")
    for prompt in ("2 + 2?", [question]):
        task = SimpleNamespace(data=SimpleNamespace(prompt=prompt, reference="4"))
        traces = [SimpleNamespace(assistant_messages=[Message(content=output)]) for output in OUTPUTS]
        assert [asyncio.run(polar(task, trace)) for trace in traces] == rewards
    # Nothing came: the floor.
    assert asyncio.run(polar(task, SimpleNamespace(assistant_messages=[]))) == FLOOR


def test_verifiers_server_away(verifiers, tokenizer_dir):
    polar = verifiers.make_reward(str(tokenizer_dir), **AWAY)
    task = SimpleNamespace(data=SimpleNamespace(prompt="2 + 2?", reference="4"))
    with pytest.raises(RewardServerError):
        asyncio.run(polar(task, SimpleNamespace(assistant_messages=[Message(content="4")])))


def test_xtuner(settings, rewards):  # noqa: F811
    handler = make_reward_handler(**settings)
    assert asyncio.iscoroutinefunction(handler)  # else xtuner calls it without awaiting

    async def rollouts():
        calls = (handler(response=f"{o}<|im_end|>", label=LABEL, extra_info={}) for o in OUTPUTS)
        return await asyncio.gather(*calls)

    assert [found["score"] for found in asyncio.run(rollouts())] == rewards
    with pytest.raises(PolarError, match="xtuner's judger asks for one sample at a time"):
        make_reward_handler(**settings, normalise="group")


def test_xtuner_server_away(tokenizer_dir):
    handler = make_reward_handler(str(tokenizer_dir), **AWAY)
    with pytest.raises(RewardServerError):
        asyncio.run(handler(response="4", label=LABEL, extra_info={}))


class RewardManagerBase:
    def __init__(self, config, tokenizer, compute_score):
        self.tokenizer = tokenizer


class Config(SimpleNamespace):
    def get(self, name):
        return vars(self).get(name)


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, ids.tolist()))


def rollout(output, extra_info, uid="7", raw_prompt=QUESTION):
    """As verl's reward worker gets it: responses padded on the right, prompts on the left."""
    ids = torch.tensor([*map(ord, output), 0, 0, 0])
    mask = torch.tensor([0, 1, 1, *[1] * len(output), 0, 0, 0])
    row = {
        "reward_model": {"ground_truth": REFERENCE},
        "extra_info": extra_info,
        "uid": uid,
        "raw_prompt": raw_prompt,
    }
    return [SimpleNamespace(non_tensor_batch=row, batch={"responses": ids, "attention_mask": mask})]


@pytest.fixture
def verl_manager(adapter):
    base = "verl.experimental.reward_loop.reward_manager.base"
    module = adapter("verl_manager", {base: {"RewardManagerBase": RewardManagerBase}})

    def make(settings, num_workers=1, n=3):  # noqa: F811
        reward = Config(custom_reward_function=Config(reward_kwargs=settings), num_workers=num_workers)
        policy = Config(rollout=Config(n=n))
        return module.PolarRewardManager(Config(reward=reward, actor_rollout_ref=policy), Tokenizer(), None)

    return make


def run_all(manager, rollouts):
    async def run():
        return await asyncio.gather(*map(manager.run_single, rollouts))

    return asyncio.run(run())


@pytest.mark.parametrize("info", [{"prompt": QUESTION}, {}])
def test_verl_manager(verl_manager, settings, rewards, info):  # noqa: F811
    prompt = [{"role": "user", "content": "other"}] if info else QUESTION
    found = run_all(verl_manager(settings, 8), [rollout(o, info, raw_prompt=prompt) for o in OUTPUTS])
    assert [one["reward_score"] for one in found] == rewards
    assert [one["reward_extra_info"]["answered"] for one in found] == [1.0, 1.0, 0.0]


def test_verl_manager_normalises_within_the_rollouts_of_a_prompt(verl_manager, settings, rewards):  # noqa: F811
    manager = verl_manager({**settings, "normalise": "group"})
    training = [rollout(o, {"split": "train"}, uid) for o in OUTPUTS for uid in ("1", "2")]
    validation = [rollout(o, {"split": "test"}, "3") for o in OUTPUTS[:2]]
    found = run_all(manager, training + validation)
    scores = torch.tensor([one["reward_score"] for one in found])
    for uid in (0, 1):
        assert scores[uid:6:2].mean().item() == pytest.approx(0, abs=1e-6)
        assert scores[uid:6:2].std().item() == pytest.approx(1, abs=1e-5)
    assert [one["reward_extra_info"]["raw"] for one in found[:6:2]] == rewards
    assert [*scores[6:].tolist(), FLOOR] == rewards


def test_verl_manager_names_a_group_that_stays_incomplete(verl_manager, settings):  # noqa: F811
    manager = verl_manager({**settings, "normalise": "group", "max_wait": 0.2})
    with pytest.raises(PolarError, match=r"2 of the 3 rollouts of a prompt came within 0\.2 s"):
        run_all(manager, [rollout(output, {}) for output in OUTPUTS[:2]])


def test_verl_manager_refuses_to_normalise_what_it_does_not_see(verl_manager, settings):  # noqa: F811
    with pytest.raises(PolarError, match=r"needs reward\.num_workers=1, and it is 8"):
        verl_manager({**settings, "normalise": "group"}, num_workers=8)
    with pytest.raises(PolarError, match="never a batch"):
        verl_manager({**settings, "normalise": "batch"})


def test_verl_manager_server_away(verl_manager, tokenizer_dir):
    for normalise in ("none", "group"):
        manager = verl_manager({"model": str(tokenizer_dir), **AWAY, "normalise": normalise})
        with pytest.raises(RewardServerError):
            run_all(manager, [rollout(output, {}) for output in OUTPUTS[:1] * 3])


def test_the_rule_of_a_row_arrives(settings, areal, nemo_rl, trinity, verifiers, verl_manager):  # noqa: F811
    label = {**LABEL, "rule": "riddle"}
    data = SimpleNamespace(prompt="2 + 2?", reference="4", rule="riddle")
    trace = SimpleNamespace(assistant_messages=[Message(content="4")])
    workflow = areal.PolarWorkflow(reward=settings, gconfig=None)
    environment = nemo_rl.PolarEnvironment(settings)
    manager = verl_manager(settings)
    for call in (
        lambda: asyncio.run(workflow.score("4", {**ROW, "rule": "riddle"})),
        lambda: areal.make_reward_fn(**settings)("p", "4", [1], [2], **ROW, rule="riddle"),
        lambda: asyncio.run(environment.step([conversation("4")], [label])),
        lambda: trinity.PolarRewardFn(**settings)(response="4", truth=label),
        lambda: asyncio.run(verifiers.make_reward(**settings)(SimpleNamespace(data=data), trace)),
        lambda: asyncio.run(make_reward_handler(**settings)(response="4", label=label)),
        lambda: run_all(manager, [rollout("4", {"rule": "riddle"})]),
    ):
        with pytest.raises(PolarError, match="rule: is 'riddle'"):
            call()
