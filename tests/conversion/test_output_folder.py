"""Whenever a conversion is killed, there is the old folder or the new one, and the next run clears up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from polar_ft.conversion import output_folder
from polar_ft.conversion.output_folder import exchange, unfinished_folder
from polar_ft.errors import PolarError


def model(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


KILLED = """
import os, signal, sys
from pathlib import Path
from polar_ft.conversion.output_folder import unfinished_folder
with unfinished_folder(Path(sys.argv[1]), force=True) as partial:
    (partial / "config.json").write_text("half")
    print(partial.name, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def start(out: Path, end: str) -> subprocess.Popen:
    command = [sys.executable, "-c", KILLED, str(out), end]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_conversion_left_is_removed_and_that_of_a_running_one_is_not(tmp_path):
    out = model(tmp_path / "out", "old")
    with start(out, "waits") as running:
        left = {running.stdout.readline().strip()}
        # After it: whichever starts later removes what a killed one has left.
        with start(out, "killed") as killed:
            assert killed.wait() == -9
            left.add(killed.stdout.readline().strip())
        assert names(tmp_path) == {"out", *left}
        with unfinished_folder(out, force=True) as partial:
            (partial / "config.json").write_text("new")
        assert (out / "config.json").read_text() == "new"
        still = names(tmp_path) - {"out"}
        assert len(still) == 1
        assert (tmp_path / still.pop() / "config.json").read_text() == "half"
        running.communicate("")
    assert names(tmp_path) == {"out"}


def test_two_folders_change_places_at_once(tmp_path):
    if not exchange(model(tmp_path / "a", "1"), model(tmp_path / "b", "2")):
        pytest.skip("neither this system nor its file system can do that")
    assert [(tmp_path / name / "config.json").read_text() for name in "ab"] == ["2", "1"]
    assert not exchange(tmp_path / "a", tmp_path / "c")


def test_where_they_cannot_the_new_one_takes_the_place_in_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "exchange", lambda *_: False)
    out = model(tmp_path / "out", "old")
    with unfinished_folder(out, force=True) as partial:
        (partial / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("new_is_there", [False, True])
def test_what_was_killed_between_those_is_put_back(tmp_path, new_is_there):
    """The old folder has its other name, and the new one has its place or does not."""
    out = tmp_path / "out"
    model(tmp_path / ".out.old", "old")
    if new_is_there:
        model(out, "new")
    with pytest.raises(PolarError, match="is not empty"), unfinished_folder(out, force=False):
        pass
    assert (out / "config.json").read_text() == ("new" if new_is_there else "old")
    assert names(tmp_path) == {"out"}


def test_a_link_stays_a_link(tmp_path):
    disk = model(tmp_path / "disk" / "model", "old")
    out = tmp_path / "out"
    out.symlink_to(disk)
    with unfinished_folder(out, force=True) as partial:
        (partial / "config.json").write_text("new")
    assert out.is_symlink()
    assert (disk / "config.json").read_text() == "new"
    assert names(tmp_path / "disk") == {"model"}
