"""The files of labellers: decided, undone, crashed, continued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from polar_ft.data.lint import check
from polar_ft.data.reading import as_sources, read_examples
from polar_ft.errors import PolarError
from polar_ft.labelling.decisions import OTHER_FOLDER, read_decisions
from polar_ft.labelling.store import REPEAT_AFTER, ChangedError, Labeller
from tests.labelling.conftest import ROWS, lines


def decide(labeller: Labeller, choice: str) -> tuple[str, str]:
    """Decides on the pair that is shown; returns its texts from left to right."""
    shown = labeller.next()
    assert shown is not None
    labeller.decide(len(labeller.decisions), shown.pair.key, choice, 1.25)  # type: ignore[arg-type]
    return shown.pair.answers[shown.left].text, shown.pair.answers[1 - shown.left].text


def many_rows(count: int) -> list[dict]:
    return [{"prompt": f"Q{number}", "candidates": ["a", "b"]} for number in range(count)]


def test_training_reads_what_is_written(open_store, folder):
    alice = open_store().labeller("Alice")
    left, right = decide(alice, "left")
    decide(alice, "tie")
    decide(alice, "skip")
    other_left, other_right = decide(alice, "right")
    assert alice.next() is None
    assert alice.progress == (4, 4)

    examples = list(read_examples(str(folder)))  # the folder as `train`, `fit` and `data check` read it
    assert [(one.candidates, one.pairs, one.n_ties) for one in examples] == [
        ((left, right), ((0, 1),), 0),
        (examples[1].candidates, (), 1),
        ((other_right, other_left), ((0, 1),), 0),
    ]
    assert {one.reference for one in examples} == {"Beijing."}
    report = check(as_sources(str(folder)))
    assert (report.rows, report.bad_rows, report.problems) == (3, 0, [])

    first, *_ = lines(folder / "alice.jsonl")
    assert first["labeller"] == "alice"
    assert (first["decision"], first["seconds"], first["id"]) == ("left", 1.2, "in.jsonl:1")
    assert ROWS[0]["candidates"][int(first["chosen_source"][11])] == first["chosen"]
    (skipped,) = lines(folder / OTHER_FOLDER / "alice.jsonl")
    assert skipped["decision"] == "skip"


def test_which_side_is_random_and_the_same_after_a_restart(open_store):
    rows = many_rows(60)
    sides = {}
    for name in ("alice", "bob"):
        labeller = open_store(rows).labeller(name)
        sides[name] = [decide(labeller, "tie")[0] for _ in range(40)]
        again = open_store(rows).labeller(name)
        again.undo(40)
        assert decide(again, "tie")[0] == sides[name][39]
    # Of 40 fair coins 8 to 32 show heads, but for less than one time in 10,000.
    assert all(8 <= side.count("a") <= 32 for side in sides.values())
    assert sides["alice"] != sides["bob"]


def test_undo_removes_it_from_the_disk_also_a_skip(open_store, folder):
    alice = open_store().labeller("alice")
    decide(alice, "left")
    before = (folder / "alice.jsonl").read_bytes()
    shown = alice.next()
    for choice in ("skip", "right", "tie"):
        decide(alice, choice)
        alice.undo(2)
        assert alice.next() == shown
        assert (folder / "alice.jsonl").read_bytes() == before
        assert not (folder / OTHER_FOLDER / "alice.jsonl").exists()
    alice.undo(1)
    assert list(folder.glob("*.jsonl")) == []  # an empty file would be a mistake for who reads the folder
    with pytest.raises(PolarError, match="nothing to undo"):
        alice.undo(0)


def test_pairs_come_again_with_sides_swapped(open_store, folder):
    rows = many_rows(30)
    alice = open_store(rows, repeat=1.0).labeller("alice")
    seen = [decide(alice, "left") for _ in range(REPEAT_AFTER)]
    shown = alice.next()
    assert shown is not None
    assert not shown.repeat
    seen.append(decide(alice, "left"))
    shown = alice.next()
    assert shown is not None
    assert (shown.repeat, shown.pair.prompt) == (True, "Q0")
    assert decide(alice, "left") == seen[0][::-1]
    # Second looks are not rows to train on.
    assert len(lines(folder / "alice.jsonl")) == REPEAT_AFTER + 1
    (again,) = lines(folder / OTHER_FOLDER / "alice.jsonl")
    assert again["repeat"] is True
    while alice.next() is not None:
        decide(alice, "right")
    assert alice.progress == (60, 60)
    assert sum(one.repeat for one in alice.decisions) == 30


def test_about_the_stated_share_comes_again(open_store):
    alice = open_store(many_rows(400), repeat=0.25).labeller("alice")
    # Of 400 pairs 100 ± 4 standard deviations of 8.7.
    assert 65 <= alice.progress[1] - 400 <= 135


def test_a_crash_in_the_middle_of_a_line_costs_only_the_decision_that_was_not_confirmed(open_store, folder):
    alice = open_store().labeller("alice")
    decide(alice, "left")
    whole = (folder / "alice.jsonl").read_bytes()
    decide(alice, "right")
    torn = (folder / "alice.jsonl").read_bytes()
    for length in (len(whole), len(whole) + 1, len(whole) + 8, len(torn) - 2):
        (folder / "alice.jsonl").write_bytes(torn[:length])
        again = open_store().labeller("alice")
        assert len(again.decisions) == 1
        assert (folder / "alice.jsonl").read_bytes() == whole
    (folder / "alice.jsonl").write_bytes(torn[:-1])  # all but the line end
    assert len(open_store().labeller("alice").decisions) == 2
    assert (folder / "alice.jsonl").read_bytes() == torn
    (folder / "alice.jsonl").write_bytes(whole[:10])
    assert open_store().labeller("alice").decisions == []


def test_a_full_disk_loses_no_line_and_writes_no_half(open_store, folder, monkeypatch):
    alice = open_store().labeller("alice")
    decide(alice, "left")
    before = (folder / "alice.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PolarError, match="No space left"):
        decide(alice, "left")
    monkeypatch.undo()
    assert (folder / "alice.jsonl").read_bytes() == before
    assert len(alice.decisions) == 1
    decide(alice, "left")


def test_two_labellers_have_two_files(open_store, folder):
    store = open_store()
    alice, bob = store.labeller("alice"), store.labeller("bob")
    for choice in ("left", "right", "tie"):
        decide(alice, choice)
        decide(bob, choice)
    for name in ("alice", "bob"):
        rows = lines(folder / f"{name}.jsonl")
        assert {row["labeller"] for row in rows} == {name}
        assert [row["decision"] for row in rows] == ["left", "right", "tie"]


def test_a_decision_on_another_pair_than_the_one_shown_is_refused(open_store, folder):
    alice = open_store().labeller("alice")
    shown = alice.next()
    assert shown is not None
    decide(alice, "left")
    for number in (0, 1):  # a second window, and a key that was pressed twice
        with pytest.raises(ChangedError):
            alice.decide(number, shown.pair.key, "left", 1.0)
    with pytest.raises(ChangedError):
        alice.undo(0)
    assert len(lines(folder / "alice.jsonl")) == 1


def test_rows_may_be_added_moved_and_taken_away_between_two_starts(open_store, folder):
    alice = open_store(ROWS[:2]).labeller("alice")
    decide(alice, "left")
    decide(alice, "left")
    changed = [{**ROWS[3]}, {**ROWS[1], "candidates": ROWS[1]["candidates"][::-1]}]
    alice = open_store(changed).labeller("alice")
    shown = alice.next()
    assert shown is not None
    assert shown.pair.prompt == "Question 3?"
    assert alice.progress == (1, 2)
    decide(alice, "left")
    assert alice.next() is None
    assert len(lines(folder / "alice.jsonl")) == 3
    with pytest.raises(PolarError, match="not in the input"):
        open_store(ROWS[:1]).labeller("alice").undo(3)


def test_two_processes_on_one_folder_are_refused(open_store, folder):
    open_store()
    code = f"""
