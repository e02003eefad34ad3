"""Checkpoints of which something was cut off, changed, taken away or exchanged: none is read as it is not."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.checkpoint_files import publish
from polar_ft.errors import PolarError
from tests.damage import damaged

RUNS = ("plain", "zero2_offload", "zero3")


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target))


@pytest.mark.parametrize("manifest", [True, False], ids=["ours", "without manifest"])
@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_read_wrong(train, tmp_path, run, manifest):
    """Each file in turn. What is read in spite of damage has the right tensors: in bytes without use."""
    checkpoint = tmp_path / "iter_4.pth"
    copy(train(run), checkpoint)
    if manifest:
        (tmp_path / "unfinished").mkdir()
        checkpoint = checkpoint.rename(tmp_path / "unfinished" / "iter_4.pth")
        publish(checkpoint, tmp_path / "iter_4.pth", step=4, ranks=3)
        checkpoint = tmp_path / "iter_4.pth"
    expected = {name: tensor.clone() for name, tensor in read_checkpoint(checkpoint).tensors.items()}
    tried = refused = 0
    for file in sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]:
        earlier = train(run).with_name("iter_2.pth")
        earlier = earlier / file.name if earlier.is_dir() else earlier
        # A whole earlier checkpoint under another name is not damaged; only a manifest can tell.
        known = earlier.is_file() and (manifest or checkpoint.is_dir())
        for damage in damaged(file, earlier if known else None, random.Random(f"0 {file.name}"), flips=12):
            tried += 1
            try:
                read = read_checkpoint(checkpoint)
                found = {name: read.tensors[name] for name in read.tensors}
            except PolarError:
                refused += 1
                continue
            assert set(found) == set(expected), f"{file.name}: {damage}"
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), f"{file.name}: {damage}"
    assert tried >= 10
    # Bytes without use are few: padding, and files of which a conversion needs only names and shapes.
    assert refused >= 0.7 * tried, f"{refused} of {tried}"


def test_files_of_two_steps(train, tmp_path):
    """The optimizer of one rank is that of an earlier step; both are whole."""
    checkpoint = copy(train("zero3"), tmp_path / "iter_4.pth")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copyfile(train("zero3").with_name("iter_2.pth") / name, checkpoint / name)
    with pytest.raises(
        PolarError, match=rf"{name}: was saved after step 2, but .*rank_0.* after step 4; .* one checkpoint"
    ):
        read_checkpoint(checkpoint)


def test_a_changed_weight_without_a_manifest(train, tmp_path):
    """torch itself would map the file and take the changed value."""
    checkpoint = copy(train("plain"), tmp_path / "iter_4.pth")
    content = bytearray(checkpoint.read_bytes())
    head = torch.load(checkpoint, weights_only=False)["state_dict"]["v_head.weight"]
    place = content.index(head.numpy().tobytes())
    content[place + 3] ^= 1 << 6
    checkpoint.write_bytes(content)
    changed = torch.load(checkpoint, weights_only=False, mmap=True)["state_dict"]["v_head.weight"]
    assert not torch.equal(changed, head)
    with pytest.raises(PolarError, match=r"iter_4.pth: .* is not what was saved \(its checksum differs\)"):
        read_checkpoint(checkpoint)
