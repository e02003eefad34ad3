"""A random reward model, exported as a trained one is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from polar_ft.conversion.huggingface import write_hf_folder  # noqa: E402
from polar_ft.model.tiny_base import make_tiny_base  # noqa: E402
from polar_ft.model.weights import load_backbone  # noqa: E402
from polar_ft.template import PolarTemplate  # noqa: E402


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InternLM2ForRewardModel of two layers, in float32; at most 600 tokens, responses 150."""
    folder = tmp_path_factory.mktemp("models")
    base = make_tiny_base(folder / "base", ["The bridge was closed.", "桥关闭了。"] * 20, vocab_size=300)
    decoder, _, _ = load_backbone(base, torch.float32)
    state = {f"llm.{name}": tensor for name, tensor in decoder.state_dict().items()}
    state["v_head.weight"] = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    template = PolarTemplate.from_pretrained(base, max_length=600, max_response_length=150)
    write_hf_folder(state, base_folder=base, out_dir=folder / "tiny", template=template, dtype=torch.float32)
    return folder / "tiny"


@pytest.fixture
def with_config(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same model with other fields in its config.json."""

    def change(**fields: object) -> Path:
        folder = shutil.copytree(model, tmp_path / "changed")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")
        return folder

    return change


@pytest.fixture(scope="session")
def template(model: Path) -> PolarTemplate:
    """Of the model."""
    return PolarTemplate.from_pretrained(model)
