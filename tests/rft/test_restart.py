"""A server that is killed and started again costs time: every sample keeps its own reward, scored once."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from polar_ft.rft.reward import Reward
from tests.client.fake_server import Answer
from tests.rft.test_reward import expected, samples


def test_a_restart_in_the_middle_of_single_samples(serve, reward_from, template):
    """Killed with 8 requests in progress and more waiting; those that were answered are not asked again."""
    batch = samples(400)
    killed = threading.Event()

    def die(number: int, rewards: list[float]) -> Answer | None:
        if number < 6:
            return None
        killed.set()
        return Answer(reset=True)

    first = serve(fault=die)
    reward = reward_from(first, gather_ms=1)

    async def run() -> list[Reward]:
        calls = []
        for start in range(0, len(batch), 20):  # as finished rollouts come in
            calls += [
                asyncio.ensure_future(reward.score_async(sample)) for sample in batch[start : start + 20]
            ]
            await asyncio.sleep(0.01)
        return await asyncio.gather(*calls)

    def restart() -> None:
        assert killed.wait(30)
        while first.at_once:  # what it has scored is answered
            time.sleep(0.001)
        first.stop()
        time.sleep(0.3)
        restarted.append(serve(port=first.port))

    restarted: list = []
    thread = threading.Thread(target=restart)
    thread.start()
    rewards = asyncio.run(run())
    thread.join()
    assert [r.score for r in rewards] == pytest.approx([expected(template, sample) for sample in batch])
    assert all(r.answered for r in rewards)
    scored = [tuple(ids) for server in (first, *restarted) for ids in server.scored]
    assert len(first.scored) > 0
    assert len(restarted[0].scored) > 0
    assert len(scored) == len(set(scored)) == len(batch)
