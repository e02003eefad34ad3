"""What a policy gets for a raw reward; expected numbers are derived by hand."""

from __future__ import annotations

import pytest

from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup
from polar_ft.reward_scale import RewardScale
from polar_ft.rft.reward import Reward
from polar_ft.rft.shaping import (
    Shaping,
    measured_floor,
    measured_rule_rewards,
    normalised,
    overlong_share,
    shaping_of,
)
from tests.rft.test_reward import expected, samples

QUANTILES = {"p01": -11.0, "p05": -8.0, "p25": -6.0, "p75": -2.0, "p95": 3.0, "p99": 5.0}
SCALE = RewardScale(centre=-4.0, spread=2.0, temperature=0.5, quantiles=QUANTILES)


@pytest.fixture
def model(tmp_path):
    SCALE.save(tmp_path)
    return tmp_path


def test_the_order_of_operations():
    shaping = Shaping(
        clip=(-10, 6),
        centre=-4,
        temperature=2,
        max_characters=1000,
        overlong_buffer=400,
        overlong_penalty=3,
    )
    # 9 → clipped to 6 → (6 + 4) / 2 = 5 → 700 characters are 100 into the buffer of 400: 5 − 3 · 1/4.
    assert shaping.score(9, 700) == pytest.approx(4.25)
    # The floor is divided and penalised as every other reward, and not clipped: (−24 + 4) / 2.
    assert shaping.score(-24, 0, clip=False) == -10


def test_nothing_is_the_raw_reward():
    assert Shaping().score(-3.7, 10**6) == -3.7
    assert not Shaping().overlong(10**6)


def test_the_length_penalty_of_dapo():
    # Equation 13 with L_max 20480 and L_cache 4096, as the paper sets them.
    shares = [overlong_share(length, 20480, 4096) for length in (1, 16384, 18432, 20480, 20481)]
    assert shares == [0, 0, 0.5, 1, 1]


def test_settings_from_the_measured_scale(model):
    shaping = shaping_of(model, floor=-13, clip=5, temperature="measured", centre="measured")
    assert shaping == Shaping(clip=(-8, 3), centre=-4, temperature=0.5)
    assert shaping_of(model, floor=-13, clip=25).clip == (-6, -2)
    assert shaping_of("no folder", floor=-13, clip=[-2, 2], temperature=3) == Shaping(
        clip=(-2, 2), temperature=3
    )


def test_rewards_of_rules_and_floor_lie_on_the_measured_scale(model):
    assert measured_floor(model) == -13
    assert measured_rule_rewards(model) == (3, -8)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"clip": (3, -3)}, r"clip: low 3 must be below high -3"),
        ({"clip": (-30, 3)}, r"clip: low -30 must be .* above the floor -20"),
        ({"clip": 7}, r"clip=7: must be two numbers"),
        ({"clip": True}, r"clip=True: must be two numbers"),
        ({"clip": "p05"}, r"clip='p05': must be two numbers"),
        ({"temperature": 0}, r"temperature=0: must be a positive number"),
        ({"temperature": True}, r"temperature=True: must be a positive number"),
        ({"centre": "mean"}, r"centre='mean': must be a number"),
        (
            {"max_characters": 10, "overlong_buffer": 11},
            r"overlong_buffer=11: must be from 0 to max_characters=10",
        ),
        ({"overlong_buffer": 11}, r"overlong_buffer: has no effect without max_characters"),
        ({"overlong_penalty": 2}, r"overlong_penalty: has no effect without max_characters"),
        ({"max_characters": 10, "overlong_penalty": -1}, r"overlong_penalty=-1: is subtracted"),
    ],
)
def test_wrong_settings_are_named(model, settings, named):
    with pytest.raises(PolarError, match=named):
        shaping_of(model, floor=-20, **settings)


def test_what_was_not_measured_is_named(tmp_path):
    RewardScale(centre=0, spread=1).save(tmp_path)
    with pytest.raises(PolarError, match=r"temperature='measured'.* has none"):
        shaping_of(tmp_path, floor=-20, temperature="measured")
    with pytest.raises(PolarError, match="no quantile p05"):
        shaping_of(tmp_path, floor=-20, clip=5)
    with pytest.raises(PolarError, match="rule_rewards="):
        measured_rule_rewards(tmp_path)
    with pytest.raises(PolarError, match="floor="):
        measured_floor(tmp_path)


def test_normalising():
    # Mean 3, deviations −2, 0, 2 and the sample's deviation √((4 + 0 + 4) / 2) = 2.
    assert normalised([1, 3, 5]) == pytest.approx([-1, 0, 1])
    assert normalised([4.0]) == [0]
    assert normalised([2, 2, 2]) == [0, 0, 0]
    assert normalised([]) == []


def test_shaped_rewards_show_what_was_done(serve, reward_from, template):
    batch = samples(8)
    raw = [expected(template, sample) for sample in batch]
    rewards = reward_from(
        serve(), clip=(-1, 0.5), temperature=2, centre=0.25, max_characters=5, overlong_penalty=0.125
    ).score(batch)
    assert [reward.raw for reward in rewards] == pytest.approx(raw)
    # "Answer 0" has 8 characters, more than 5.
    wanted = [(min(max(value, -1), 0.5) - 0.25) / 2 - 0.125 for value in raw]
    assert [reward.score for reward in rewards] == pytest.approx(wanted)
    assert {reward.overlong for reward in rewards} == {True}


def test_floors_are_not_clipped(serve, reward_from):
    sample = TextGroup("Q?", ("r",), ("<think>never",))
    (reward,) = reward_from(serve(), clip=(-1, 1), temperature=2).score([sample])
    assert (reward.raw, reward.score) == (-20, -10)


@pytest.mark.parametrize("how", ["group", "batch"])
def test_a_batch_is_normalised(serve, reward_from, template, how):
    batch = samples(8)  # two questions with four answers each
    raw = [expected(template, sample) for sample in batch]
    rewards = reward_from(serve(), normalise=how, temperature=3).score(batch)
    wanted = normalised(raw) if how == "batch" else normalised(raw[:4]) + normalised(raw[4:])
    assert [reward.score for reward in rewards] == pytest.approx(wanted)
    assert [reward.raw for reward in rewards] == pytest.approx(raw)


def test_single_calls_cannot_be_normalised(serve, reward_from):
    reward = reward_from(serve(), normalise="group")
    with pytest.raises(PolarError, match=r"normalise='group' needs whole batches, and verl 0\.9 asks"):
        reward.check_single_calls("verl 0.9")
    with pytest.raises(PolarError, match="normalise='group'"):
        reward.submit(samples(1)[0])
    reward_from(serve()).check_single_calls("verl 0.9")


def test_groups_of_one_are_warned_of(serve, reward_from, caplog):
    rewards = reward_from(serve(), normalise="group").score(samples(8)[::4])
    assert [reward.score for reward in rewards] == [0, 0]
    assert "no prompt has several samples" in caplog.text


def test_every_row_has_the_same_keys(serve, reward_from):
    batch = [*samples(1), TextGroup("Q?", ("r",), ("<think>never",))]
    rows = [reward.as_row() for reward in reward_from(serve()).score(batch)]
    assert {tuple(row) for row in rows} == {tuple(Reward(0, 0, True, False, False, 0).as_row())}
    assert all(type(value) is float for row in rows for value in row.values())
