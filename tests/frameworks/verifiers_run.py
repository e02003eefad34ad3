"""Scores rollouts with verifiers' own task and writes down what it recorded on their traces."""

import asyncio
import json
import sys
from pathlib import Path

import verifiers.v1 as vf

from polar_ft.rft.verifiers import make_reward

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())


class QuestionData(vf.TaskData):
    reference: str


class QuestionTask(vf.Task[QuestionData]):
    polar = make_reward(given["model"], server_address=given["server"], floor=given["floor"], weight=0.5)


class UnreachableTask(vf.Task[QuestionData]):
    polar = make_reward(given["model"], server_address="127.0.0.1:9", floor=given["floor"], max_wait=0.2)


def trace_of(task: vf.Task, output: str) -> vf.Trace:
    """A finished rollout of one turn."""
    question = vf.UserMessage(content=task.data.prompt_text)
    answer = vf.AssistantMessage(content=output)
    return vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=[vf.MessageNode(message=question), vf.MessageNode(parent=0, message=answer, sampled=True)],
    )


def data_of(row: dict, number: int) -> QuestionData:
    """The prompt is a text or messages, as verifiers allows both."""
    messages = row["question"]
    prompt = messages[0]["content"] if number % 2 and len(messages) == 1 else messages
    return QuestionData(prompt=prompt, reference=row["reference"])


async def score_all() -> list[vf.Trace]:
    tasks = [QuestionTask(data_of(row, number)) for number, row in enumerate(given["rows"])]
    traces = [trace_of(task, row["output"]) for task, row in zip(tasks, given["rows"], strict=True)]
    await asyncio.gather(*(task.score(trace) for task, trace in zip(tasks, traces, strict=True)))
    return traces


async def score_without_server() -> dict:
    task = UnreachableTask(data_of(given["rows"][0], 0))
    trace = trace_of(task, "4")
    try:
        await task.score(trace)
    except vf.TaskError as error:
        return {"error": str(error), "recorded": trace.rewards["polar"]}
    raise AssertionError("no error")


traces = asyncio.run(score_all())
rewards = [trace.rewards["polar"].score for trace in traces]
result = {
    "rewards": rewards,
    "totals": [trace.reward for trace in traces],
    "away": asyncio.run(score_without_server()),
}
(folder / "result.json").write_text(json.dumps(result))
