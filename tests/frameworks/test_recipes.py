"""The recipes of examples/rft: every command line is composed and validated by the framework it is for."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polar_ft.rft.data import write_rl_data
from tests.frameworks.conftest import ENVIRONMENTS, FLOOR, ROOT

# InternLM/POLAR, examples/ppo, commit 80626f3: nodes, batch, prompt and response length, micro batch, share
# of GPU memory, max_num_batched_tokens (8192 is verl's default), epochs, steps between validations.
PUBLISHED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("llama3.1-8b", "general"): (1, 1024, 1024, 1024, 2, 0.7, 8192, 1, -1),
    ("llama3.1-8b", "hh-rlhf"): (1, 512, 128, 512, 2, 0.7, 8192, 5, -1),
    ("llama3.1-8b", "math"): (1, 1024, 1024, 1024, 2, 0.7, 8192, 100, 5),
    ("qwen2.5-7b", "general"): (1, 1024, 1024, 1024, 2, 0.7, 8192, 1, -1),
    ("qwen2.5-7b", "hh-rlhf"): (1, 512, 128, 512, 2, 0.7, 8192, 5, -1),
    ("qwen2.5-7b", "math"): (1, 1024, 1024, 1024, 2, 0.7, 8192, 100, 5),
    ("qwen3-8b", "general"): (4, 1024, 1024, 15000, 1, 0.8, 16384, 1, -1),
    ("qwen3-8b", "hh-rlhf"): (2, 512, 128, 16000, 1, 0.8, 16384, 5, -1),
    ("qwen3-8b", "math"): (4, 1024, 1024, 15000, 1, 0.8, 16384, 100, 5),
}
MODELS = {
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
# What all nine have in common.
COMMON = {
    "algorithm.adv_estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_ctrl.kl_coef": 0,
    "data.filter_overlong_prompts": True,
    "data.truncation": "error",
    "data.prompt_key": "prompt",
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.use_shm": False,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.03,
    "actor_rollout_ref.actor.clip_ratio": 0.2,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 32,
    "critic.model.enable_gradient_checkpointing": True,
    "critic.model.use_remove_padding": True,
    "critic.optim.lr": 1e-5,
    "critic.optim.lr_warmup_steps_ratio": 0,
    "critic.optim.min_lr_ratio": 0.1,
    "critic.use_dynamic_bsz": False,
    "trainer.n_gpus_per_node": 8,
    "trainer.critic_warmup": 0,
    "trainer.save_freq": 100,
    # Not set by the published scripts: defaults of verl 0.5, which 0.9 must not have changed.
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.2,
    "actor_rollout_ref.actor.clip_ratio_c": 3.0,
    "actor_rollout_ref.actor.grad_clip": 1.0,
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "critic.cliprange_value": 0.5,
    "critic.ppo_epochs": 1,
    "critic.grad_clip": 1.0,
    "critic.optim.weight_decay": 0.01,
    "data.shuffle": True,
}
# What 0.9 has renamed.
OF_VERSION = {
    "0.5": {
        "critic.optim.warmup_style": "cosine",
        "critic.model.fsdp_config.param_offload": False,
        "critic.model.fsdp_config.optimizer_offload": False,
        "actor_rollout_ref.actor.optim.warmup_style": "constant",
        "reward_model.enable": False,
        "reward_model.reward_manager": "batch",
        "function": "polar_ft.rft.verl.compute_score_batch",
    },
    "0.9": {
        "critic.optim.lr_scheduler_type": "cosine",
        "critic.fsdp.param_offload": False,
        "critic.fsdp.optimizer_offload": False,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "reward.reward_model.enable": False,
        "reward.reward_manager.name": "naive",
        "function": "polar_ft.rft.verl.compute_score",
    },
}


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with a chat template, saved by transformers 4, whose files every environment reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=4096,
    )
    folder = tmp_path_factory.mktemp("policy")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overrides_of(version: str, *arguments: str) -> list[str]:
    """What a launcher gives to verl."""
    environment = {
        "PATH": os.environ["PATH"],
        "REWARD_MODEL": "models/lr=1e-5/it's mine",
        "REWARD_SERVERS": "gpu-1:30000,gpu-2:30001",
        "TRAIN_FILE": "/data/train.parquet",
        "VAL_FILE": "/data/test.parquet",
        "OUT": "/runs/one",
    }
    launcher = ROOT / f"examples/rft/verl_{version}.sh"
    printed = subprocess.run(
        [launcher, "--print", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    words = shlex.split(printed.stdout.replace("\\\n", " "))
    assert words[:3] == ["python3", "-m", "verl.trainer.main_ppo"]
    return words[3:]


def value(config: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def values(config: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {key: value(config, key) for key in expected}


@pytest.mark.parametrize("version", ["0.5", "0.9"])
def test_verl_takes_the_recipes(run, policy, version):
    recipes = {
        f"{algorithm} {policy} {data}": overrides_of(version, *options, policy, data)
        for policy, data in PUBLISHED
        for algorithm, options in (("ppo", []), ("grpo", ["--grpo"]))
    }
    recipes["overridden"] = overrides_of(version, "qwen3-8b", "math", "--", "trainer.total_epochs=7")
    if version == "0.9":
        of_0_9 = "reward.custom_reward_function."
        recipes["keys of 0.5"] = [
            word.replace(of_0_9, of_0_9.removeprefix("reward.")) for word in recipes["overridden"]
        ]
    result = run(f"verl-{version}", "recipes_run.py", recipes=recipes, policy=str(policy))
    assert ".".join(map(str, result["version"])) == version
    composed = result["recipes"]
    for (policy, data), row in PUBLISHED.items():
        nodes, batch, prompt, response, micro_batch, memory, batched_tokens, epochs, test_freq = row
        of_row = {
            "trainer.nnodes": nodes,
            "data.max_prompt_length": prompt,
            "data.max_response_length": response,
            "actor_rollout_ref.rollout.gpu_memory_utilization": memory,
            "actor_rollout_ref.rollout.max_num_batched_tokens": batched_tokens,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": micro_batch,
            "actor_rollout_ref.model.path": MODELS[policy],
            "trainer.total_epochs": epochs,
            "trainer.test_freq": test_freq,
            "trainer.val_before_train": data == "math",
        }
        of_ppo = {
            "data.train_batch_size": batch,
            "actor_rollout_ref.actor.ppo_mini_batch_size": batch,
            "critic.ppo_mini_batch_size": batch,
            "critic.ppo_micro_batch_size_per_gpu": micro_batch,
            "critic.model.path": MODELS[policy],
        }
        ppo, grpo = composed[f"ppo {policy} {data}"], composed[f"grpo {policy} {data}"]
        expected = {**of_row, **of_ppo, **COMMON, **OF_VERSION[version]}
        assert values(ppo, expected) == expected

        # Ours: as many answers a step.
        assert values(grpo, of_row) == of_row
        assert value(grpo, "data.train_batch_size") * value(grpo, "actor_rollout_ref.rollout.n") == batch
        assert value(grpo, "algorithm.adv_estimator") == "grpo"
        assert value(grpo, "actor_rollout_ref.actor.use_kl_loss")
        assert value(grpo, "function") == OF_VERSION[version]["function"]

    assert value(composed["overridden"], "trainer.total_epochs") == 7
    keys = composed["overridden"]["reward"] if version == "0.9" else composed["overridden"]
    assert keys["custom_reward_function"]["reward_kwargs"] == {
        "model": "models/lr=1e-5/it's mine",
        "server_address": ["gpu-1:30000", "gpu-2:30001"],
        "watch": "/runs/one/watch",
    }
    if version == "0.9":  # why there are two launchers: these keys compose as well, and have no effect
        assert composed["keys of 0.5"]["function"] is None


def test_trl_recipe_trains_next_to_its_reward_model(rows, policy, model, tmp_path):
    """With cluster/beside.sh: a real server, the real parity check, then two steps of training."""
    assert ENVIRONMENTS
    python = Path(ENVIRONMENTS).resolve() / "trl/bin/python"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "REWARD_MODEL": str(model),
        "REWARD_PORT": str(port),
        "POLAR_FT": str(Path(sys.executable).with_name("polar-ft")),
        # There are none.
        "POLICY_GPUS": "0",
        "REWARD_GPUS": "1",
    }

    def call(*command: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, command))
        return subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500
        )

    data, train = tmp_path / "rows.jsonl", tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({**row, "prompt": row["question"]}) + "\n" for row in rows))
    write_rl_data(str(data), train, "trl")
    recipe = [
        *(python, ROOT / "examples/rft/trl_grpo.py", "--reward_model", model, "--reward_servers"),
        *(f"127.0.0.1:{port}", "--model_name_or_path", policy, "--train_file", train, "--output_dir", "out"),
        *("--per_device_train_batch_size", 16, "--max_completion_length", 12, "--max_steps", 2),
        *("--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--dtype", "float32"),
        *("--report_to", "none", "--save_strategy", "no"),
    ]
    failed = call(*recipe)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "polar-ft calibrate" in failed.stderr  # the reward model was not calibrated
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()

    done = call(ROOT / "examples/rft/cluster/beside.sh", *recipe, "--floor", FLOOR)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    before, parity, training = done.stdout.partition("largest difference")
    assert f"reward server 127.0.0.1:{port} answers" in before
    assert parity
    logs = [line for line in training.splitlines() if "rewards/polar/mean" in line]
    assert len(logs) == 2
    assert all("'kl'" in line for line in logs)  # our default has a KL term
    assert (tmp_path / "out/model.safetensors").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))  # the server was ended


# Names of the published table, and how many of OpenCompass's data sets each is.
BY_RULES = {
    "mmlu": 57,
    "mmlu_pro": 14,
    "cmmlu": 67,
    "bbeh": 23,
    "korbench": 5,
    "gpqa": 1,
    "supergpqa": 1,
    "olympiadbench": 5,
    "aime2024": 1,
    "aime2025": 1,
    "mbpp": 1,
    "lcb-code": 1,
}
BY_A_JUDGE = {
    "alignment_bench": 1,
    "alpaca_eval": 1,
    "arenahard": 1,
    "followbench": 2,
    "mtbench": 3,
    "wildbench": 1,
}
# How the names of data sets begin, where they do not begin with the published name.
BEGINNINGS = {
    "mmlu": "lukaemon_mmlu_",
    "gpqa": "GPQA_diamond",
    "olympiadbench": "OlympiadBench_",
    "lcb-code": "lcb_code_generation",
}


def benchmark_of(dataset: str, benchmarks: dict[str, int]) -> str:
    """The published name of a data set; the longest, as mmlu_pro also begins with mmlu."""
    fitting = [name for name in benchmarks if dataset.startswith(BEGINNINGS.get(name, name))]
    return max(fitting, key=len)


def test_opencompass_takes_the_benchmarks(run, monkeypatch):
    folder = ROOT / "examples/rft/opencompass"
    for name, given in {
        "POLICY_URL": "http://policy.example:8000/v1",
        "POLICY_NAME": "my-policy",
        "JUDGE_NAME": "my-judge",
        "OPENAI_API_KEY": "a-key-for-no-file",
        "THINKING": "1",
    }.items():
        monkeypatch.setenv(name, given)
    configs = {name: str(folder / f"{name}.py") for name in ("rules", "judged")}
    result = run("opencompass", "opencompass_run.py", configs=configs)
    assert len(BY_RULES) + len(BY_A_JUDGE) == 18
    for name, benchmarks in (("rules", BY_RULES), ("judged", BY_A_JUDGE)):
        found = result[name]
        assert Counter(benchmark_of(abbr, benchmarks) for abbr in found["datasets"]) == benchmarks
        assert found["infer_tasks"] == len(found["datasets"])
        assert found["eval_tasks"] > 0
        assert set(found["max_out_len"]) == {16384}
        assert set(found["cleaned"].values()) == {"Yes."}
        assert "a-key-for-no-file" not in found["dumped"]
        policy = ["policy", "my-policy", "http://policy.example:8000/v1", "EMPTY"]
        judge = ["judge", "my-judge", "https://api.openai.com/v1", "ENV"]
        assert found["models"] == ([policy] if name == "rules" else [policy, judge])
    assert not any("LM" in evaluator for evaluator in result["rules"]["datasets"].values())
    assert len(result["rules"]["summary"]["dataset_abbrs"]) == 12
    assert len(result["rules"]["cleaned"]) == sum(BY_RULES.values())
    left = set(result["judged"]["datasets"]) - set(result["judged"]["cleaned"])
    assert left == {"mtbench_0.0", "mtbench_0.1", "mtbench_0.7"}
