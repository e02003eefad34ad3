"""The range of a model's rewards, measured once and kept in the model's folder: ``reward_scale.json``.

A reward compares candidates of one (prompt, reference); its zero and its unit mean nothing, and differ from
model to model. What uses rewards as numbers (a PPO loss, a threshold, a mixture of several rewards) needs to
know their range. ``polar-ft calibrate`` measures it on data; the scorer, the server and the client apply it
where they are asked to, and never by themselves. Needs neither torch nor numpy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polar_ft.errors import PolarError
from polar_ft.files import resolve_folder, write_atomically

FILE_NAME = "reward_scale.json"

# How far rewards may differ by rounding alone, by the dtype that computes or in which weights are
# written; relative to the largest reward or the range of the rewards. Sums in another order differ in
# float32 in the 6th digit, in bfloat16, with 8 bits of mantissa and rounding in every layer, in the 2nd;
# rounding the weights (relative 2⁻¹² and 2⁻⁹) comes to as much in a deep model.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# The same between engines, relative to the root mean square of the rewards. A random two-layer model, the
# scorer in that dtype on a CPU against vLLM 0.32 in float32: 3e-6, 6e-3 and 5e-2; between engines in
# bfloat16 3e-3 is usual (SGLang#2427). A wrong template, pooling or RoPE changes rewards by their own size.
ENGINE_TOLERANCES = {"float32": 1e-4, "float16": 1.25e-2, "bfloat16": 1e-1}


class RewardScale(BaseModel):
    """Centre, spread and temperature of a model's rewards on some data.

    Each (prompt, reference) counts the same, however many candidates it has.

    >>> scale = RewardScale(centre=-6.0, spread=2.0, within_spread=1.5, temperature=0.5)
    >>> scale.apply([-6.0, -4.0, -9.0])
    [0.0, 1.0, -1.5]
    >>> round(scale.preference(-4.0, -4.5), 3)  # σ(0.5 / 0.5)
    0.731

    Attributes:
        centre: Mean reward.
        spread: Standard deviation of the rewards about ``centre``, positive.
        within_spread: Standard deviation of the rewards of one (prompt, reference): what is left of the
            spread in an algorithm that compares samples of one prompt, such as GRPO. None where no (prompt,
            reference) has several candidates.
        temperature: T with which σ((a − b) / T) is the best estimate, by log-loss, of how often a is
            preferred to b. None where there is none, or the data has no pairs.
        quantiles: Rewards at 1, 5, 25, 50, 75, 95 and 99 %, by name ("p01", …).
        n_rewards: Rewards that were measured.
        n_references: (prompt, reference) that they belong to.
        n_pairs: Pairs that the temperature was fitted to.
        dtype: In which the model computed.
        data: What was measured: files with their SHA-256 (data-set ids with an empty string).
    """

    model_config = ConfigDict(allow_inf_nan=False, extra="ignore")

    centre: float
    spread: float = Field(gt=0)
    within_spread: float | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, gt=0)
    quantiles: dict[str, float] = {}
    n_rewards: int = 0
    n_references: int = 0
    n_pairs: int = 0
    dtype: str = ""
    data: dict[str, str] = {}

    def apply(self, rewards: Iterable[float]) -> list[float]:
        """(reward − centre) / spread of each: about mean 0 and deviation 1 on data like that measured.

        The same line for every reward, so no order changes and differences keep their ratios.
        """
        return [(reward - self.centre) / self.spread for reward in rewards]

    def preference(self, a: float, b: float) -> float:
        """Estimated probability that the candidate of reward ``a`` is preferred to that of ``b``.

        Args:
            a: An unscaled reward.
            b: An unscaled reward of another candidate of the same (prompt, reference).

        Raises:
            PolarError: No temperature was fitted.
        """
        if self.temperature is None:
            raise PolarError(
                f"{FILE_NAME} has no temperature: no pairs were measured, or none fits them; run polar-ft "
                f"calibrate on data with chosen and rejected, or ranked, responses"
            )
        x = (a - b) / self.temperature
        # Each side of zero by the form that cannot overflow.
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    @property
    def floor(self) -> float:
        """The reward of an output without an answer, below what answers get: 1st percentile minus deviation.

        A floor at 0 would be a reward: the zero of a reward model means nothing, and an empty text can score
        higher than wrong answers.

        Raises:
            PolarError: The quantiles were not measured.

        >>> RewardScale(centre=-6.0, spread=2.0, quantiles={"p01": -11.0}).floor
        -13.0
        """
        if "p01" not in self.quantiles:
            raise PolarError(f"{FILE_NAME} has no quantiles; run polar-ft calibrate again")
        return self.quantiles["p01"] - self.spread

    @classmethod
    def load(cls, model: str | os.PathLike[str]) -> RewardScale:
        """Reads the scale of a model.

        Args:
            model: A model folder, a hub id, or a file that `save` wrote.

        Raises:
            PolarError: There is no such file, or it is not one of these.
        """
        path = Path(model) if Path(model).is_file() else resolve_folder(model) / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise PolarError(
                f"{path}: there is no measured reward scale; make it with polar-ft calibrate {model} DATA"
            ) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise PolarError(
                f"{path}: {where}: {first['msg']}; the file is damaged: run polar-ft calibrate again"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the scale to a file, or into a model folder, atomically.

        Raises:
            PolarError: It cannot be written.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        try:
            write_atomically(file, self.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise PolarError(f"{file}: cannot be written ({error.strerror or error})") from error
        return file
