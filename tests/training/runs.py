"""Real training runs on tiny models, for the tests of this folder: each is run once and looked at by many."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[2]
PAIRS = 60


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        status: Exit status of the command.
        output: Standard output and standard error.
        work_dir: What the run was given as ``--work-dir``.
    """

    status: int
    output: str
    work_dir: Path

    @property
    def tail(self) -> str:
        """The end of the output: what went wrong, without the config and the environment before it."""
        return self.output[-3000:]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that ``last_checkpoint`` names."""
        return Path((self.work_dir / "last_checkpoint").read_text())

    def scalars(self, name: str) -> dict[int, float]:
        """What TensorBoard has of a scalar: step to value."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = self.work_dir.glob("*/vis_data/events.*")
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        return {event.step: event.value for event in accumulator.Scalars(name)}


def run(command: Sequence[str], work_dir: Path, home: Path, **environment: str) -> Run:
    """Runs a command line of this environment, with a home of its own; ``--work-dir`` is added."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    ended = subprocess.run(
        [*command, "--work-dir", str(work_dir)],
        cwd=home,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return Run(ended.returncode, ended.stdout, work_dir)


def edit_config(source: str, out: Path, **lines: Any) -> Path:
    """A shipped config with some of its ``name = value`` lines replaced, as a user would edit them."""
    text = (REPOSITORY / "configs" / source).read_text(encoding="utf-8")
    for name, value in lines.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}".replace("\\", r"\\"), text)
        assert count == 1, f"{source} has {count} lines {name} = …"
    out.write_text(text, encoding="utf-8")
    return out


def replace_in_config(config: Path, **replacements: tuple[str, str]) -> None:
    """Replaces texts that a config holds exactly once; the keyword names the replacement in errors."""
    text = config.read_text(encoding="utf-8")
    for name, (old, new) in replacements.items():
        assert text.count(old) == 1, f"{name}: {config} has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    config.write_text(text, encoding="utf-8")


def use_model(config: Path, module: str, name: str) -> None:
    """Makes a config train another model class."""
    replace_in_config(
        config,
        model_import=(
            "from polar_ft.training.model import PolarRewardModel",
            f"from {module} import {name}",
        ),
        model_type=("type=PolarRewardModel", f"type={name}"),
    )


def make_rows(pairs: int = PAIRS) -> list[dict[str, Any]]:
    """Pairs that are easily told apart by a word, each with a prompt of its own."""
    words = "red blue green small large round square old new cold warm bright".split()
    generator = random.Random(0)
    rows = []
    for number in range(pairs):
        first, second, third = generator.sample(words, 3)
        rows.append(
            {
                "prompt": f"What is item {number} like?",
                "reference": f"It is {first} and {second}.",
                "chosen": f"Item {number} is certainly {first}.",
                "rejected": f"Item {number} is perhaps {third}.",
            }
        )
    return rows


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes JSON lines."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def write_zero_settings(file: Path, **zero_optimization: Any) -> Path:
    """DeepSpeed's settings in float32, so that losses can be compared with those of one process."""
    settings = {
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_optimization,
    }
    file.write_text(json.dumps(settings), encoding="utf-8")
    return file


def like_published(base: Path, out: Path, vocab_size: int = 92544) -> Path:
    """A copy of a tiny base with the vocabulary size, control-token ids and RoPE scaling of POLAR-7B."""
    shutil.copytree(base, out)
    spec = json.loads((base / "tokenizer.json").read_text())
    ids = {"<|reward|>": 92397, "[UNUSED_TOKEN_130]": 92527}
    vocab = {piece: index for piece, index in spec["model"]["vocab"].items() if piece not in ids}
    taken = {*vocab.values(), *ids.values()}
    vocab |= {f"filler {index}": index for index in range(vocab_size) if index not in taken}
    spec["model"]["vocab"] = vocab | ids
    for token in spec["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    (out / "tokenizer.json").write_text(json.dumps(spec))

    config = json.loads((base / "config.json").read_text())
    config |= {"vocab_size": vocab_size, "rope_theta": 5e7}
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    for name in ("model.tok_embeddings.weight", "output.weight"):
        tensors[name] = torch.randn(vocab_size, config["hidden_size"]) * 0.1
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def with_tokenizer_code(base: Path, out: Path) -> Path:
    """A copy of a base whose tokenizer needs Python code of the folder, as that of POLAR-7B does."""
    shutil.copytree(base, out)
    (out / "tokenizer.json").rename(out / "vocabulary.json")
    names = [None, "tokenization_internlm2_fast.InternLM2TokenizerFast"]
    (out / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": names}}))
    (out / "tokenization_internlm2_fast.py").write_text(
        "from tokenizers import Tokenizer\n"
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class InternLM2TokenizerFast(PreTrainedTokenizerFast):\n"
        '    vocab_files_names = {"vocabulary": "vocabulary.json"}\n\n'
        "    def __init__(self, vocabulary, **settings):\n"
        "        super().__init__(tokenizer_object=Tokenizer.from_file(vocabulary), **settings)\n"
    )
    return out
