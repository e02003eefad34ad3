"""The tiny model of tests/serving."""

from __future__ import annotations

import pytest

from polar_ft.scoring.scorer import RewardScorer
from tests.serving.tiny import write_tiny_reward_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    return write_tiny_reward_model(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="session")
def scorer(model_folder) -> RewardScorer:
    return RewardScorer.from_pretrained(model_folder)
