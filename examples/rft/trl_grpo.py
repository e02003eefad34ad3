"""Trains a policy with TRL's GRPO and POLAR's rewards; made for and run with TRL 1.16.

    accelerate launch examples/rft/trl_grpo.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --output_dir outputs/grpo \\
        --train_file train.jsonl --reward_model my_rm --reward_servers gpu-1:30000 gpu-2:30000 \\
        --max_completion_length 1024 --per_device_train_batch_size 8 --gradient_accumulation_steps 16

``train.jsonl`` is written by ``polar-ft data to-trl``. Every option of `GRPOConfig` and `ModelConfig` can be
given, or stand in a YAML file (``--config FILE``). Generation by vLLM on the GPUs that train:
``--use_vllm --vllm_mode colocate --vllm_gpu_memory_utilization 0.3``; on others: ``trl vllm-serve --model …``
there, and here ``--use_vllm --vllm_mode server --vllm_server_base_url http://gpu-3:8000``.

The defaults set below are our own: nobody has published or measured them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

from polar_ft.errors import PolarError
from polar_ft.rft.trl import PolarRewardFunction

# As DeepSeekMath (arXiv 2402.03300), but 8 answers a prompt instead of 64. TRL's own beta is 0: without a KL
# term a policy learns to exploit the reward model.
DEFAULTS = {
    "beta": 0.04,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "num_generations": 8,
    "logging_steps": 1,
    "save_steps": 100,
}


@dataclass
class RewardArguments:
    """Where the questions and the rewards come from."""

    train_file: str = field(metadata={"help": "JSONL file of `polar-ft data to-trl`."})
    reward_model: str = field(
        metadata={"help": "Folder of the reward model; its tokenizer and settings are read."}
    )
    reward_servers: list[str] = field(metadata={"help": "Where it is served: host:port, one or several."})
    question_column: str | None = field(
        default=None,
        metadata={"help": "Column with the question for the reward model, if it is not the policy's prompt."},
    )
    floor: float | None = field(
        default=None,
        metadata={
            "help": "Reward of an output without an answer; measured by `polar-ft calibrate` if not given."
        },
    )
    think_in_prompt: bool = field(
        default=False, metadata={"help": "The policy's chat template ends with <think>."}
    )
    watch: str | None = field(
        default=None, metadata={"help": "Folder for figures of the answers, for `polar-ft rft watch`."}
    )


def main() -> None:
    """Parses the command line and trains."""
    parser = TrlParser((RewardArguments, GRPOConfig, ModelConfig))
    parser.set_defaults(**DEFAULTS)
    given, config, model = parser.parse_args_and_config()
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    trainer = GRPOTrainer(
        model.model_name_or_path,
        reward_funcs=PolarRewardFunction(
            given.reward_model,
            server_address=given.reward_servers,
            prompt=given.question_column,
            floor=given.floor,
            think_in_prompt=given.think_in_prompt,
            watch=given.watch,
        ),
        args=config,
        train_dataset=load_dataset("json", data_files=given.train_file, split="train"),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    try:
        main()
    except PolarError as error:
        raise SystemExit(f"error: {error}") from None
