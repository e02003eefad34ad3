"""Trains a tiny policy with TRL for a few steps and writes down every reward that TRL was given."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from polar_ft.rft.trl import PolarRewardFunction, async_reward_function

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())
trainer_class, config_class = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[
    given["trainer"]
]

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
)
tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
policy = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=4096,
    )
)
policy.save_pretrained(folder / "policy")  # RLOO loads the model that it stays near from there


calls = []


def recorded(prompts, completions, references, rewards):
    """Keeps what TRL gave and got."""
    for prompt, completion, reference, reward in zip(prompts, completions, references, rewards, strict=True):
        calls.append({"prompt": prompt, "output": completion, "reference": reference, "reward": reward})
    return rewards


settings = {"model": given["model"], "server_address": given["server"], "floor": given["floor"]}
if given["form"] == "sync":
    function = PolarRewardFunction(**settings)

    def polar(prompts, completions, **columns):
        rewards = function(prompts, completions, **columns)
        return recorded(prompts, completions, columns["reference"], rewards)
else:
    coroutine = async_reward_function(**settings)

    async def polar(prompts, completions, **columns):
        rewards = await coroutine(prompts, completions, **columns)
        return recorded(prompts, completions, columns["reference"], rewards)


rows = [{"prompt": row["question"], "reference": row["reference"]} for row in given["rows"]]
trainer = trainer_class(
    str(folder / "policy"),
    reward_funcs=polar,
    args=config_class(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=12,
        max_steps=3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
logs = [entry for entry in trainer.state.log_history if "reward" in entry]
(folder / "result.json").write_text(json.dumps({"calls": calls, "logs": logs}))
