"""The tiny model in this process, served and not."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest

from polar_ft.scoring.scorer import RewardScorer
from polar_ft.serving.app import create_app
from tests.serving.tiny import running, write_tiny_reward_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    return write_tiny_reward_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def scorer(model_folder) -> RewardScorer:
    return RewardScorer.from_pretrained(model_folder, tokens_per_batch=400)


@pytest.fixture(scope="session")
def client(scorer) -> Iterator[httpx.Client]:
    """Of a server without a key."""
    with running(create_app(scorer, name="tiny")) as address, http(address) as client:
        yield client


def http(address: str, **settings) -> httpx.Client:
    """A client that goes through no proxy."""
    return httpx.Client(base_url=address, trust_env=False, timeout=30, **settings)


class HeldScorer(RewardScorer):
    """Scores when it is let go: what arrives meanwhile waits in the queue."""

    def __init__(self, scorer: RewardScorer) -> None:
        super().__init__(
            scorer.decoder, scorer.head, scorer.template, tokens_per_batch=scorer.tokens_per_batch
        )
        self.begun = threading.Event()
        self.go = threading.Event()
        self.batches: list[int] = []

    def score_groups(self, groups):
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append(sum(len(group.branches) for group in groups))
        return super().score_groups(groups)


@pytest.fixture
def held(scorer) -> Iterator[HeldScorer]:
    held = HeldScorer(scorer)
    yield held
    held.go.set()
