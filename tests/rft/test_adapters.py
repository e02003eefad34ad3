"""Each adapter, called as its framework calls it, gives the rewards of `PolarReward`."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from polar_ft.client.errors import RewardServerError
from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup
from polar_ft.rft import verl
from polar_ft.rft.openrlhf import make_reward_func
from polar_ft.rft.slime import make_custom_rm
from polar_ft.rft.swift import make_orm
from polar_ft.rft.trl import PolarRewardFunction, async_reward_function
from tests.rft.test_reward import expected

QUESTION = [{"role": "user", "content": "2 + 2?"}]
REFERENCE = [{"role": "assistant", "content": "4"}]
OUTPUTS = ["It is 4.", "<think>Hm.</think>It is 5.", "<think>It is"]
FLOOR = -20.0
KEYS = (
    *("score", "raw", "answered", "truncated", "overlong", "length"),
    *("by_rule", "rule_right", "rule_failed"),
)


@pytest.fixture
def settings(serve, tokenizer_dir):
    return {"model": str(tokenizer_dir), "server_address": serve().address, "floor": FLOOR}


@pytest.fixture
def rewards(template):
    """What the three outputs get."""
    answers = ["It is 4.", "It is 5."]
    scored = [expected(template, TextGroup("2 + 2?", ("4",), (answer,))) for answer in answers]
    return pytest.approx([*scored, FLOOR])


def test_verl_batch(settings, rewards):
    rows = verl.compute_score_batch(
        ["polar"] * 3, OUTPUTS, [REFERENCE, "4", REFERENCE], [{"prompt": QUESTION}] * 3, **settings
    )
    assert [row["score"] for row in rows] == rewards
    assert {tuple(row) for row in rows} == {KEYS}
    assert [row["answered"] for row in rows] == [1.0, 1.0, 0.0]


def test_verl_batch_with_several_references(settings, template):
    info = {"prompt": QUESTION, "references": ["IV", "4"]}
    (row,) = verl.compute_score_batch(["polar"], ["four"], [REFERENCE], [info], **settings)
    sample = TextGroup("2 + 2?", ("IV", "4"), ("four",))
    assert row["score"] == pytest.approx(max(expected(template, sample, i) for i in (0, 1)))


def test_verl_per_sample(settings, rewards):
    info = {"prompt": QUESTION}

    async def chunk():
        calls = [verl.compute_score("polar", output, REFERENCE, info, **settings) for output in OUTPUTS]
        # As verl hands them over if it serves a reward model itself.
        router = {"reward_router_address": "router:1", "reward_model_tokenizer": object()}
        calls.append(verl.compute_score("polar", OUTPUTS[0], REFERENCE, info, **settings, **router))
        return await asyncio.gather(*calls)

    *three, again = asyncio.run(chunk())
    assert [row["score"] for row in three] == rewards
    assert again == three[0]
    assert info == {"prompt": QUESTION}  # verl's own dictionary


def test_verl_names_what_a_row_lacks(settings):
    with pytest.raises(PolarError, match="prompt"):
        verl.compute_score_batch(["polar"], ["a"], ["r"], [{}], **settings)


@pytest.mark.parametrize("conversational", [True, False])
def test_trl(settings, rewards, conversational):
    logged = {}
    completions = [[{"role": "assistant", "content": output}] for output in OUTPUTS]
    found = PolarRewardFunction(**settings)(
        [QUESTION if conversational else "2 + 2?"] * 3,
        completions if conversational else OUTPUTS,
        completion_ids=[[1]] * 3,
        reference=["4"] * 3,
        trainer_state=None,
        log_extra=None,
        log_metric=logged.__setitem__,
    )
    assert found == rewards
    assert logged == {
        "polar/raw": pytest.approx(sum(found) / 3),
        "polar/unanswered": pytest.approx(1 / 3),
        "polar/truncated": 0.0,
    }


def test_trl_with_the_question_in_a_column(settings, rewards):
    function = PolarRewardFunction(**settings, prompt="question")
    columns = {"question": ["2 + 2?"] * 3, "references": [["4"]] * 3}
    assert function(["4. 2 + 2?"] * 3, OUTPUTS, **columns) == rewards
    coroutine = async_reward_function(**settings, prompt="question")
    assert asyncio.iscoroutinefunction(coroutine)  # which TRL looks for
    assert asyncio.run(coroutine(["4. 2 + 2?"] * 3, OUTPUTS, **columns)) == rewards
    with pytest.raises(PolarError, match="no column 'question'"):
        function(["2 + 2?"], ["4"], references=[["4"]])


def test_openrlhf(settings, rewards):
    prompt = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    reward_func = make_reward_func(**settings)
    answers = [
        reward_func([f"{prompt}{output}<|im_end|>\n"], [prompt], [{"prompt": QUESTION, "reference": "4"}])
        for output in OUTPUTS
    ]
    assert [answer["rewards"][0] for answer in answers] == rewards
    assert answers[2]["extra_logs"] == {"raw": FLOOR, **dict.fromkeys(KEYS[2:], 0.0)}
    with pytest.raises(PolarError, match="does not begin with its prompt"):
        reward_func(["other"], [prompt], [{"prompt": QUESTION, "reference": "4"}])
    with pytest.raises(PolarError, match="label"):
        reward_func([prompt], [prompt], ["4"])


def test_slime(settings, rewards):
    custom_rm = make_custom_rm(**settings)
    label = {"prompt": QUESTION, "reference": "4"}
    # slime keeps special tokens in responses.
    samples = [SimpleNamespace(label=label, response=f"{output}<|im_end|>") for output in OUTPUTS]

    async def run():
        return await custom_rm(None, samples), [await custom_rm(None, sample) for sample in samples]

    group, single = asyncio.run(run())
    assert group == rewards
    assert single == group


def test_swift(settings, rewards):
    orm = make_orm(**settings)(args=None)
    messages = [QUESTION, QUESTION, [*QUESTION, {"role": "assistant", "content": OUTPUTS[2]}]]
    assert orm(OUTPUTS, messages=messages, reference=["4"] * 3, trainer_state=None) == rewards


def normalised_to_zero_mean(scores):
    return sum(scores) == pytest.approx(0, abs=1e-5) and max(scores) > 0.5


def test_batches_and_groups_can_be_normalised(settings):
    settings["normalise"] = "group"
    train, test = ({"prompt": QUESTION, "split": split} for split in ("train", "test"))
    rows = verl.compute_score_batch(["polar"] * 3, OUTPUTS, ["4"] * 3, [train] * 3, **settings)
    assert normalised_to_zero_mean([row["score"] for row in rows])
    raw = verl.compute_score_batch(["polar"] * 3, OUTPUTS, ["4"] * 3, [test] * 3, **settings)
    assert [row["score"] for row in raw] == [row["raw"] for row in rows]
    found = PolarRewardFunction(**settings)([QUESTION] * 3, OUTPUTS, reference=["4"] * 3)
    assert normalised_to_zero_mean(found)
    label = {"prompt": QUESTION, "reference": "4"}
    group = [SimpleNamespace(label=label, response=output) for output in OUTPUTS]
    assert normalised_to_zero_mean(asyncio.run(make_custom_rm(**settings)(None, group)))


def test_single_calls_refuse_to_normalise(settings):
    settings["normalise"] = "batch"
    with pytest.raises(PolarError, match="OpenRLHF asks for one sample at a time"):
        make_reward_func(**settings)
    sample = SimpleNamespace(label={"prompt": QUESTION, "reference": "4"}, response="4")
    with pytest.raises(PolarError, match="slime without --group-rm asks for one sample at a time"):
        asyncio.run(make_custom_rm(**settings)(None, sample))
    with pytest.raises(PolarError, match="verl's per-sample reward function asks for one sample at a time"):
        asyncio.run(verl.compute_score("polar", "4", "4", {"prompt": QUESTION}, **settings))


def calls_of(settings, rule=None):
    """Adapter to a call of it, as its framework calls it, with a row that asks for a rule."""
    info = {"prompt": QUESTION, "rule": rule}
    label = {"prompt": QUESTION, "reference": "4", "rule": rule}
    columns = {"reference": ["4"], "rule": [rule]}
    return {
        "verl batch": lambda: verl.compute_score_batch(["polar"], ["4"], ["4"], [info], **settings),
        "verl": lambda: asyncio.run(verl.compute_score("polar", "4", "4", info, **settings)),
        "trl": lambda: PolarRewardFunction(**settings)([QUESTION], ["4"], **columns),
        "openrlhf": lambda: make_reward_func(**settings)(["p4"], ["p"], [label]),
        "slime": lambda: asyncio.run(
            make_custom_rm(**settings)(None, SimpleNamespace(label=label, response="4"))
        ),
        "swift": lambda: make_orm(**settings)()(["4"], messages=[QUESTION], **columns),
    }


ADAPTERS = list(calls_of({}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_rule_of_a_row_arrives(settings, name):
    with pytest.raises(PolarError, match="rule: is 'riddle'"):
        calls_of(settings, rule="riddle")[name]()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_server_away_is_an_error(tokenizer_dir, name):
    """Never None, and never 0 in place of a reward."""
    away = {"model": str(tokenizer_dir), "server_address": "127.0.0.1:9", "floor": FLOOR, "max_wait": 0.2}
    with pytest.raises(RewardServerError, match=r"127\.0\.0\.1:9"):
        calls_of(away)[name]()


def test_verl_does_not_wait_twice(monkeypatch):
    """verl 0.5 calls the function again after an error, and stops if it fails again."""
    waits = []

    class Away:
        def score(self, samples):
            waits.append(len(samples))
            raise RewardServerError("gpu-1:30000", "gave up waiting")

    away = Away()
    monkeypatch.setattr(verl, "shared_reward", lambda settings: away)
    call = calls_of({})["verl batch"]
    for waited in (1, 1, 2):  # the second of a pair fails at once
        with pytest.raises(RewardServerError):
            call()
        assert len(waits) == waited
    monkeypatch.setattr(verl, "REPEATED_CALL_SECONDS", 0.0)
    with pytest.raises(RewardServerError):
        call()
    assert len(waits) == 3
