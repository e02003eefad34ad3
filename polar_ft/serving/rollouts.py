"""The formats in which RL frameworks ask for rewards themselves: OpenRLHF's and slime's.

Both send what a policy wrote, thoughts included; the rules of `polar_ft.data.answers` say what of it is
scored. An output without an answer gets the measured floor, and is counted. Prompt and references travel in
the row's label, since the prompt that they send is in the policy's chat template.

OpenRLHF  ``POST /get_reward {"query": [text], "prompts": [text], "labels": [label]}``
          ``{"rewards": [r], "scores": [r], "extra_logs": {name: number}}``
slime     ``POST /slime {"prompt": …, "response": text, "label": label}``
          the reward alone

As OpenRLHF's ``openrlhf/utils/agent.py`` and slime's ``slime/rollout/rm_hub`` ask in August 2026.
A label is ``{"prompt": …, "reference": …}``, or has ``"references"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, TypeAdapter, model_validator

from polar_ft.data.answers import Thinking
from polar_ft.data.records import PlainText, RowError, text_of
from polar_ft.data.responses import response_of, without_end
from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup
from polar_ft.serving.inputs import InputError
from polar_ft.serving.server import ERRORS, GroupInputs, Server
from polar_ft.serving.wire import Lenient, Listed, ShortText, texts_of_references


class Label(Lenient):
    """What a row of the framework's data says in its label column; other fields are ignored."""

    prompt: ShortText = Field(description="The question, without a chat template.")
    reference: ShortText | None = None
    references: Listed[ShortText] | None = Field(
        default=None, description="Several, instead of one: the greatest reward counts."
    )

    @model_validator(mode="before")
    @classmethod
    def _is_a_label(cls, value: Any) -> Any:
        if not isinstance(value, (dict, cls)):
            raise ValueError('must be {"prompt": …, "reference": …}, or have "references"')
        return value

    @model_validator(mode="after")
    def _has_references(self) -> Label:
        if self.reference is None and not self.references:
            raise ValueError('must have "reference" or "references"')
        return self


class OpenRLHFRequest(Lenient):
    """A request of OpenRLHF's ``--reward.remote_url``."""

    query: Listed[PlainText] = Field(min_length=1, description="Prompt and response, decoded.")
    prompts: Listed[PlainText] = Field(description="The prompts alone, in the policy's chat template.")
    labels: Listed[Label]

    @model_validator(mode="after")
    def _have_one_length(self) -> OpenRLHFRequest:
        if not len(self.query) == len(self.prompts) == len(self.labels):
            raise ValueError("query, prompts and labels must have the same length")
        return self


class OpenRLHFResponse(BaseModel):
    """Rewards in the order of the queries, and figures for OpenRLHF's logs, each a mean."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, float]


class SlimeRequest(Lenient):
    """A request of slime's ``--rm-type remote_rm``."""

    prompt: Any = Field(default=None, description="In the policy's chat template; not scored.")
    response: PlainText
    label: Label


OPENRLHF = TypeAdapter(OpenRLHFRequest)
SLIME = TypeAdapter(SlimeRequest)


@dataclass(frozen=True)
class _Rollout:
    """What a policy wrote, and whether the prompt has opened the tag of its thoughts."""

    label: Label
    response: str
    prompt: str

    def answer(self, thinking: Thinking) -> str | None:
        """The answer, without thoughts; None if none came."""
        if self.prompt.rstrip().endswith(thinking.start):
            thinking = replace(thinking, opened_by_prompt=True)
        return thinking.answer(self.response)


@dataclass(frozen=True)
class _Figures:
    """The reward of one output, and what OpenRLHF logs of it; see `polar_ft.rft.reward.Reward`."""

    reward: float
    answered: bool
    truncated: bool
    length: int


def add_rollout_routes(app: FastAPI, server: Server) -> None:
    """Adds the routes of RL frameworks."""

    async def score(
        request: Request, form: TypeAdapter[Any], rollouts_of: Callable[[Any], Sequence[_Rollout]]
    ) -> list[_Figures]:
        def read(body: Any) -> tuple[list[str | None], float | None, GroupInputs[None]]:
            rollouts = rollouts_of(body)
            answers = [rollout.answer(server.thinking) for rollout in rollouts]
            floor = None if None not in answers else _floor(server, answers.index(None))
            groups = [
                _group(rollout.label, answer)
                for rollout, answer in zip(rollouts, answers, strict=True)
                if answer is not None
            ]
            return answers, floor, server.read_groups(None, groups, ["max"] * len(groups))

        answers, floor, inputs = await server.read(request, form, read)
        rewards = iter(inputs.rewards(await server.score(request, inputs.job)))
        cuts = iter(inputs.cut())
        figures = []
        for answer in answers:
            if answer is None:
                assert floor is not None
                figures.append(_Figures(floor, answered=False, truncated=False, length=0))
                continue
            cut = next(cuts)
            truncated = bool(cut.prompt or cut.reference or any(cut.candidates))
            (reward,) = next(rewards)
            figures.append(_Figures(reward, answered=True, truncated=truncated, length=len(answer)))
        unanswered = answers.count(None)
        server.metrics.unanswered.labels(request.scope["route"].path).inc(unanswered)
        request.scope["polar_ft"].update(unanswered=unanswered)
        return figures

    @app.post("/get_reward", responses=ERRORS, tags=["RL frameworks"])
    async def get_reward(request: Request) -> OpenRLHFResponse:
        """Scores outputs in OpenRLHF's format; thoughts are removed, and no answer gets the floor."""

        def rollouts(body: OpenRLHFRequest) -> list[_Rollout]:
            found = []
            for number, (query, prompt) in enumerate(zip(body.query, body.prompts, strict=True)):
                try:
                    found.append(_Rollout(body.labels[number], response_of(query, prompt), prompt))
                except RowError as error:
                    raise InputError(f"query[{number}]: {error.reason}") from None
            return found

        figures = await score(request, OPENRLHF, rollouts)
        rewards = [one.reward for one in figures]
        logs = {
            "answered": fmean(one.answered for one in figures),
            "truncated": fmean(one.truncated for one in figures),
            "length": fmean(one.length for one in figures),
        }
        return OpenRLHFResponse(rewards=rewards, scores=rewards, extra_logs=logs)

    @app.post("/slime", responses=ERRORS, tags=["RL frameworks"])
    async def slime(request: Request) -> float:
        """Scores an output in slime's format; thoughts are removed, and no answer gets the floor."""

        def rollouts(body: SlimeRequest) -> list[_Rollout]:
            prompt = body.prompt if isinstance(body.prompt, str) else ""
            return [_Rollout(body.label, without_end(body.response), prompt)]

        (figures,) = await score(request, SLIME, rollouts)
        return figures.reward


def _group(label: Label, answer: str) -> TextGroup:
    references = texts_of_references(label.reference, label.references)
    return TextGroup(text_of(label.prompt), references, (answer,))


def _floor(server: Server, number: int) -> float:
    try:
        return server.scorer.reward_scale().floor
    except PolarError as error:
        raise InputError(
            f"output {number} has no answer; its reward is the floor, and none was measured for this model: "
            f"run polar-ft calibrate on its folder"
        ) from error