from pathlib import Path
from polar_ft.errors import PolarError
from polar_ft.labelling.store import Store
try:
    Store(Path({str(folder)!r}), [], 0)
except PolarError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another polar-ft label writes to this folder" in done.stdout


def test_a_folder_of_other_data_is_refused_and_left_alone(open_store, folder):
    folder.mkdir()
    row = json.dumps({"id": "1", "prompt": "p", "reference": "", "chosen": "a", "rejected": "b"})
    for content in (f"{row}\n", row, f"{row}\n{row[:20]}"):  # also without an end, which is no crash of ours
        (folder / "train.jsonl").write_text(content)
        with pytest.raises(PolarError, match=r"train.jsonl:1: labeller: is missing"):
            open_store()
        assert (folder / "train.jsonl").read_text() == content
    (folder / "train.jsonl").rename(folder / "Train.jsonl")
    with pytest.raises(PolarError, match=r"Train.jsonl is no name of a labeller"):
        open_store()


@pytest.mark.parametrize("name", ["", "../alice", "a/b", ".alice", "_alice", "a b", "x" * 41, "a\n"])
def test_a_name_that_could_be_another_file_is_refused(open_store, folder, name):
    if name == "a\n":
        assert open_store().labeller(name).name == "a"  # blanks around a name do not count
        return
    with pytest.raises(PolarError, match="a name has 1 to 40 letters"):
        open_store().labeller(name)


