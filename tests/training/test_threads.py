"""The threads of a run on a CPU: measured once, and the same in a run that is resumed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.logging import MessageHub

from polar_ft.model.backbones import decoder_config
from polar_ft.training import threads
from polar_ft.training.threads import measure_threads, set_threads

SIZES = dict(model_type="internlm2", bias=False, vocab_size=100, hidden_size=32, intermediate_size=64,
             num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)  # fmt: skip


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's default is four here; afterwards it is as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    yield
    torch.set_num_threads(before)


def measured(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    found = {int(name.removeprefix("of_")): value for name, value in seconds.items()}
    monkeypatch.setattr(threads, "measure_threads", lambda config: found)


def runner_of(hub: MessageHub) -> Any:
    return SimpleNamespace(message_hub=hub, logger=logging.getLogger("test_threads"))


def test_one_two_and_four_are_measured_and_nothing_is_left_changed() -> None:
    config = decoder_config(SIZES, "config.json")
    random_state = torch.get_rng_state()
    seconds = measure_threads(config)
    assert list(seconds) == [1, 2, 4]
    assert all(value > 0 for value in seconds.values())
    assert torch.get_num_threads() == 4
    assert config.num_hidden_layers == 3
    # Dropout of a run draws from it.
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_resumed_run_computes_with_the_threads_of_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    measured(monkeypatch, of_1=3.0, of_2=1.0, of_4=2.0)
    first = MessageHub("first run")
    set_threads(runner_of(first), None, resumed=False)  # type: ignore[arg-type]
    assert torch.get_num_threads() == 2
    assert "threads: 2, measured on one layer (1: 3000 ms, 2: 1000 ms, 4: 2000 ms)" in caplog.text

    saved = first.state_dict()
    resumed = MessageHub("resumed run")
    resumed.load_state_dict(saved)
    torch.set_num_threads(4)
    measured(monkeypatch, of_1=1.0, of_2=2.0, of_4=2.0)  # the machine is another now
    set_threads(runner_of(resumed), None, resumed=True)  # type: ignore[arg-type]
    assert torch.get_num_threads() == 2
    assert "threads: 2, as the checkpoint was trained" in caplog.text


def test_a_checkpoint_that_does_not_say_was_trained_with_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, of_1=1.0, of_4=9.0)
    hub = MessageHub("older run")
    set_threads(runner_of(hub), None, resumed=True)  # type: ignore[arg-type]
    assert torch.get_num_threads() == 4


def test_what_the_user_sets_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "4")
    monkeypatch.setattr(threads, "measure_threads", lambda config: pytest.fail("measured"))
    hub = MessageHub("user's run")
    set_threads(runner_of(hub), None, resumed=False)  # type: ignore[arg-type]
    assert not caplog.text
    torch.set_num_threads(1)
    set_threads(runner_of(hub), None, resumed=True)  # type: ignore[arg-type]
    assert torch.get_num_threads() == 1
    assert "OMP_NUM_THREADS=4 makes it the same" in caplog.text
