"""Every sample gets its own reward, however it is asked for, or an error that names it."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import CancelledError, Future

import pytest

from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup
from polar_ft.reward_scale import RewardScale
from polar_ft.rft.reward import PolarReward, Reward, measured_floor, sample_of, shared_reward
from tests.client.fake_server import Answer, reward_of


def samples(n: int) -> list[TextGroup]:
    return [TextGroup(f"Question {i // 4}?", (f"Reference {i // 4}",), (f"Answer {i}",)) for i in range(n)]


def expected(template, group: TextGroup, reference: int = 0) -> float:
    group = TextGroup(group.prompt, (group.references[reference],), group.candidates)
    return reward_of(template.encode([group])[0].sequences[0].tolist())


def test_a_batch_in_its_order(serve, reward_from, template):
    batch = samples(50)
    rewards = reward_from(serve()).score(batch)
    assert [r.score for r in rewards] == pytest.approx([expected(template, sample) for sample in batch])
    assert {(r.answered, r.truncated) for r in rewards} == {(True, False)}
    assert [r.length for r in rewards] == [len(f"Answer {i}") for i in range(50)]


def test_single_samples_are_sent_together(serve, reward_from, template):
    server, batch = serve(), samples(200)
    reward = reward_from(server, gather_ms=50)

    async def all_at_once() -> list[Reward]:
        return await asyncio.gather(*map(reward.score_async, batch))

    rewards = asyncio.run(all_at_once())
    assert [r.score for r in rewards] == pytest.approx([expected(template, sample) for sample in batch])
    assert server.n_requests <= 4  # of at most 128 inputs; 200 without gathering
    assert len(server.scored) == 200


def test_threads_get_their_own_rewards(serve, reward_from, template):
    reward, batch = reward_from(serve()), samples(64)
    found: dict[int, float] = {}

    def ask(number: int) -> None:
        found[number] = reward.submit(batch[number]).result().score

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == pytest.approx({n: expected(template, sample) for n, sample in enumerate(batch)})


def test_without_a_thread_for_the_timer_nobody_waits_for_ever(serve, reward_from, template, monkeypatch):
    reward, (sample,) = reward_from(serve()), samples(1)
    reward.score([sample])  # the client's thread runs

    def no_thread(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", no_thread)
    for _ in range(2):
        assert reward.submit(sample).result(timeout=10).score == pytest.approx(expected(template, sample))


def test_the_same_sample_is_scored_once(serve, reward_from):
    server = serve()
    first, second, _ = reward_from(server).score([samples(1)[0], samples(1)[0], samples(2)[1]])
    assert first == second
    assert len(server.scored) == 2


def test_thoughts_are_not_scored_and_no_answer_gets_the_floor(serve, reward_from, template):
    server = serve()
    question = samples(1)[0]
    with_thoughts, none_came = (
        TextGroup(question.prompt, question.references, (text,))
        for text in ("<think>Let me see.</think>\n\nAnswer 0", "<think>Let me see. Answer 0")
    )
    scored, floor = reward_from(server).score([with_thoughts, none_came])
    assert scored.score == pytest.approx(expected(template, question))
    assert floor == Reward(-20.0, -20.0, answered=False, truncated=False, overlong=False, length=0)
    assert len(server.scored) == 1


@pytest.mark.parametrize(
    ("how", "combine"), [("max", max), ("mean", lambda values: sum(values) / len(values))]
)
def test_several_references(serve, reward_from, template, how, combine):
    sample = sample_of("2 + 2?", ["4", "IV", "four"], "It is 4.")
    (reward,) = reward_from(serve(), references=how).score([sample])
    assert reward.score == pytest.approx(combine([expected(template, sample, i) for i in range(3)]))


def test_what_was_cut_is_said(serve, reward_from):
    reward = reward_from(serve())
    cut, fits = reward.score([TextGroup("Q?", ("r",), ("word " * 5000,)), TextGroup("Q?", ("r",), ("word",))])
    assert (cut.truncated, fits.truncated) == (True, False)


def test_a_sample_that_cannot_be_encoded_fails_alone(serve, reward_from, template):
    reward = reward_from(serve())
    good = samples(1)[0]
    # The reference leaves no room for the prompt.
    reward.client.template.max_length, reward.client.template.max_response_length = 600, 300
    bad = TextGroup("Which one?", ("r" * 300,), ("a",))
    futures = [reward.submit(sample) for sample in (good, bad)]
    assert futures[0].result().score == pytest.approx(expected(template, good))
    with pytest.raises(PolarError, match="prompt that begins 'Which one"):
        futures[1].result()


def test_a_server_that_comes_back_costs_time_only(serve, reward_from, template):
    server = serve()
    reward, batch = reward_from(server), samples(40)
    assert len(reward.score(batch[:4])) == 4
    server.stop()
    futures = [reward.submit(sample) for sample in batch]
    time.sleep(0.5)
    assert not any(future.done() for future in futures)
    serve(port=server.port)
    found = [future.result(timeout=60).score for future in futures]
    assert found == pytest.approx([expected(template, sample) for sample in batch])


def test_a_server_that_stays_away_is_an_error_that_names_it(serve, reward_from):
    server = serve()
    server.stop()
    future = reward_from(server, max_wait=0.3).submit(samples(1)[0])
    with pytest.raises(PolarError, match=server.address):
        future.result(timeout=30)


def test_requests_that_are_cancelled_leave_nobody_waiting(serve, reward_from, monkeypatch):
    reward = reward_from(serve())
    scoring = Future()
    monkeypatch.setattr(reward.client, "submit_encoded", lambda groups: scoring)
    future = reward.submit(samples(1)[0])
    time.sleep(0.1)
    scoring.cancel()
    with pytest.raises(CancelledError):
        future.result(timeout=10)


def test_a_watch_that_cannot_write_costs_no_reward(serve, reward_from, tmp_path, monkeypatch):
    reward = reward_from(serve(), watch=tmp_path, watch_every=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reward._watch, "add", full)
    assert reward.submit(samples(1)[0]).result(timeout=10).answered


def test_an_error_after_the_reward_leaves_nobody_waiting(serve, reward_from, tmp_path, monkeypatch):
    reward = reward_from(serve(), watch=tmp_path)
    monkeypatch.setattr(reward._watch, "add", None)
    with pytest.raises(TypeError):
        reward.submit(samples(1)[0]).result(timeout=10)


def test_references_are_compared_without_their_thoughts(serve, reward_from, template):
    plain = TextGroup("Q?", ("Four.",), ("4",))
    reward = reward_from(serve(), think_in_prompt=True)
    texts = ("<think>2 + 2</think>Four.", "Four.")
    batch = [TextGroup("Q?", (text,), ("<think>Hm</think>4",)) for text in texts]
    assert [one.score for one in reward.score(batch)] == pytest.approx([expected(template, plain)] * 2)
    with pytest.raises(PolarError, match=r"prompt that begins 'Q\?': a reference has <think> and no answer"):
        reward.score([TextGroup("Q?", ("<think>2 + 2",), ("4",))])


def test_a_thought_that_the_prompt_opens_has_a_tag(serve, reward_from):
    with pytest.raises(PolarError, match="think_in_prompt: has no effect without tags"):
        reward_from(serve(), think_start="", think_end="", think_in_prompt=True)


def test_channels_of_gpt_oss(serve, reward_from, template):
    tags = {"think_start": "<|channel|>analysis<|message|>", "think_end": "<|channel|>final<|message|>"}
    start = "<|channel|>analysis<|message|>2 + 2<|end|><|start|>assistant"
    outputs = [f"{start}<|channel|>final<|message|>4", start]
    scored, none = reward_from(serve(), **tags).score([TextGroup("Q?", ("4",), (o,)) for o in outputs])
    assert scored.score == pytest.approx(expected(template, TextGroup("Q?", ("4",), ("4",))))
    assert not none.answered


def test_wrong_answers_are_never_a_reward(serve, reward_from):
    server = serve(fault=lambda number, rewards: Answer(500))
    with pytest.raises(PolarError, match="500"):
        reward_from(server).score(samples(3))


def test_the_floor_is_measured_or_given(tmp_path, tokenizer_dir):
    with pytest.raises(PolarError, match="polar-ft calibrate"):
        PolarReward(tokenizer_dir)
    RewardScale(centre=-6, spread=2, quantiles={"p01": -11.0}).save(tmp_path)
    assert measured_floor(tmp_path) == -13.0


def test_settings_of_a_framework_make_one_reward(serve, tokenizer_dir):
    server = serve()
    settings = {"model": str(tokenizer_dir), "server_address": [server.address], "floor": -20.0}
    assert shared_reward(settings) is shared_reward(dict(reversed(settings.items())))
    with pytest.raises(PolarError, match="serverr is unknown"):
        shared_reward(settings | {"serverr": "x"})
    with pytest.raises(PolarError, match="model is missing"):
        shared_reward({})


def test_a_sample_without_reference_is_named():
    with pytest.raises(PolarError, match="references"):
        sample_of("Q?", [], "a")
    with pytest.raises(PolarError, match="reference"):
        sample_of("Q?", [None], "a")


def test_one_reward_for_several_event_loops(serve, reward_from, template):
    """A framework may run a loop of its own for every batch, and drop calls."""
    reward, batch = reward_from(serve(), gather_ms=50), samples(30)

    async def ask(some: list[TextGroup]) -> list[float]:
        dropped = asyncio.ensure_future(reward.score_async(some[0]))
        await asyncio.sleep(0)
        dropped.cancel()
        return [found.score for found in await asyncio.gather(*map(reward.score_async, some))]

    for some in (batch[:10], batch[10:20], batch[20:]):
        assert asyncio.run(ask(some)) == pytest.approx([expected(template, sample) for sample in some])
    never_awaited = asyncio.new_event_loop()
    never_awaited.run_until_complete(_start(reward, batch[0]))
    never_awaited.close()
    assert asyncio.run(ask(batch[:5])) == pytest.approx([expected(template, s) for s in batch[:5]])
    gc.collect()
    assert len(reward._inboxes) <= 1  # those of loops that have ended are gone


async def _start(reward: PolarReward, sample: TextGroup) -> None:
    task = asyncio.ensure_future(reward.score_async(sample))
    await asyncio.sleep(0)
    assert not task.done()


def test_the_tokenizer_code_that_is_allowed_reaches_the_client(tokenizer_dir, monkeypatch):
    seen = {}

    class Client:
        def __init__(self, model, **settings):
            seen.update(settings)

    monkeypatch.setattr("polar_ft.rft.reward.RewardModelClient", Client)
    PolarReward(tokenizer_dir, floor=-9.0, allow_tokenizer_code=["module.Tokenizer"])
    assert seen["allow_tokenizer_code"] == ["module.Tokenizer"]
