"""A real vLLM on a model that ``polar-ft convert --as llama`` wrote, against the InternLM2 model itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from polar_ft.client import RewardModelClient
from polar_ft.conversion.convert import convert_folder
from polar_ft.parity.inputs import parity_inputs
from polar_ft.parity.measure import measure_parity
from polar_ft.scoring.scorer import RewardScorer
from tests.encoding import ids_of
from tests.engines.conftest import ENVIRONMENT
from tests.engines.servers import Vllm, vllm_server
from tests.engines.test_vllm import TOLERANCE


@pytest.fixture(scope="module")
def internlm2(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With another RoPE base than every default, and the dynamic scaling that engines read differently."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("llama") / "internlm2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(internlm2: Path) -> Path:
    convert_folder(internlm2, internlm2.with_name("llama"))
    return internlm2.with_name("llama")


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """Without code of the folder, and without an option that says what kind of model it is."""
    with vllm_server(
        Path(str(ENVIRONMENT)), llama, tmp_path_factory.mktemp("vllm"), remote_code=False
    ) as running:
        yield running


def test_vllm_gives_one_raw_reward_per_text(server: Vllm, internlm2: Path):
    """No switch in the request: the config says that it is a regression, so there is no sigmoid."""
    scorer = RewardScorer.from_pretrained(internlm2)
    inputs = parity_inputs(scorer.template, 11)
    ids = [
        ids for group in scorer.template.encode([item.group() for item in inputs]) for ids in ids_of(group)
    ]
    expected = scorer.score([row for item in inputs for row in item.rows()])
    assert min(expected) < 0
    assert max(expected) > 1
    answer = httpx.post(f"http://{server.address}/pooling", json={"input": ids}, timeout=120).json()
    assert [item["data"] for item in answer["data"]] == [[pytest.approx(r, abs=TOLERANCE)] for r in expected]
    with RewardModelClient(internlm2, server_address=server.address) as client:
        assert client([row for item in inputs for row in item.rows()]) == pytest.approx(
            expected, abs=TOLERANCE, rel=0
        )


def test_parity(server: Vllm, llama: Path):
    """Training code, transformers without code of the folder, and vLLM."""
    report = measure_parity(
        str(llama), servers=[server.address], n_inputs=22, max_length=1000, max_response_length=250
    )
    assert [way.name for way in report.comparisons] == ["training code", "transformers", server.address]
    assert report.n_texts == 88
    for way in report.comparisons:
        assert way.error is None
        assert (way.max_abs_diff or 0.0) <= TOLERANCE, way
