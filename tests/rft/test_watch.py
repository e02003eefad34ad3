"""The watch is silent on a run that learns, and alarms on one that pleases the reward model."""

from __future__ import annotations

import json
import random

import pytest
from tensorboard.backend.event_processing import event_accumulator
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.errors import DataError, PolarError
from polar_ft.groups import TextGroup
from polar_ft.rft import commands
from polar_ft.rft.watch import RewardWatch, WatchLine, alarms, read_watch

FACTS = ["red", "blue", "green", "yellow", "white", "black"]


def run(folder, answers, steps=30, size=128):
    """A run whose answers are those of ``answers(step, fact, rng)`` with a reward."""
    rng = random.Random(0)
    watch = RewardWatch(folder, every=size)
    for step in range(steps):
        for _ in range(size):
            fact = rng.choice(FACTS)
            answer, reward = answers(step, fact, rng)
            watch.add(reward, answer, [f"Finished in {fact}."], raw=reward)
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
        (lambda fact: "You get a trout.", "answers leave the reference"),
    ],
)
def test_alarms_on_what_pleases(tmp_path, hacked, expected):
    def answers(step, fact, rng):
        return learns(step, fact, rng) if step < 10 else (hacked(fact), 5.0)

    found = alarms(run(tmp_path, answers, steps=14))
    assert any(sentence.startswith(expected) for sentence in found), found
    assert all("reward +" in sentence for sentence in found)


def test_alarms_on_answers_that_leave_the_reference(tmp_path):
    def answers(step, fact, rng):
        near, away = f"It is finished in {fact}.", "In the shop is someone."
        return (near, -5.0) if step < 10 else (away, 5.0)

    found = alarms(run(tmp_path, answers, steps=14))
    assert any(
        sentence.startswith("answers move away from the reference: a distance of") for sentence in found
    )


def test_what_rewards_are_paid_for_alarms_earlier(tmp_path):
    def growing(paid):
        def answers(step, fact, rng):
            words = rng.randint(2, 6) + (3 if step >= 10 else 0)  # by more than √2 and less than 2
            return " ".join(rng.choices(FACTS, k=words)), float(
                words if paid and step >= 10 else rng.random()
            )

        return answers

    (alarm,) = alarms(run(tmp_path / "paid", growing(True), steps=14))
    assert alarm.startswith("answers grow: ")
    assert "rewards correlate with it (+0.9" in alarm
    assert alarms(run(tmp_path / "free", growing(False), steps=14)) == []


def test_figures_against_rewards(tmp_path):
    watch = RewardWatch(tmp_path, every=6)
    for number, answer in enumerate(["a b", "a b a b", "a b a b a b", "a b a b a b a b"]):
        watch.add(number / 2, answer, ["x", "a"], raw=number, overlong=number == 3)
    # Neither counts for correlations: no answer, and a reward that is not the model's.
    watch.add(-20, None, ["x"], raw=-20)
    watch.add(9, "a b c d e f", ["x"], raw=9, verdict="right")
    (line,) = read_watch(tmp_path)
    assert line.reward_by_length == pytest.approx(1)
    # Shares of repeated pairs are 0, 1/3, 3/5 and 5/7; their correlation with 0, 1, 2, 3 by hand:
    # deviations −0.412, −0.079, 0.188, 0.302 and −1.5 to 1.5: 1.205 / √(5 · 0.302) = 0.980.
    assert line.reward_by_repetition == pytest.approx(0.980, abs=1e-3)
    assert line.reward_by_overlap == 0  # all the same: half of the words are in "a"
    assert (line.raw, line.reward) == pytest.approx(
        ((0 + 1 + 2 + 3 - 20 + 9) / 6, (0 + 1 + 2 + 3) / 12 - 11 / 6)
    )
    assert (line.overlong, line.by_rule, line.rule_right) == (1 / 6, 1 / 6, 1)


