"""Training runs from the command line: they end well, and leave checkpoints and curves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polar_ft.training.config import parse_config
from tests.training.conftest import STEPS, RunOnce
from tests.training.runs import PAIRS, REPOSITORY, Run, edit_config, replace_in_config, write_zero_settings

CURVES = (
    "loss",
    "accuracy",
    "margin",
    "chosen_score",
    "rejected_score",
    "lr",
    "grad_norm",
    "pairs_per_s",
    "tokens_per_s",
)


@pytest.fixture(scope="session")
def zero2_run(project: Path, run_once: RunOnce) -> Run:
    return run_once("zero2", "xtuner", "train", str(project / "tiny.py"), "--deepspeed", "deepspeed_zero2")


@pytest.fixture(scope="session")
def two_ranks_run(project: Path, run_once: RunOnce) -> Run:
    """ZeRO-3 on two ranks, in float32 so that its losses can be compared with those of one rank."""
    file = write_zero_settings(project / "zero3_float32.json", stage=3, stage3_param_persistence_threshold=0)
    return run_once(
        "two_ranks",
        *("polar-ft", "train", str(project / "tiny.py"), "--deepspeed", str(file)),
        NPROC_PER_NODE="2",
    )


@pytest.fixture(params=["plain_run", "zero2_run", "two_ranks_run"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def test_run_ends_well_and_saves(any_run):
    assert any_run.status == 0, any_run.tail
    assert any_run.checkpoint.name == f"iter_{STEPS}.pth"
    assert any_run.checkpoint.exists()
    assert (any_run.work_dir / "iter_2.pth").exists()
    assert "Traceback" not in any_run.tail


@pytest.mark.parametrize("name", CURVES)
def test_tensorboard_has_every_optimizer_step(any_run, name):
    values = any_run.scalars(name)
    assert list(values) == list(range(1, STEPS + 1))
    assert all(map(math.isfinite, values.values()))


def test_curves_mean_what_their_names_say(plain_run):
    chosen, rejected = plain_run.scalars("chosen_score"), plain_run.scalars("rejected_score")
    margin = plain_run.scalars("margin")
    # A head of zeros: the first loss is that of a coin, log 2.
    assert plain_run.scalars("loss")[1] == pytest.approx(math.log(2), abs=1e-6)
    for step in range(1, STEPS + 1):
        assert margin[step] == pytest.approx(chosen[step] - rejected[step], abs=1e-6)
        assert 0 <= plain_run.scalars("accuracy")[step] <= 1
        assert plain_run.scalars("pairs")[step] == PAIRS / STEPS
        assert plain_run.scalars("flat_tokens")[step] > plain_run.scalars("tokens")[step]
    # Warm-up of one step from a tenth of the rate, then cosine down to a tenth.
    assert plain_run.scalars("lr")[1] == pytest.approx(3e-3)
    assert plain_run.scalars("lr")[2] == pytest.approx(3e-2)


def test_first_step_does_not_depend_on_the_precision(plain_run, zero2_run):
    assert zero2_run.scalars("loss")[1] == pytest.approx(plain_run.scalars("loss")[1], abs=1e-6)
    assert zero2_run.scalars("grad_norm")[1] == pytest.approx(plain_run.scalars("grad_norm")[1], rel=0.05)


def test_two_ranks_have_the_losses_of_one(plain_run, two_ranks_run):
    for name in (*(name for name in CURVES if not name.endswith("_per_s")), "pairs", "tokens"):
        one, two = plain_run.scalars(name), two_ranks_run.scalars(name)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), name
    losses = plain_run.scalars("loss")
    assert losses[3] < losses[1] - 0.01  # so that the comparison says something


def test_checkpoint_has_the_names_of_the_training_model(plain_run):
    state = torch.load(plain_run.checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    assert state["v_head.weight"].shape == (1, 32)
    assert "llm.layers.0.self_attn.q_proj.weight" in state
    assert "llm.embed_tokens.weight" in state


def test_published_configs_differ_in_the_published_rates_only():
    texts = [(REPOSITORY / "configs" / f"polar_{size}_custom.py").read_text() for size in ("1_8b", "7b")]
    lines = [{line for line in text.splitlines() if not line.startswith("#")} for text in texts]
    assert {line.split(" = ")[0] for line in lines[0] ^ lines[1]} == {"lr", "pretrained_model_name_or_path"}
    assert "lr = 1e-5" in lines[0]
    assert "lr = 2e-5" in lines[1]


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_every_config_names_a_backend(config):
    """mmengine's runner for DeepSpeed ends in TypeError where a config has no env_cfg."""
    assert parse_config(config)["env_cfg"]["dist_cfg"]["backend"] in ("nccl", "gloo")


