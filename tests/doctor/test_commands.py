"""``polar-ft doctor CONFIG`` and ``polar-ft plan``."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from polar_ft.cli import app
from polar_ft.doctor import commands, run
from polar_ft.doctor.settings import read_settings, read_shape
from polar_ft.errors import PolarError
from tests.training.runs import edit_config, replace_in_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def only_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "check_environment", lambda folder: [])


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def findings(*arguments: str) -> dict[str, Any]:
    return json.loads(call(*arguments, "--json").stdout)


def test_what_a_run_will_take(project: Path) -> None:
    found = findings("doctor", str(project / "tiny.py"), "--warmup-seconds", "1")
    assert not [check for check in found["checks"] if check["status"] == "problem"]
    rows = len((project / "rows.jsonl").read_text().splitlines())
    assert found["data"]["rows"] == rows
    assert found["data"]["sampled_rows"] is None
    assert found["data"]["largest_pack"] <= 512
    assert any("cut" in line for line in found["data"]["lines"])
    time = found["time"]
    # The whole is the measured speed times the tokens, and an update for each step.
    cost, steps = found["data"]["cost"], found["data"]["steps_per_epoch"]
    expected = cost * time["warmup"]["seconds_per_cost"] + steps * time["warmup"]["update_seconds"]
    assert time["seconds"] == pytest.approx(expected)
    assert time["warmup"]["peak"] > 0
    assert time["warmup"]["threads"] == int(os.environ.get("OMP_NUM_THREADS", time["warmup"]["threads"]))
    assert time["load"] >= 0
    assert time["estimated_peak"] > 0


def test_it_is_shown_in_a_hundred_columns(project: Path) -> None:
    result = call("doctor", str(project / "tiny.py"), "--no-warmup", "--gpus", "2")
    assert result.exit_code == 0, result.output
    assert "memory on each of 2 processes" in result.stdout
    assert "optimizer steps" in result.stdout
    assert "to train" not in result.stdout
    path = str(project)
    assert max(len(line) for line in result.stdout.splitlines() if path not in line) <= 100


def test_of_large_data_a_sample_is_scaled(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WHOLE_BYTES", 0)
    lines = (project / "rows.jsonl").read_text().splitlines()
    many = project / "many.jsonl"
    many.write_text("\n".join(lines * 40) + "\n")
    config = edit_config("polar_tiny_cpu.py", project / "many.py", **paths(project, data=str(many)))
    monkeypatch.setattr(run, "SAMPLE_ROWS", len(lines) * 8)
    data = findings("doctor", str(config), "--no-warmup")["data"]
    assert data["sampled_rows"] == len(lines) * 8
    # Bytes are counted every 64 lines, and lines differ in length.
    assert data["rows"] == pytest.approx(40 * len(lines), rel=0.3)
    assert findings("doctor", str(config), "--no-warmup", "--all-data")["data"]["rows"] == 40 * len(lines)


def paths(project: Path, **other: Any) -> dict[str, Any]:
    return dict(pretrained_model_name_or_path=str(project / "base"), data=str(project / "rows.jsonl")) | other


def test_data_that_cannot_be_used_is_a_problem(project: Path) -> None:
    bad = project / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    config = edit_config("polar_tiny_cpu.py", project / "bad.py", **paths(project, data=str(bad)))
    result = call("doctor", str(config), "--no-warmup")
    assert result.exit_code == 1
    assert "bad.jsonl:1" in result.stdout.replace("\n", "")
    missing = edit_config("polar_tiny_cpu.py", project / "bad.py", **paths(project, val_data="none.jsonl"))
    problems = [c["name"] for c in findings("doctor", str(missing), "--no-warmup")["checks"]
                if c["status"] == "problem"]  # fmt: skip
    assert problems == ["val_data"]


def test_nccl_without_a_gpu_is_a_problem_of_several_processes_only(project: Path, tmp_path: Path) -> None:
    config = edit_config("polar_tiny_cpu.py", tmp_path / "nccl.py", **paths(project))
    replace_in_config(config, backend=('backend="gloo"', 'backend="nccl"'))
    for gpus, problems in (("1", []), ("2", ["backend"])):
        checks = findings("doctor", str(config), "--no-warmup", "--gpus", gpus)["checks"]
        assert [check["name"] for check in checks if check["status"] == "problem"] == problems


def test_offload_has_to_fit_the_machine(project: Path) -> None:
    settings = read_settings(project / "tiny.py")
    shape, _ = read_shape(settings, None)
    host = 2**40
    for device, gpus in (("cuda", 1), ("cuda", 4), ("cpu", 2)):
        memory = run.memory_table(settings, shape, gpus=gpus, available=2**40, device=device, host=host)
        offload = memory.estimates[-1]
        assert memory.fits(offload)
        # On a CPU the processes' own peaks are in the same memory.
        needed = offload.host + (gpus * offload.peak if device == "cpu" else 0)
        for given, fits in ((needed, True), (needed - 1, False)):
            assert replace(memory, host=given).fits(offload) is fits


def test_a_model_that_is_not_here_but_whose_shape_is_given(project: Path, tmp_path: Path) -> None:
    where = paths(project, pretrained_model_name_or_path="nobody/no-such-model")
    config = edit_config("polar_tiny_cpu.py", tmp_path / "elsewhere.py", **where)
    unknown = findings("doctor", str(config))["checks"]
    assert [check["status"] for check in unknown] == ["problem"]
    assert "--model-config" in unknown[0]["found"]
    found = findings("doctor", str(config), "--model-config", str(project / "base"))
    assert found["memory"]["parameters"] > 0
    assert found["data"]["pairs"] > 0
    assert found["data"]["tokens"] is None
    assert "tokenizer" in {check["name"] for check in found["checks"]}
    assert "not_known" in found["time"]


def test_plan_of_the_shipped_7b_config() -> None:
    config = str(CONFIGS / "polar_7b_custom.py")
    found = findings("plan", config, "--gpus", "8")
    # InternLM2-7B has 7.74 billion parameters, of which 92544 · 4096 are its output layer.
    assert found["parameters"] == pytest.approx(7.74e9 - 92544 * 4096, rel=0.002)
    fits = {row["strategy"]: row["fits"] for row in found["strategies"]}
    assert fits == {"none": False, "zero1": True, "zero2": True, "zero3": True, "zero3_offload": True}
    one = call("plan", config, "--gpus", "1")
    assert one.exit_code == 0
    assert "--deepspeed deepspeed_zero3_offload" in one.stdout
    assert "needs 145 GiB of the machine's memory" in one.stdout
    assert "nothing fits" in call("plan", config, "--gpu-memory", "10").stdout
    # ZeRO-3 with offload fits the GPU, but not a machine of 24 GiB.
    little = call("plan", config, "--host-memory", "24").stdout
    assert "nothing fits" in little
    assert "more memory in the machine" in little


def test_four_bits_and_zero3_do_not_go_together(project: Path, tmp_path: Path) -> None:
    lora = dict(r=4, alpha=8, load_in_4bit=True)
    config = edit_config("polar_tiny_cpu.py", tmp_path / "qlora.py", **paths(project, lora=lora))
    fits = {row["strategy"]: row["fits"] for row in findings("plan", str(config))["strategies"]}
    assert fits == {"none": True, "zero1": True, "zero2": True, "zero3": False, "zero3_offload": False}


def test_configs_that_cannot_be_planned(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n")
    with pytest.raises(PolarError, match=r"broken\.py: cannot be read"):
        read_settings(broken)
    other = tmp_path / "other.py"
    other.write_text("model = dict(type='Other')\ntrain_dataset = dict(data='x')\n")
    with pytest.raises(PolarError, match="only configs of polar_ft"):
        read_settings(other)
    with pytest.raises(PolarError, match="no such config file"):
        read_settings(tmp_path / "none.py")


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.py")))
def test_every_shipped_config_is_read(name: str) -> None:
    settings = read_settings(CONFIGS / name)
    assert settings.max_packed_length > 0
    if "tiny" not in name:
        assert read_shape(settings, None)[0]["vocab_size"] == 92544
