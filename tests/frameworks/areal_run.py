"""Runs episodes of AReaL's own workflow with known answers, and its wrapper of reward functions."""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from areal.api import AsyncRewardWrapper, ModelResponse
from areal.api.cli_args import GenerationHyperparameters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polar_ft.rft.areal import PolarWorkflow, make_reward_fn

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())
rows = [{"messages": row["question"], **row} for row in given["rows"]]
settings = {"model": given["model"], "server_address": given["server"], "floor": given["floor"]}
away = {**settings, "server_address": "127.0.0.1:9"}

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def engine(output: str) -> SimpleNamespace:
    """An inference engine that gives one answer."""
    ids = [*tokenizer.encode(output), tokenizer.eos_token_id]

    async def agenerate(request: object) -> ModelResponse:
        zeros = [0] * len(ids)
        return ModelResponse([1], ids, output_logprobs=[0.0] * len(ids), output_versions=zeros)

    return SimpleNamespace(agenerate=agenerate)


async def episodes() -> list[float]:
    # All in one request, as the expected rewards are computed: float32 rounds otherwise in other batches.
    reward = {**settings, "gather_ms": 2000}
    workflow = PolarWorkflow(reward=reward, gconfig=GenerationHyperparameters(), tokenizer=tokenizer)
    results = await asyncio.gather(*(workflow.arun_episode(engine(row["output"]), row) for row in rows))
    return [result["rewards"].item() for result in results]


async def error_of(call: object) -> str:
    try:
        return f"returned {await call}"
    except Exception as error:  # AReaL's executor catches all of them
        return f"{type(error).__name__}: {error}"


async def wrapped(reward_fn: object, seconds: float, row: dict) -> float:
    wrapper = AsyncRewardWrapper(reward_fn, timeout_seconds=seconds)
    return await wrapper("the templated prompt", f"{row['output']}</s>", [1], [2], **row)


async def main() -> dict:
    short = PolarWorkflow(
        reward={**away, "max_wait": 0.2}, gconfig=GenerationHyperparameters(), tokenizer=tokenizer
    )
    return {
        "episodes": await episodes(),
        "wrapped": [await wrapped(make_reward_fn(**settings), 60.0, row) for row in rows[:6]],
        "away": {
            "workflow": await error_of(short.arun_episode(engine("4"), rows[0])),
            "wrapped": await error_of(wrapped(make_reward_fn(**away, timeout_seconds=4.0), 4.0, rows[0])),
        },
    }


if __name__ == "__main__":  # the wrapper's processes may import this file
    (folder / "result.json").write_text(json.dumps(asyncio.run(main())))
