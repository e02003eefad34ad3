"""What a policy gets for a reward: pure functions from the raw reward to it, in this order::

    raw reward → clip → centre, temperature → length penalty → normalisation

Each is off by default: a policy then gets the raw reward. All but normalisation are of one sample and can be
had from every framework; normalisation needs a batch.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from polar_ft.errors import PolarError
from polar_ft.reward_scale import FILE_NAME, RewardScale

Normalise = Literal["none", "group", "batch"]


@dataclass(frozen=True, slots=True)
class Shaping:
    """What is done to the raw reward of one sample.

    Attributes:
        clip: Lowest and highest reward; None for none.
        centre: Is subtracted.
        temperature: Divides what is left.
        max_characters: Length of an answer from which the penalty is full; None for no penalty.
        overlong_buffer: Characters before that over which it rises from 0.
        overlong_penalty: The full penalty.
    """

    clip: tuple[float, float] | None = None
    centre: float = 0.0
    temperature: float = 1.0
    max_characters: int | None = None
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

    def score(self, raw: float, length: int, *, clip: bool = True) -> float:
        """The shaped reward.

        Args:
            raw: Of the reward model, of a rule, or the floor.
            length: Characters of the answer.
            clip: Whether clipping applies: not to the floor and to the rewards of rules, which are settings.

        >>> shaping = Shaping(clip=(-10, 10), centre=2, temperature=4, max_characters=100, overlong_buffer=20,
        ...                   overlong_penalty=1)
        >>> shaping.score(14, 90), shaping.score(-30, 0, clip=False)  # (10 − 2) / 4 − 10 / 20; (−30 − 2) / 4
        (1.5, -8.0)
        """
        if self.clip is not None and clip:
            low, high = self.clip
            raw = min(max(raw, low), high)
        penalty = 0.0
        if self.max_characters is not None:
            share = overlong_share(length, self.max_characters, self.overlong_buffer)
            penalty = self.overlong_penalty * share
        return (raw - self.centre) / self.temperature - penalty

    def overlong(self, length: int) -> bool:
        """Whether an answer of so many characters gets the full penalty."""
        return self.max_characters is not None and length > self.max_characters


def overlong_share(length: int, limit: int, buffer: int) -> float:
    """Share of the length penalty: 0 up to ``limit − buffer``, 1 above ``limit``, a straight line between.

    The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), there in tokens of the whole output.

    >>> [overlong_share(length, limit=100, buffer=20) for length in (80, 85, 100, 101)]
    [0.0, 0.25, 1.0, 1.0]
    >>> [overlong_share(length, limit=100, buffer=0) for length in (100, 101)]
    [0.0, 1.0]
    """
    if length > limit:
        return 1.0
    return max(0.0, length - (limit - buffer)) / buffer if buffer else 0.0


def normalised(rewards: Sequence[float], groups: Sequence[Hashable] | None = None) -> list[float]:
    """(reward − mean) / deviation, over all rewards or within groups; 0 where all of them are equal.

    Within groups it is the advantage of GRPO (arXiv 2402.03300, section 4.1.2). The deviation is that of a
    sample, with n − 1, as in TRL and verl.

    Args:
        rewards: Any numbers.
        groups: The group of each reward; None makes one of all.

    >>> normalised([1.0, 3.0, 5.0, 5.0, 7.0], groups=["a", "a", "b", "b", "c"])  # doctest: +ELLIPSIS
    [-0.707..., 0.707..., 0.0, 0.0, 0.0]
    """
    values = np.asarray(rewards, dtype=np.float64)
    result = np.zeros_like(values)
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups if groups is not None else [None] * len(values)):
        members.setdefault(group, []).append(number)
    for numbers in members.values():
        some = values[numbers]
        if np.ptp(some) > 0:
            result[numbers] = (some - some.mean()) / some.std(ddof=1)
    return [float(value) for value in result]


def shaping_of(
    model: str | os.PathLike[str],
    *,
    floor: float,
    clip: Sequence[float] | float | None = None,
    temperature: float | str | None = None,
    centre: float | str | None = None,
    max_characters: int | None = None,
    overlong_buffer: int = 0,
    overlong_penalty: float = 1.0,
) -> Shaping:
    """Makes a `Shaping` of settings, which may ask for what ``polar-ft calibrate`` measured.

    Args:
        model: The model folder, whose scale is read only if a setting asks for it.
        floor: Reward of an output without an answer; clipping has to stay above it.
        clip: Lowest and highest reward, or a number of percent: the measured quantiles so far from both ends.
        temperature: A number, or "measured".
        centre: A number, or "measured".
        max_characters: As in `Shaping`.
        overlong_buffer: As in `Shaping`.
        overlong_penalty: As in `Shaping`.

    Raises:
        PolarError: A setting is wrong, or what it asks for was not measured; names it.
    """
    bounds = _bounds(model, clip)
    if bounds is not None and not floor < bounds[0] < bounds[1]:
        raise PolarError(
            f"clip: low {bounds[0]:g} must be below high {bounds[1]:g} and above the floor {floor:g} of "
            f"outputs without an answer, or no answer would be as good as a bad one; set clip or floor"
        )
    if temperature == "measured":
        temperature = RewardScale.load(model).temperature
        if temperature is None:
            raise PolarError(
                f"temperature='measured': {FILE_NAME} of {model} has none, since no pairs were measured or "
                f"the model orders all of them as given; give a number, such as the scale's spread"
            )
    elif temperature is None:
        temperature = 1.0
    if centre == "measured":
        centre = RewardScale.load(model).centre
    if not (_is_number(temperature) and float(temperature) > 0):
        raise PolarError(f"temperature={temperature!r}: must be a positive number or 'measured'")
    if centre is not None and not _is_number(centre):
        raise PolarError(f"centre={centre!r}: must be a number or 'measured'")
    if max_characters is not None and not 0 <= overlong_buffer <= max_characters:
        raise PolarError(
            f"overlong_buffer={overlong_buffer}: must be from 0 to max_characters={max_characters}"
        )
    if max_characters is None and overlong_buffer:
        raise PolarError("overlong_buffer: has no effect without max_characters; set both")
    if max_characters is None and overlong_penalty != 1.0:
        raise PolarError("overlong_penalty: has no effect without max_characters; set both")
    if not overlong_penalty >= 0:
        raise PolarError(f"overlong_penalty={overlong_penalty}: is subtracted, so it must not be negative")
    return Shaping(
        clip=bounds,
        centre=float(centre or 0.0),
        temperature=float(temperature),
        max_characters=max_characters,
        overlong_buffer=overlong_buffer,
        overlong_penalty=overlong_penalty,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _bounds(
    model: str | os.PathLike[str], clip: Sequence[float] | float | None
) -> tuple[float, float] | None:
    if clip is None:
        return None
    if (
        isinstance(clip, Sequence)
        and not isinstance(clip, str)
        and len(clip) == 2
        and all(map(_is_number, clip))
    ):
        low, high = clip
        return float(low), float(high)
    if not _is_number(clip) or clip not in (1, 5, 25):
        raise PolarError(
            f"clip={clip!r}: must be two numbers (low, high), or 1, 5 or 25 for the measured quantiles at so "
            f"many percent from both ends"
        )
    quantiles = RewardScale.load(model).quantiles
    return (
        _quantile(model, quantiles, f"p{clip:02.0f}"),
        _quantile(model, quantiles, f"p{100 - clip:02.0f}"),
    )


def _quantile(model: str | os.PathLike[str], quantiles: dict[str, float], name: str) -> float:
    if name not in quantiles:
        raise PolarError(f"{model}: {FILE_NAME} has no quantile {name}; run polar-ft calibrate again")
    return quantiles[name]


def measured_floor(model: str | os.PathLike[str]) -> float:
    """The floor of a model's scale; see `RewardScale.floor`.

    Args:
        model: A model folder with the scale that ``polar-ft calibrate`` measured.

    Raises:
        PolarError: Nothing was measured.
    """
    try:
        return RewardScale.load(model).floor
    except PolarError as error:
        raise PolarError(
            f"{model}: an output without an answer needs a reward, and {FILE_NAME} says of none; run "
            f"polar-ft calibrate {model} DATA, or give floor=…, below what wrong answers get"
        ) from error


def measured_rule_rewards(model: str | os.PathLike[str]) -> tuple[float, float]:
    """What a rule gives right and wrong answers: the quantiles at 95 and 5 % of the model's rewards.

    So rows with a rule and rows without one stand on the same scale in a batch.

    Raises:
        PolarError: Nothing was measured.
    """
    try:
        quantiles = RewardScale.load(model).quantiles
        return _quantile(model, quantiles, "p95"), _quantile(model, quantiles, "p05")
    except PolarError as error:
        raise PolarError(
            f"{model}: rows ask for a rule, and what it gives is not measured; run polar-ft calibrate "
            f"{model} DATA, or give rule_rewards=[right, wrong] on the scale of the model's rewards"
        ) from error
