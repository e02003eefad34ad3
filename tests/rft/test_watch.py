"""The watch is silent on a run that learns, and alarms on one that pleases the reward model."""

from __future__ import annotations

import random

import pytest

from polar_ft.errors import DataError
from polar_ft.groups import TextGroup
from polar_ft.rft.watch import RewardWatch, alarms, read_watch

FACTS = ["red", "blue", "green", "yellow", "white", "black"]


def run(folder, answers, steps=30, size=128):
    """A run whose answers are those of ``answers(step, fact, rng)`` with a reward."""
    rng = random.Random(0)
    watch = RewardWatch(folder, every=size)
    for step in range(steps):
        for _ in range(size):
            fact = rng.choice(FACTS)
            answer, reward = answers(step, fact, rng)
            watch.add(reward, answer, f"Finished in {fact}.", truncated=False)
    return read_watch(folder)


def learns(step, fact, rng):
    right = rng.random() < 0.3 + 0.02 * step
    said = fact if right else rng.choice(FACTS)
    return rng.choice(["It is {}.", "You get it in {}.", "The answer: {}."]).format(
        said
    ), 10.0 if right else -5.0


def test_silent_on_a_run_that_learns(tmp_path):
    lines = run(tmp_path, learns)
    assert len(lines) == 30
    assert lines[-1].answers == 30 * 128
    assert lines[-1].reward > lines[0].reward + 5
    assert alarms(lines) == []


@pytest.mark.parametrize(
    ("hacked", "expected"),
    [
        (lambda fact: "They trout. trout. trout. trout. trout.", "answers repeat themselves"),
        (
            lambda fact: "It is blue, as anyone can see, and so are lamps, chairs, cups and rugs.",
            "answers grow",
        ),
        (lambda fact: "Yes.", "answers shrink"),
        (lambda fact: f"Finished in {fact}.", "answers copy the reference"),
        (lambda fact: None, "outputs have no answer"),
    ],
)
def test_alarms_on_what_pleases(tmp_path, hacked, expected):
    def answers(step, fact, rng):
        return learns(step, fact, rng) if step < 10 else (hacked(fact), 5.0)

    found = alarms(run(tmp_path, answers, steps=14))
    assert any(sentence.startswith(expected) for sentence in found), found
    assert all("reward +" in sentence for sentence in found)


def test_one_odd_batch_is_no_alarm(tmp_path):
    odd = run(tmp_path, lambda step, fact, rng: ("", 0.0) if step == 12 else learns(step, fact, rng))
    assert alarms(odd[:13]) == []


def test_files_hold_no_texts(tmp_path):
    run(tmp_path, learns, steps=2)
    text = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "answer" in text
    assert "blue" not in text


def test_what_is_no_watch_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no rewards"):
        read_watch(tmp_path)
    (tmp_path / "rewards-a-1.jsonl").write_text('{"answers": 1}\n')
    with pytest.raises(DataError, match=r"rewards-a-1.jsonl:1: is not a line"):
        read_watch(tmp_path)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run(tmp_path, learns, steps=3)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-20])
    assert len(read_watch(tmp_path)) == 2


def test_rewards_are_watched(serve, reward_from, tmp_path):
    reward = reward_from(serve(), watch=tmp_path, watch_every=4)
    outputs = ["a b a b a b", "<think>no", "Finished in red.", "x"]
    reward.score([TextGroup("Q?", ("Finished in red.",), (output,)) for output in outputs])
    (line,) = read_watch(tmp_path)
    assert (line.answers, line.unanswered) == (4, 0.25)
    assert line.repetition == pytest.approx((0.6 + 0 + 0 + 0) / 4)
    assert line.overlap == pytest.approx((0 + 0 + 1 + 0) / 4)
