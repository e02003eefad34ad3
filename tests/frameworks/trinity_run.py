"""Runs Trinity-RFT's own workflow with a policy that gives known answers, and writes down its rewards."""

import json
import sys
from pathlib import Path

import torch
from trinity.common.config import FormatConfig
from trinity.common.experience import Experience
from trinity.common.rewards import REWARD_FUNCTIONS
from trinity.common.workflows.workflow import SimpleWorkflow, Task

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())
settings = {"model": given["model"], "server_address": given["server"], "floor": given["floor"]}


class Policy:
    """Answers what it is told to."""

    def __init__(self, outputs: list[str]) -> None:
        self.outputs = outputs

    def chat(self, messages: list[dict], **args: object) -> list[Experience]:
        return [
            Experience(tokens=torch.tensor([1, 2]), prompt_length=1, response_text=output)
            for output in self.outputs
        ]


def run(row: dict, outputs: list[str], **more: object) -> list[Experience]:
    task = Task(
        workflow=SimpleWorkflow,
        reward_fn=REWARD_FUNCTIONS.get("polar_ft.rft.trinity.PolarRewardFn"),
        reward_fn_args={**settings, **more},
        format_args=FormatConfig(prompt_key="question", response_key="label"),
        raw_task={**row, "label": {"prompt": row["question"], "reference": row["reference"]}},
    )
    workflow = task.to_workflow(Policy(outputs))
    workflow.set_repeat_times(len(outputs), 0)
    return workflow.run()


experiences = [run(row, [row["output"]])[0] for row in given["rows"]]
try:
    run(given["rows"][0], ["4"], server_address="127.0.0.1:9", max_wait=0.2)
    away = ""
except Exception as error:  # Trinity's runner catches all of them
    away = f"{type(error).__name__}: {error}"
result = {
    "rewards": [experience.reward for experience in experiences],
    "metrics": [experience.metrics for experience in experiences],
    "away": away,
}
(folder / "result.json").write_text(json.dumps(result))