@pytest.mark.parametrize("name", ["हिंदी", "สมหญิง", "İpek", "李雷"])
def test_names_of_all_scripts(open_store, folder, name):
    decide(open_store().labeller(name), "left")
    assert list(open_store().labellers) == [name.lower()]


@pytest.mark.parametrize("choice", ["left", "right", "tie", "skip"])
def test_what_is_read_back_is_what_was_decided(open_store, folder, choice):
    alice = open_store(many_rows(8), repeat=0.5).labeller("alice")
    while alice.next() is not None:
        decide(alice, choice)
    assert {one.left for one in alice.decisions} == {0, 1}
    again = open_store(many_rows(8)).labeller("alice").decisions
    assert [replace(one, row={}) for one in again] == alice.decisions


def test_messages_stay_messages(open_store, folder):
    turns = [{"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    row = {"prompt": turns, "references": ["x", "y"], "candidates": answers, "subset": "chat", "margin": 2.0}
    alice = open_store([row]).labeller("alice")
    decide(alice, "left")
    (written,) = lines(folder / "alice.jsonl")
    assert written["prompt"] == turns
    assert (written["references"], written["subset"]) == (["x", "y"], "chat")
    assert written["chosen"] in answers
    assert "margin" not in written
    (decision,) = read_decisions([folder])
    assert decision.pair == alice.decisions[0].pair
    assert (decision.winner, decision.left) == (alice.decisions[0].winner, alice.decisions[0].left)


def test_decisions_of_another_tool_have_no_side_to_swap(open_store, folder):
    """As `polar-ft data convert label-studio` writes them."""
    folder.mkdir()
    made = [{name: ROWS[0][name] for name in ("prompt", "reference")} | {"labeller": "alice"}]
    made[0] |= {"chosen": ROWS[0]["candidates"][0], "rejected": ROWS[0]["candidates"][1]}
    (folder / "alice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    alice = open_store(repeat=1.0).labeller("alice")
    while alice.next() is not None:
        decide(alice, "left")
    assert alice.progress == (7, 7)


def test_progress_ends_at_all_after_fewer_second_looks_are_asked_for(open_store):
    alice = open_store(repeat=1.0).labeller("alice")
    while alice.next() is not None:
        decide(alice, "left")
    assert alice.progress == (8, 8)
    assert open_store(repeat=0.0).labeller("alice").progress == (8, 8)
