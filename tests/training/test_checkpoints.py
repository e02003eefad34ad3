"""A checkpoint is whole or refused by name, whatever happens to its files."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from polar_ft.conversion.checkpoint_files import (
    checkpoints,
    manifest_path,
    newest_complete,
    prune,
    publish,
    remove_checkpoint,
    verify,
)
from polar_ft.errors import PolarError
from polar_ft.training import loop
from polar_ft.training.loop import TrainingLoop
from polar_ft.training.ranks import StopSignals
from polar_ft.training.step import StepResult

FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_optim_states.pt", "zero_pp_rank_1_optim_states.pt")


def make_checkpoint(work_dir: Path, step: int, *, directory: bool) -> Path:
    """A published checkpoint whose files hold random bytes."""
    content = random.Random(step)
    unfinished = work_dir / "unfinished" / f"iter_{step}.pth"
    (unfinished if directory else unfinished.parent).mkdir(parents=True, exist_ok=True)
    for file in [unfinished / name for name in FILES] if directory else [unfinished]:
        file.write_bytes(content.randbytes(content.randint(500, 3000)))
    target = work_dir / f"iter_{step}.pth"
    publish(unfinished, target, step, ranks=2)
    return target


@pytest.mark.parametrize("directory", [False, True])
def test_what_was_published_is_verified(tmp_path, directory):
    checkpoint = make_checkpoint(tmp_path, 4, directory=directory)
    manifest = verify(checkpoint)
    assert manifest is not None
    assert (manifest.step, manifest.ranks) == (4, 2)
    assert len(manifest.files) == (3 if directory else 1)
    assert not list((tmp_path / "unfinished").iterdir())
    again = make_checkpoint(tmp_path, 4, directory=directory)
    assert verify(again) == manifest


def test_one_without_a_manifest_is_of_another_tool(tmp_path):
    (tmp_path / "iter_2.pth").write_bytes(b"weights")
    assert verify(tmp_path / "iter_2.pth") is None
    assert checkpoints(tmp_path) == []
    with pytest.raises(PolarError, match="no such checkpoint"):
        verify(tmp_path / "iter_3.pth")


def contents(checkpoint: Path) -> dict[str, bytes]:
    files = checkpoint.rglob("*") if checkpoint.is_dir() else [checkpoint]
    return {f.name: f.read_bytes() for f in files if f.is_file() and f != manifest_path(checkpoint)}


def damage(file: Path, kind: str, other: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "flipped":
        place = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
    elif kind == "removed":
        file.unlink()
    elif kind == "swapped":
        file.write_bytes(other.read_bytes())
    else:
        file.with_name(f"extra_{file.name}").write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "directory"),
    [
        *(
            (kind, directory)
            for kind in ("truncated", "flipped", "removed", "swapped")
            for directory in (0, 1)
        ),
        ("extra", 1),
    ],
)
def test_no_damage_goes_unnoticed(tmp_path, kind, directory):
    """Refused, or every byte of the state is what was saved (the manifest alone can be hurt without harm)."""
    refused = unharmed = 0
    for case in range(20):
        folder = tmp_path / str(case)
        saved = make_checkpoint(folder, 2, directory=directory)
        other = make_checkpoint(folder, 4, directory=directory)
        before = contents(saved)
        files = sorted(
            [*(f for f in saved.rglob("*")), *([] if directory else [saved, manifest_path(saved)])]
        )
        file = files[case % len(files)]
        is_manifest = file == manifest_path(saved)
        counterpart = manifest_path(other) if is_manifest else (other / file.name if directory else other)
        if kind == "extra" and is_manifest:
            continue
        damage(file, kind, counterpart, random.Random(case))
        told: list[str] = []
        remove_checkpoint(other)
        found = newest_complete(folder, told.append)
        if told or not saved.exists():
            refused += 1
            assert found is None
            assert not saved.exists() or str(saved) in told[0]
        else:
            unharmed += 1
            assert is_manifest
            assert contents(saved) == before
            # Without its manifest `--resume auto` leaves it out; asked for by name it loads, with a warning.
            assert found == (None if kind == "removed" else saved)
    assert refused >= 10
    print(f"{kind}: {refused} refused, {unharmed} without harm")


def test_auto_falls_back_to_the_one_before_and_says_so(tmp_path):
    for step in (2, 4, 10):
        make_checkpoint(tmp_path, step, directory=True)
    told: list[str] = []
    assert newest_complete(tmp_path, told.append) == tmp_path / "iter_10.pth"
    file = tmp_path / "iter_10.pth" / FILES[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert newest_complete(tmp_path, told.append) == tmp_path / "iter_4.pth"
    assert len(told) == 1
    assert f"{file}: has " in told[0]
    # One that a kill left in the middle of being removed.
    manifest_path(tmp_path / "iter_4.pth").unlink()
    assert newest_complete(tmp_path, told.append) == tmp_path / "iter_2.pth"


def test_those_written_last_are_kept(tmp_path):
    """A run that was resumed from an earlier step writes lower numbers later."""
    for step in (6, 8, 4):
        make_checkpoint(tmp_path, step, directory=False)
    prune(tmp_path, keep=2)
    assert {path.name for path in checkpoints(tmp_path)} == {"iter_8.pth", "iter_4.pth"}
    prune(tmp_path, keep=0)
    assert len(checkpoints(tmp_path)) == 2


class Runner:
    """As much of mmengine's runner as the loop asks for; saving fails from step ``full_from`` on."""

    def __init__(self, work_dir: Path, full_from: int) -> None:
        self.work_dir = str(work_dir)
        self.full_from = full_from
        self.model = SimpleNamespace(
            llm=SimpleNamespace(config=SimpleNamespace(to_dict=dict)),
            adapter=None,
            objective=None,
            train=lambda: None,
        )
        self.epoch = 0
        self.optim_wrapper = SimpleNamespace(param_groups=[{"lr": 1.0}])
        self.logger = SimpleNamespace(info=lambda text: None)
        self.message_hub = SimpleNamespace(update_info=lambda key, value: None)
        self.call_hook = lambda name, **_: None

    def save_checkpoint(self, out_dir: str, filename: str, *, meta: dict, **_: object) -> None:
        Path(out_dir, filename).write_text("half")
        if meta["iter"] >= self.full_from:
            raise OSError(28, "No space left on device")
        Path(out_dir, filename).write_text(f"whole {meta['iter']}")


