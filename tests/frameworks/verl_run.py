"""Gives rows to verl's own reward managers and writes down the rewards that they make."""

import asyncio
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

VERSION = tuple(map(int, importlib.metadata.version("verl").split(".")[:2]))
LENGTH = 4096

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
        non_tensors={name: columns[name] for name in ("data_source", "reward_model", "extra_info")},
    )


settings = {"model": given["model"], "server_address": [given["server"]], "floor": given["floor"]}
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

    async def chunk() -> list[dict]:
        # Inside the event loop, which the manager keeps.
        manager = get_reward_manager_cls("naive")(
            config=config, tokenizer=tokenizer, compute_score=get_custom_reward_fn(config)
        )
        data = batch()
        return await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(len(rows))))

    results = asyncio.run(chunk())
    rewards = [float(result["reward_score"]) for result in results]
    extra = {
        name: [float(result["reward_extra_info"][name]) for result in results]
        for name in results[0]["reward_extra_info"]
    }

(folder / "result.json").write_text(json.dumps({"version": VERSION, "rewards": rewards, "extra": extra}))
