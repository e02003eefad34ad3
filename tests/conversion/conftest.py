"""A tiny base model, configs that name it, and checkpoints that mmengine and DeepSpeed really wrote."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from polar_ft.model.tiny_base import make_tiny_base
from polar_ft.model.weights import load_backbone
from polar_ft.template import PolarTemplate
from tests.encoding import encode, ids_of

ROOT = Path(__file__).parents[2]

OUR_CONFIG = """\
from polar_ft.template import PolarTemplate
from polar_ft.training.model import PolarRewardModel

pretrained_model_name_or_path = {base!r}
tokenizer = dict(
    type=PolarTemplate.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    max_length=300,
    max_response_length=80,
)
model = dict(
    type=PolarRewardModel,
    llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path),
    tokenizer=tokenizer,
)
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InternLM2-shaped base model: two layers of width 64, four heads in two groups."""
    texts = ["Which city is the capital of China?\nBeijing.", "It is Shanghai, I think.\nNo!"] * 20
    return make_tiny_base(tmp_path_factory.mktemp("models") / "base", texts, vocab_size=300)


@pytest.fixture
def config_file(base: Path, tmp_path: Path) -> Path:
    """A config of ours for the base model."""
    file = tmp_path / "config.py"
    file.write_text(OUR_CONFIG.format(base=str(base)))
    return file


@pytest.fixture(scope="session")
def template(base: Path) -> PolarTemplate:
    """With the limits of the config."""
    return PolarTemplate.from_pretrained(base, max_length=300, max_response_length=80)


@pytest.fixture(scope="session")
def sequences(template: PolarTemplate) -> list[list[int]]:
    """Token ids of five candidates of different lengths."""
    candidates = ["Beijing.", "It is Beijing, I think.", "", "Shanghai!", "no " * 30]
    return ids_of(encode(template, "Which city is the capital of China?", "Beijing.", candidates))


@pytest.fixture
def trained(base: Path) -> dict[str, torch.Tensor]:
    """What a `PolarRewardModel` would save: no weight is as in the base."""
    decoder, _, _ = load_backbone(base, torch.float32)
    generator = torch.Generator().manual_seed(1)
    state = {
        f"llm.{name}": tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in decoder.state_dict().items()
    }
    return state | {"v_head.weight": torch.randn(1, 64, generator=generator)}


@pytest.fixture
def checkpoint(trained: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The same as a file."""
    file = tmp_path / "iter_7.pth"
    torch.save({"meta": {"iter": 7}, "state_dict": trained}, file)
    return file


@pytest.fixture(scope="session")
def train(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``train(name)``: the last checkpoint of a run of ``train_tiny.py``; all are made when one is asked for.

    The processes of pytest-xdist share them.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "conversion_runs"

    def checkpoint(name: str) -> Path:
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                script = Path(__file__).with_name("train_tiny.py")
                result = subprocess.run(
                    [sys.executable, str(script), str(base), str(folder.with_suffix(".partial"))],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                )
                assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
                folder.with_suffix(".partial").rename(folder)
        return folder / name / "iter_4.pth"

    return checkpoint


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs ``tools/pth_to_hf.py`` and returns its exit status, what it said, and its errors in one line."""

    def run(*arguments):
        script = ROOT / "tools" / "pth_to_hf.py"
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(script), run_name="__main__")
        said = capsys.readouterr()
        return exit.value.code or 0, said.out, " ".join(said.err.split())

    return run


@pytest.fixture
def lora_checkpoint(base, template, tmp_path) -> Path:
    """A checkpoint of a LoRA run whose adapters and head are random."""
    from polar_ft.training.model import PolarRewardModel

    torch.manual_seed(0)
    model = PolarRewardModel(
        llm=dict(pretrained_model_name_or_path=str(base)), tokenizer=template, lora=dict(r=2, alpha=4)
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.3)
    file = tmp_path / "iter_1.pth"
    torch.save({"state_dict": state}, file)
    return file
