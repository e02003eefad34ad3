"""Gives rows to verl's own reward managers and writes down the rewards that they make."""

import asyncio
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

VERSION = tuple(map(int, importlib.metadata.version("verl").split(".")[:2]))
LENGTH = 4096
COLUMNS = ("data_source", "reward_model", "extra_info", "raw_prompt")

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())
rows = given["rows"]

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def read_columns() -> dict[str, np.ndarray]:
    """The columns that verl's own data set makes of the Parquet file."""
    config = OmegaConf.create(
        {
            "prompt_key": "prompt",
            "max_prompt_length": LENGTH,
            "max_response_length": LENGTH,
            "filter_overlong_prompts": False,
            "truncation": "error",
            "return_raw_chat": True,
            "cache_dir": str(folder / "cache"),
        }
    )
    dataset = RLHFDataset(data_files=[given["parquet"]], tokenizer=tokenizer, config=config)
    return DataProto.from_single_dict(collate_fn([dataset[i] for i in range(len(rows))])).non_tensor_batch


def batch() -> DataProto:
    """Rows as verl's rollout hands them over: prompts padded left, responses padded right."""
    prompts = torch.full((len(rows), LENGTH), tokenizer.pad_token_id)
    responses = torch.full((len(rows), LENGTH), tokenizer.pad_token_id)
    mask = torch.zeros((len(rows), 2 * LENGTH), dtype=torch.long)
    columns = read_columns()
    for number, row in enumerate(rows):
        prompt = tokenizer.encode("the prompt in a chat template")
        response = [*tokenizer.encode(row["output"]), tokenizer.eos_token_id]
        assert len(response) <= LENGTH
        prompts[number, -len(prompt) :] = torch.tensor(prompt)
        responses[number, : len(response)] = torch.tensor(response)
        mask[number, LENGTH - len(prompt) : LENGTH + len(response)] = 1
    return DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": responses,
            "input_ids": torch.cat([prompts, responses], 1),
            "attention_mask": mask,
        },
        non_tensors={name: columns[name] for name in COLUMNS if name in columns},
    )


settings = {"model": given["model"], "server_address": [given["server"]], "floor": given["floor"]}
managed: dict[str, list[float]] = {}
function = {"path": "pkg://polar_ft.rft.verl", "name": "compute_score", "reward_kwargs": settings}

if VERSION < (0, 7):
    from verl.trainer.ppo.reward import load_reward_manager

    shim = folder / "polar_reward.py"
    shim.write_text("from polar_ft.rft.verl import compute_score_batch\n")
    config = OmegaConf.create(
        {
            "reward_model": {"reward_manager": "batch"},
            "custom_reward_function": {**function, "path": str(shim), "name": "compute_score_batch"},
            "data": {"reward_fn_key": "data_source"},
        }
    )
    manager = load_reward_manager(config, tokenizer, num_examine=0)
    result = manager(batch(), return_dict=True)
    extra = {name: list(map(float, values)) for name, values in result["reward_extra_info"].items()}
    rewards = result["reward_tensor"].sum(-1).tolist()
else:
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from verl.trainer.ppo.reward import get_custom_reward_fn

    keys = {"custom_reward_function": function}
    config = OmegaConf.create({"reward": keys, **keys, "reward_model": {}, "data": {}})

    async def chunk(make_manager: Callable[[], Any], data: DataProto) -> list[dict]:
        manager = make_manager()  # inside the event loop, which it keeps
        return await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(len(data))))

    def naive() -> Any:
        return get_reward_manager_cls("naive")(
            config=config, tokenizer=tokenizer, compute_score=get_custom_reward_fn(config)
        )

    results = asyncio.run(chunk(naive, batch()))
    rewards = [float(result["reward_score"]) for result in results]
    extra = {
        name: [float(result["reward_extra_info"][name]) for result in results]
        for name in results[0]["reward_extra_info"]
    }

if VERSION >= (0, 9):
    from verl.trainer.ppo.reward import load_reward_manager

    def ours(**more: Any) -> Any:
        """Our reward manager, found and made by verl."""
        module = {"path": "pkg://polar_ft.rft.verl_manager"}
        names = {"source": "importlib", "name": "PolarRewardManager", "module": module}
        kwargs = {"path": None, "reward_kwargs": {**settings, **more}}
        keys = {"reward_manager": names, "custom_reward_function": kwargs, "num_workers": 1}
        config = {"reward": keys, "actor_rollout_ref": {"rollout": {"n": 4}}}
        return load_reward_manager(OmegaConf.create(config), tokenizer)

    def scores(results: list[dict]) -> list[float]:
        return [float(result["reward_score"]) for result in results]

    data = batch()
    for info in data.non_tensor_batch["extra_info"][::2]:
        del info["prompt"]  # then the policy's own prompt is the question
    managed["rewards"] = scores(asyncio.run(chunk(ours, data)))
    # 16 prompts with 4 rollouts each, the outputs of neighbouring rows.
    grouped = batch()
    for values in grouped.non_tensor_batch.values():
        values[:] = values[np.arange(64) // 4 * 4]
    grouped.non_tensor_batch["uid"] = np.array([str(i // 4) for i in range(64)], dtype=object)
    managed["normalised"] = scores(asyncio.run(chunk(lambda: ours(normalise="group"), grouped)))

result = {"version": VERSION, "rewards": rewards, "extra": extra, "managed": managed}
(folder / "result.json").write_text(json.dumps(result))
