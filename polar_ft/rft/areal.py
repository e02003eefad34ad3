"""AReaL: a rollout workflow, and a reward function for its own workflows.

Use the workflow, `RLVRWorkflow` with rewards that are awaited::

    trainer.train(
        workflow="polar_ft.rft.areal.PolarWorkflow",
        workflow_kwargs=dict(
            reward=dict(model="my_rm", server_address="127.0.0.1:30000"), gconfig=…, tokenizer=…
        ),
    )

AReaL calls a reward function in a small pool of processes and gives it 15 s, time in the pool's queue
included; after four time-outs it takes 0 as the reward, with a warning in the log. The workflow avoids the
pool: it waits for ``max_wait`` seconds, and then raises; AReaL logs that and rejects the rollout.

A row's columns are ``messages``, ``reference`` or ``references``, and ``rule`` if it asks for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

from areal.workflow.rlvr import RLVRWorkflow

from polar_ft.data.responses import END_TOKENS, without_end
from polar_ft.errors import PolarError
from polar_ft.rft.reward import Sample, sample_of, shared_reward


class PolarWorkflow(RLVRWorkflow):
    """A rollout of one turn, scored by POLAR.

    Args:
        reward: Settings as in `PolarReward`.
        question: Column with the question that the reward model reads.
        end_tokens: Control tokens that a response ends with; they are taken off.
        **workflow: As in `RLVRWorkflow`, without ``reward_fn``.
    """

    def __init__(
        self,
        *,
        reward: Mapping[str, Any],
        question: str = "messages",
        end_tokens: Sequence[str] = END_TOKENS,
        **workflow: Any,
    ) -> None:
        scorer = shared_reward(reward)
        scorer.check_single_calls("AReaL")

        # Positional only: a row may have columns of any name.
        async def polar(
            prompt: str, completion: str, prompt_ids: Any, completion_ids: Any, /, **row: Any
        ) -> float:
            return (await scorer.score_async(_sample(completion, row, question, end_tokens))).score

        super().__init__(reward_fn=polar, **workflow)
        # In place of the wrapper with the pool of processes and the time-out.
        self.async_reward_fn = polar


def make_reward_fn(
    model: Any,
    *,
    question: str = "messages",
    end_tokens: Sequence[str] = END_TOKENS,
    timeout_seconds: float = 15.0,
    **settings: Any,
) -> Callable[..., float]:
    """Makes a ``reward_fn`` for AReaL's own workflows; it raises before AReaL would take 0.

    AReaL calls it four times before it rejects the rollout, so servers may be away for 48 s at most. How long
    a call waited in the pool's queue is unknown here: look for "Computing reward timeout" in the log.

    Args:
        model: As in `PolarReward`.
        question: Column with the question that the reward model reads.
        end_tokens: Control tokens that a response ends with; they are taken off.
        timeout_seconds: Of AReaL's ``AsyncRewardWrapper``, if you make that yourself.
        **settings: As in `PolarReward`; ``max_wait`` has no effect.
    """
    settings = {"model": model, **settings}
    shared_reward(settings).check_single_calls("AReaL")
    return partial(_score_within, 0.8 * timeout_seconds, settings, question, tuple(end_tokens))


def _score_within(
    seconds: float,
    settings: Mapping[str, Any],
    question: str,
    end_tokens: Sequence[str],
    prompt: str,
    completion: str,
    prompt_ids: Any,
    completion_ids: Any,
    /,
    **row: Any,
) -> float:
    give_up_at = time.monotonic() + seconds
    future = shared_reward(settings).submit(_sample(completion, row, question, end_tokens))
    try:
        return future.result(max(0.0, give_up_at - time.monotonic())).score
    except FutureTimeoutError:
        future.cancel()
        # A TimeoutError would count as AReaL's own, and become 0.
        raise PolarError(
            f"{settings.get('server_address', 'the reward server')}: no reward within {seconds:g} s; see "
            f"whether it runs, or use polar_ft.rft.areal.PolarWorkflow, which waits longer"
        ) from None


def _sample(completion: str, row: Mapping[str, Any], question: str, end_tokens: Sequence[str]) -> Sample:
    references = row.get("references") or [row.get("reference")]
    return sample_of(row.get(question), references, without_end(completion, end_tokens), row.get("rule"))
