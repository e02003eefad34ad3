"""verifiers, and prime-rl, which trains on its environments: a reward for a task::

    import verifiers.v1 as vf
    from polar_ft.rft.verifiers import make_reward

    class QuestionData(vf.TaskData):
        reference: str

    class QuestionTask(vf.Task[QuestionData]):
        polar = make_reward("my_rm", server_address="127.0.0.1:30000")

A row's data has ``reference`` or ``references``, and ``rule`` if it asks for one. An error is recorded on the
trace, whose reward then reads 0; prime-rl leaves out traces with an error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from polar_ft.rft.reward import sample_of, shared_reward


def make_reward(
    model: Any, *, prompt: str = "prompt", weight: float = 1.0, **settings: Any
) -> Callable[[Any, Any], Awaitable[float]]:
    """Makes the method of a task that scores a rollout's last message.

    Args:
        model: As in `PolarReward`.
        prompt: Field of the row's data with the question that the reward model reads.
        weight: Of this reward among the task's others.
        **settings: As in `PolarReward`.
    """
    from verifiers.v1 import reward as mark_as_reward

    reward = shared_reward({"model": model, **settings})
    reward.check_single_calls("verifiers")

    async def polar(self: Any, trace: Any) -> float:
        data = self.data
        question = getattr(data, prompt)
        if not isinstance(question, str):
            question = [message.model_dump(include={"role", "content"}) for message in question or []]
        references = getattr(data, "references", None) or [getattr(data, "reference", None)]
        messages = trace.assistant_messages
        output = messages[-1].content if messages else None
        sample = sample_of(question, references, output or "", getattr(data, "rule", None))
        return (await reward.score_async(sample)).score

    return mark_as_reward(polar, weight=weight)
