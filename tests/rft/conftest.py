"""Servers, and rewards from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from polar_ft.rft.reward import PolarReward
from tests.client.conftest import serve, template, tokenizer_dir  # noqa: F401
from tests.client.fake_server import FakeServer


@pytest.fixture
def reward_from(tokenizer_dir) -> Iterator[Callable[..., PolarReward]]:  # noqa: F811
    """Makes a `PolarReward` of a server."""
    made: list[PolarReward] = []

    def make(server: FakeServer, **settings: Any) -> PolarReward:
        made.append(PolarReward(tokenizer_dir, server.address, **{"floor": -20.0, **settings}))
        return made[-1]

    yield make
    for reward in made:
        reward.close()
