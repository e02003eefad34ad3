"""Real engines, in an environment of their own: run by `make test-engines`, not by the ordinary test run.

POLAR_ENGINES names that environment, which tools/engine_env.sh makes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.servers import Vllm, polar_server, vllm_server

ENVIRONMENT = os.environ.get("POLAR_ENGINES")
if not ENVIRONMENT:
    collect_ignore_glob = ["test_*.py"]

ROOT = Path(__file__).parents[2]
# Cutting happens below the context that vLLM is started with.
MAX_LENGTH, MAX_RESPONSE_LENGTH = 1000, 250


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random InternLM2ForRewardModel, exported as `polar-ft convert` does it, in float32."""
    import torch

    from polar_ft.conversion.huggingface import write_hf_folder
    from polar_ft.model.tiny_base import make_tiny_base, texts_of
    from polar_ft.model.weights import load_backbone
    from polar_ft.template import PolarTemplate

    folder = tmp_path_factory.mktemp("models")
    # Heads of 32 dimensions: vLLM's attention for CPUs has no smaller ones.
    texts = texts_of([ROOT / "examples/data/alpaca_held_out.jsonl"])
    base = make_tiny_base(folder / "base", texts, hidden=128, heads=4, kv_heads=2)
    decoder, _, _ = load_backbone(base, torch.float32)
    state = {f"llm.{name}": tensor for name, tensor in decoder.state_dict().items()}
    state["v_head.weight"] = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    write_hf_folder(
        state,
        base_folder=base,
        out_dir=folder / "tiny",
        template=PolarTemplate.from_pretrained(
            base, max_length=MAX_LENGTH, max_response_length=MAX_RESPONSE_LENGTH
        ),
        dtype=torch.float32,
    )
    return folder / "tiny"


@pytest.fixture(scope="session")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """vLLM, started as docs/engines.md says, which leaves its sigmoid on."""
    assert ENVIRONMENT
    with vllm_server(Path(ENVIRONMENT), model, tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.fixture(scope="session")
def polar(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `polar-ft serve`."""
    with polar_server(model, tmp_path_factory.mktemp("polar")) as address:
        yield address
