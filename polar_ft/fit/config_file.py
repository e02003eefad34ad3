"""Writes the config that an expert would have written: every setting, and why it is what it is."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from polar_ft.errors import printable
from polar_ft.files import write_atomically
from polar_ft.fit.choices import Base, Choice

# What is not chosen, with what it is for; a value of --set goes before these.
DEFAULTS: dict[str, tuple[Any, str]] = {
    "loss_type": ("ranking", 'Bradley–Terry; or "focal", or "margin" (rows with a "margin")'),
    "penalty_type": ("none", 'or "log_barrier", "L2"'),
    "reference_dropout": (0.0, "share of rows trained without reference: one model then also scores without"),
    "fused_kernels": (False, "True: RMSNorm, rotary embedding and SwiGLU by liger-kernel; on a GPU only"),
    "layout": ("tree", 'the prefix that candidates share is computed once; "flat": once for each candidate'),
    "packs_per_step": (None, "packs of each GPU in a step; None takes as few as hold it"),
    "betas": ((0.9, 0.95), ""),
    "weight_decay": (0, ""),
    "max_norm": (1, ""),
    "warmup_ratio": (0.03, ""),
    "seed": (0, ""),
    "save_total_limit": (2, ""),
    "max_bad_steps": (5, "a non-finite loss updates nothing; so many such steps in a row end the run"),
    "log_interval": (1, ""),
    "track": (None, 'a tracking service as well: "wandb", "mlflow", …; docs/training.md lists them'),
    "val_metric": ("accuracy", "the best checkpoint is kept by this; of equal ones that of lower log-loss"),
    "val_patience": (None, "training ends after so many validations without a new best; None: at the end"),
}
_WIDTH = 110


def write_config(
    file: Path,
    choices: Sequence[Choice],
    base: Base,
    *,
    data_name: str,
    train: Path,
    val: Path,
    work_dir: Path,
    on_gpu: bool,
) -> None:
    """Writes a config.

    Args:
        file: The config.
        choices: Settings with their reasons.
        base: The base model.
        data_name: Of the data, for the first line.
        train: Rows to train on.
        val: Rows that choose the best checkpoint.
        work_dir: Where training writes.
        on_gpu: Whether it is trained on a GPU.
    """
    chosen = {choice.name: (choice.value, choice.reason) for choice in choices}
    paths = {
        "pretrained_model_name_or_path": (base.name, "the base model"),
        "data": (str(train), "rows to train on"),
        "val_data": (str(val), "rows that choose the best checkpoint; none of their prompts is trained on"),
        "work_dir": (str(work_dir), "checkpoints and logs"),
        "reward_token_id": (base.reward_token_id, "the token whose hidden state is scored: a check"),
        "reward_tokens": (dict(base.reward_tokens), "the two control tokens"),
        "allow_tokenizer_code": (base.allow_tokenizer_code, "no other code of the base's folder is run"),
    }
    values = {**DEFAULTS, **paths, **chosen}
    strategy, gpus = chosen["deepspeed"][0], chosen["gpus"][0]
    deepspeed = f" --deepspeed {strategy}" if strategy else ""
    prefix = f"NPROC_PER_NODE={gpus} " if gpus > 1 else ""
    name = shlex.quote(os.path.relpath(file))
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((files(__package__) / "config.py.j2").read_text(encoding="utf-8"))
    text = template.render(
        setting=lambda setting: setting_lines(setting, *values[setting]),
        base=_one_line(base.name),
        data_name=_one_line(data_name),
        file=name,
        command=f"{prefix}polar-ft train {name}{deepspeed}",
        deepspeed=deepspeed,
        on_gpu=on_gpu,
    )
    write_atomically(file, text)


def setting_lines(name: str, value: Any, reason: str) -> str:
    """A line of a config, its reason after it where there is room, else above it.

    >>> print(setting_lines("lr", 1e-05, "published for 1.8B"))
    lr = 1e-5  # published for 1.8B
    >>> print(setting_lines("lora", {"r": 64}, ""))
    lora = dict(r=64)
    """
    line = f"{name} = {as_code(value)}"
    if not reason:
        return line
    if len(line) + len(reason) + 4 <= _WIDTH:
        return f"{line}  # {reason}"
    comment = textwrap.wrap(reason, _WIDTH - 2)
    return "\n".join([*(f"# {part}" for part in comment), line])


def as_code(value: Any) -> str:
    """A value as a config has it.

    >>> as_code(2e-05), as_code({"r": 64, "load_in_4bit": True}), as_code(("a",)), as_code("x")
    ('2e-5', 'dict(r=64, load_in_4bit=True)', '("a",)', '"x"')
    """
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={as_code(item)}' for key, item in value.items())})"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(as_code, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, str):
        quoted = repr(value)
        return f'"{quoted[1:-1]}"' if quoted[0] == "'" and '"' not in value else quoted
    return re.sub(r"e-0(\d)", r"e-\1", repr(value))


def _one_line(text: str) -> str:
    """For a comment: nothing of a name may end the line."""
    return printable(" ".join(text.split()))