@pytest.fixture
def train(monkeypatch):
    """``train(runner, steps)``: the loop without a model; a checkpoint every second step."""
    monkeypatch.setattr("polar_ft.training.checkpoints.plan_identity", lambda dataset: {})
    monkeypatch.setattr(loop, "take_step", lambda *_: StepResult({"loss": 0.0}, [], True))
    monkeypatch.setattr(loop, "TrainingLog", lambda *_, **__: SimpleNamespace(write=lambda *_: None))

    def run(runner: Runner, steps: int, **attributes: object) -> None:
        training = object.__new__(TrainingLoop)
        settings = dict(
            _runner=runner,
            _engine=lambda: SimpleNamespace(model=runner.model),
            _show_plan=lambda engine: None,
            _batches=lambda first: iter(range(first, steps)),
            _iter=0,
            _max_iters=steps,
            dataset=None,
            validation=None,
            stop_training=False,
            log_interval=1,
            track=None,
            save_steps=2,
            save_total_limit=1,
            warmup_ratio=0.1,
            min_lr_ratio=0.1,
        )
        for name, value in (settings | attributes).items():
            setattr(training, name, value)
        training.run()

    return run


def test_the_only_checkpoint_outlives_a_failed_save(tmp_path, train):
    complete = {"iter_2.pth", "iter_2.pth.manifest.json", "last_checkpoint"}
    runner = Runner(tmp_path, full_from=4)
    seen = []
    runner.call_hook = lambda name, **_: seen.append({file.name for file in tmp_path.iterdir()})
    with pytest.raises(PolarError, match=r"iter_4\.pth: could not be saved.*No space left.*iter_2\.pth"):
        train(runner, 5)
    assert seen[-1] == complete  # after step 4, before it is saved
    assert {file.name for file in tmp_path.iterdir()} == complete
    assert verify(tmp_path / "iter_2.pth") is not None
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_2.pth")


def test_other_errors_are_left_alone(tmp_path, train):
    runner = Runner(tmp_path, full_from=9)
    runner.save_checkpoint = lambda *_, **__: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        train(runner, 2)


def test_the_last_step_and_an_early_end_are_saved(tmp_path, train):
    train(Runner(tmp_path, full_from=99), 3)
    assert (tmp_path / "iter_3.pth").read_text() == "whole 3"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    ends = SimpleNamespace(
        start=lambda *_: None, after_step=lambda *_, **__: None, ends=lambda runner, step: step == 1
    )
    ends.finish = lambda runner: None
    train(Runner(tmp_path, full_from=99), 100, validation=ends)
    assert (tmp_path / "iter_1.pth").read_text() == "whole 1"


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_a_signal_saves_and_ends_with_a_status_of_its_own(tmp_path, train, number):
    runner = Runner(tmp_path, full_from=99)
    hooks = iter([None, lambda: os.kill(os.getpid(), number)])  # before_train, then step 1
    runner.call_hook = lambda name, **_: (next(hooks) or (lambda: None))()
    with pytest.raises(SystemExit) as ended:
        train(runner, 100)
    assert ended.value.code == 75
    assert (tmp_path / "iter_1.pth").read_text() == "whole 1"
    assert signal.getsignal(number) == signal.SIG_DFL
