"""Settings of the model that a config has, without torch: the launcher checks them before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polar_ft.errors import PolarError

LossType = Literal["ranking", "focal", "margin"]
PenaltyType = Literal["log_barrier", "L2", "none"]
Checkpointing = Literal["auto", "none", "selective", "full"]

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class LoraSettings(BaseModel):
    """``lora = dict(…)`` of a config.

    Attributes:
        r: Rank of the adapters.
        alpha: Their output is multiplied by ``alpha / r``.
        dropout: Share of an adapter's inputs that is dropped in training.
        target_modules: Which projections of every layer get one, by the names of Llama; InternLM2's ``wqkv``
            is q_proj, k_proj and v_proj, ``wo`` o_proj, ``w1``, ``w3`` and ``w2`` gate_proj, up_proj and
            down_proj.
        load_in_4bit: QLoRA: all projections are held in four bits (NF4, blocks of 64); needs a GPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[Projection, ...] = PROJECTIONS
    load_in_4bit: bool = False

    @model_validator(mode="after")
    def _each_target_once(self) -> LoraSettings:
        if not self.target_modules or len(set(self.target_modules)) < len(self.target_modules):
            raise ValueError("target_modules is empty or names one twice")
        return self

    @classmethod
    def of_config(cls, lora: Mapping[str, Any]) -> LoraSettings:
        """Reads the setting of a config.

        Raises:
            PolarError: A key is missing, unknown, or has a value that cannot be.
        """
        try:
            return cls.model_validate(dict(lora))
        except ValidationError as error:
            problems = "; ".join(
                ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
                for problem in error.errors()
            )
            raise PolarError(
                f"lora = {dict(lora)} in the config: {problems}. It has r, alpha, and perhaps dropout, "
                f"target_modules (of {', '.join(PROJECTIONS)}) and load_in_4bit"
            ) from error

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.r