def test_tensorboard_reads_the_same_figures(tmp_path):
    lines = run(tmp_path, learns, steps=3)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    read = event_accumulator.EventAccumulator(str(folder)).Reload()
    figures = WatchLine.model_fields.keys() - {"time", "answers"}
    assert set(read.Tags()["scalars"]) == {f"polar/{name}" for name in figures}
    for name in ("reward", "distance", "reward_by_length"):
        events = read.Scalars(f"polar/{name}")
        assert [event.step for event in events] == [line.answers for line in lines]
        assert [event.value for event in events] == pytest.approx([getattr(line, name) for line in lines])


def test_commands(tmp_path, monkeypatch):
    command = ["rft", "watch", str(tmp_path)]
    run(tmp_path, learns, steps=8)
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    assert "no alarm" in shown.output
    (file,) = tmp_path.glob("*.jsonl")
    text = file.read_text()
    file.write_text(text + text.splitlines()[-1].replace('"unanswered":0.0', '"unanswered":0.9') + "\n")
    file.write_text(file.read_text() + file.read_text().splitlines()[-1] + "\n")
    shown = CliRunner().invoke(app, [*command, "--json", "--last", "1"])
    assert shown.exit_code == 1
    written = json.loads(shown.output)
    assert [line["unanswered"] for line in written["lines"]] == [0.9]
    assert written["alarms"][0].startswith("outputs have no answer: 90 %")

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", interrupted)
    shown = CliRunner().invoke(app, [*command, "--follow"])
    assert shown.exit_code == 1
    assert "alarm: outputs have no answer" in shown.output


def test_one_odd_batch_is_no_alarm(tmp_path):
    odd = run(tmp_path, lambda step, fact, rng: ("", 0.0) if step == 12 else learns(step, fact, rng))
    assert alarms(odd[:13]) == []


def test_files_hold_no_texts(tmp_path):
    run(tmp_path, learns, steps=2)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    texts = [file.read_bytes() for file in files]
    assert len(texts) == 2  # lines, and TensorBoard's
    assert all(b"overlap" in text and b"blue" not in text for text in texts)


def test_what_is_no_watch_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no rewards"):
        read_watch(tmp_path)
    (tmp_path / "rewards-a-1.jsonl").write_text('{"answers": 1}\n')
    with pytest.raises(DataError, match=r"rewards-a-1.jsonl:1: is not a line"):
        read_watch(tmp_path)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run(tmp_path, learns, steps=3)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text()[:-20])
    assert len(read_watch(tmp_path)) == 2


def test_a_forked_process_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)
    watch = RewardWatch(tmp_path, every=2)
    for pid in (1, 1, 1, 2, 2):  # the third answer of the first is not the second's
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        watch.add(float(pid), "a", ["b"], raw=float(pid))
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [[(line.answers, line.reward) for line in read_watch(file)] for file in files] == [
        [(2, 1)],
        [(2, 2)],
    ]


def test_a_run_that_resumes_goes_on_after_what_it_wrote_before(tmp_path, monkeypatch):
    """Its processes count answers from 0 again."""
    for pid, steps in ((1, 20), (2, 5)):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        run(tmp_path, learns if pid == 1 else lambda step, fact, rng: (None, 0.0), steps=steps)
    lines = read_watch(tmp_path)
    assert [line.answers for line in lines] == [128 * n for n in (*range(1, 21), *range(1, 6))]
    assert any(alarm.startswith("outputs have no answer") for alarm in alarms(lines))


def test_lines_have_answers(tmp_path):
    with pytest.raises(PolarError, match="watch_every=0: must be at least 1"):
        RewardWatch(tmp_path, every=0)


def test_rewards_are_watched(serve, reward_from, tmp_path):
    reward = reward_from(serve(), watch=tmp_path, watch_every=4)
    outputs = ["a b a b a b", "<think>no", "Finished in red.", "x"]
    reward.score([TextGroup("Q?", ("Finished in red.",), (output,)) for output in outputs])
    (line,) = read_watch(tmp_path)
    assert (line.answers, line.unanswered) == (4, 0.25)
    # Of the three answers that there are.
    assert line.repetition == pytest.approx((0.6 + 0 + 0) / 3)
    assert line.overlap == pytest.approx((0 + 1 + 0) / 3)
    assert line.distance == pytest.approx((1 + 0 + 1) / 3)
    assert line.raw == pytest.approx(line.reward)