@pytest.mark.parametrize(("size", "base"), [("1_8b", "published"), ("7b", "with_code")])
def test_published_configs_train(project, run_once, size, base):
    """Unedited but for the paths; the second base keeps its tokenizer in code, which the config allows."""
    name = f"polar_{size}_custom.py"
    config = edit_config(
        name,
        project / name,
        pretrained_model_name_or_path=str(project / base),
        data=str(project / "rows.jsonl"),
    )
    ended = run_once(f"published_{size}", "xtuner", "train", str(config), "--deepspeed", "deepspeed_zero2")
    assert ended.scalars("loss")[1] == pytest.approx(math.log(2), abs=1e-6), ended.tail
    assert ended.checkpoint.is_dir()
    assert ended.checkpoint.name == "iter_1.pth"


def test_hooks_of_a_user_are_called(project: Path, run_once: RunOnce):
    config = project / "hooked.py"
    text = (project / "tiny.py").read_text()
    hooks = "from tests.training.variants import NotingHook\n\ncustom_hooks = [dict(type=NotingHook)]\n"
    config.write_text(f"{text}\n{hooks}")
    ended = run_once("hooked", "xtuner", "train", str(config), PYTHONPATH=str(REPOSITORY))
    assert (ended.work_dir / "hook_calls").read_text().splitlines() == [
        "before_run at 0",
        "before_train at 0",
        *(f"after_train_iter {PAIRS // STEPS} at {step}" for step in range(STEPS)),
        f"after_train at {STEPS}",
    ]


def test_hooks_of_mmengine_that_the_loop_replaces_are_refused(project: Path, run_once: RunOnce):
    config = project / "default_hooks.py"
    config.write_text((project / "tiny.py").read_text())
    replace_in_config(config, hooks=("timer=None, logger=None, ", ""))
    ended = run_once("default_hooks", "polar-ft", "train", str(config))
    assert ended.status == 1, ended.tail
    assert "the config registers mmengine's IterTimerHook, LoggerHook" in ended.tail
    assert "Traceback" not in ended.output


def test_xtuner_convert_writes_what_our_command_writes(project: Path, plain_run: Run, tmp_path: Path):
    """`xtuner convert pth_to_hf` calls the model's `to_hf`; its default is float16."""
    config, checkpoint = str(project / "tiny.py"), str(plain_run.checkpoint)
    commands = {
        "xtuner": ["xtuner", "convert", "pth_to_hf", config, checkpoint],
        "polar_ft": ["polar-ft", "convert", config, checkpoint, "--dtype", "float16"],
    }
    # xtuner starts the first "python" of PATH, and exits 0 where that fails.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name, command in commands.items():
        program = Path(sys.executable).with_name(command[0])
        command = [str(program), *command[1:]]
        command.insert(4 if name == "polar_ft" else len(command), str(tmp_path / name))
        ended = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-2000:]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("polar_ft", "xtuner"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("config.json", "tokenizer.json", "modeling_internlm2.py"):
        assert (tmp_path / "polar_ft" / file).read_text() == (tmp_path / "xtuner" / file).read_text()
