"""A tokenizer's folder, clients of it, and servers that are stopped after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polar_ft.client import RewardModelClient
from polar_ft.client.contact import probe_sequences
from polar_ft.template import PolarTemplate
from tests.client.fake_server import FakeServer
from tests.evaluation.conftest import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of one token a byte, as of a model."""
    folder = tmp_path_factory.mktemp("polar-tiny")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def template(tokenizer_dir: Path) -> PolarTemplate:
    return PolarTemplate.from_pretrained(tokenizer_dir)


@pytest.fixture
def serve(template: PolarTemplate) -> Iterator[Callable[..., FakeServer]]:
    """Starts servers."""
    known = [ids.tolist() for ids in probe_sequences(template)]
    servers: list[FakeServer] = []

    def start(*args: Any, **kwargs: Any) -> FakeServer:
        servers.append(FakeServer(*args, known=known, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def connect(tokenizer_dir: Path) -> Iterator[Callable[..., RewardModelClient]]:
    """Makes clients of servers; they retry quickly and give up soon."""
    clients: list[RewardModelClient] = []

    def make(*servers: FakeServer, **settings: Any) -> RewardModelClient:
        settings = {"retry_delay": 0.01, "max_retries": 3, "timeout": 10.0, **settings}
        addresses = [server.address for server in servers]
        clients.append(RewardModelClient(tokenizer_dir, server_address=addresses, **settings))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def data() -> list[dict[str, Any]]:
    """Thirty inputs, three for each of ten (prompt, reference)."""
    return make_data(30)


def make_data(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {i // 3}?"}],
            "reference": f"Reference {i // 3}",
            "output": [{"role": "assistant", "content": f"Answer {i} 中文" + "x" * (i % 7)}],
        }
        for i in range(n)
    ]
