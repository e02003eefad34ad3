"""Reading what training saved: real files of mmengine and DeepSpeed, small ones by hand, and bad ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.restricted_load import restricted_load
from polar_ft.errors import PolarError

RUNS = [("1", "float32", 1), ("2", "bfloat16", 2), ("3", "bfloat16", 2)]


def test_a_file_of_mmengine(train):
    """It holds an optimizer, schedules and log histories beside the weights."""
    file = train("plain", "float32")
    content = torch.load(file, weights_only=False)
    assert {"message_hub", "optimizer", "param_schedulers"} <= set(content)
    read = read_checkpoint(file)
    assert read.dtype == torch.float32
    assert set(read.tensors) == set(content["state_dict"])
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in content["state_dict"].items())


@pytest.mark.parametrize(("stage", "dtype", "ranks"), RUNS)
def test_a_deepspeed_folder_gives_the_float32_weights(train, stage, dtype, ranks):
    """The same as DeepSpeed's own script, to the bit, and the dtype in which the model ran."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = train(stage, dtype, ranks)
    assert len(list(folder.glob("*_optim_states.pt"))) == ranks
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    read = read_checkpoint(folder)
    assert read.dtype == getattr(torch, dtype)
    assert set(read.tensors) == set(expected)
    assert len(expected) == 21  # embeddings, 2 layers of 9, norm, head
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in expected.items())


def save_zero(folder: Path, stage: int, ranks: list, module, shapes, frozen=None) -> Path:
    """A DeepSpeed folder; ``ranks`` has the flat vectors of each rank, ``frozen`` the fragments."""
    folder.mkdir()
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    count = len(ranks) if stage == 3 else [len(ranks)] * len(shapes)
    for rank, groups in enumerate(ranks):
        state = {"zero_stage": stage, "partition_count": count, key: groups}
        torch.save(
            {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        model = {
            "module": module,
            "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in shapes],
            "frozen_param_shapes": {name: torch.Size(shape) for name, (shape, _) in (frozen or {}).items()},
            "frozen_param_fragments": {name: parts[rank] for name, (_, parts) in (frozen or {}).items()},
            "shared_params": {"again": "b"},
        }
        torch.save(model, folder / f"{name}_model_states.pt")
    return folder


def test_stage_2_by_hand(tmp_path):
    """Two groups; b of the first crosses from rank 0 to rank 1; rank 1's vector ends with a padding of one.

    group 0: a = [0..4], b = [5..9], padding; group 1: c = [20, 21, 22, 23]
    """
    ranks = [
        [torch.arange(6.0), torch.tensor([20.0, 21.0])],
        [torch.tensor([6.0, 7.0, 8.0, 9.0, 0.0, 0.0]), torch.tensor([22.0, 23.0])],
    ]
    shapes = [{"a": (5,), "b": (5, 1)}, {"c": (2, 2)}]
    module = {name: torch.zeros(1, dtype=torch.float16) for name in "abc"}
    read = read_checkpoint(save_zero(tmp_path / "iter_1.pth", 2, ranks, module, shapes))
    assert read.dtype == torch.float16
    assert read.tensors["a"].tolist() == [0, 1, 2, 3, 4]
    assert read.tensors["b"].tolist() == [[5], [6], [7], [8], [9]]
    assert read.tensors["c"].tolist() == [[20, 21], [22, 23]]
    assert torch.equal(read.tensors["again"], read.tensors["b"])


def test_stage_3_by_hand(tmp_path):
    """Pieces of ⌈5/2⌉ = 3 and ⌈2/2⌉ = 1, in two sub-groups of which the first ends within a; d is frozen.

    rank 0: a 0 1 | 2, b 5     rank 1: a 3 4 | padding, b 6
    """
    ranks = [
        [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])],
        [torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 6.0])],
    ]
    module = {"a": torch.zeros(0, dtype=torch.bfloat16)}
    frozen = {"d": ((3,), [torch.tensor([7.0, 8.0]), torch.tensor([9.0, -1.0])])}
    shapes = [{"a": (5,), "b": (2,)}]
    read = read_checkpoint(save_zero(tmp_path / "iter_1.pth", 3, ranks, module, shapes, frozen))
    assert read.dtype == torch.bfloat16
    assert read.tensors["a"].tolist() == [0, 1, 2, 3, 4]
    assert read.tensors["b"].tolist() == [5, 6]
    assert read.tensors["d"].tolist() == [7, 8, 9]


def test_files_of_ranks_are_missing(tmp_path):
    ranks = [[torch.zeros(2)], [torch.zeros(2)]]
    folder = save_zero(tmp_path / "iter_1.pth", 2, ranks, {"a": torch.zeros(4)}, [{"a": (4,)}])
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(PolarError, match=r"saved by 2 ranks.*optim_states.pt files those of ranks \[1\]"):
        read_checkpoint(folder)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(PolarError, match=r"has no .*optim_states.pt"):
        read_checkpoint(folder)


def test_files_of_another_checkpoint(tmp_path):
    ranks = [[torch.zeros(40)]]
    folder = save_zero(tmp_path / "iter_1.pth", 2, ranks, {"a": torch.zeros(4)}, [{"a": (4,)}])
    with pytest.raises(PolarError, match="4 elements, but its optimizer files 40"):
        read_checkpoint(folder)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path):
    file = tmp_path / "iter_1.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": Bomb(tmp_path / "trace")}, file)
    with pytest.raises(
        PolarError, match=r"iter_1.pth: needs posix.system, which is not known to be harmless"
    ):
        read_checkpoint(file)
    assert not (tmp_path / "trace").exists()


def test_getattr_in_a_pickle_is_not_called(tmp_path):
    """mmengine's histories name it, so it is let through, as something that does nothing."""

    class Getter:
        def __reduce__(self):
            return getattr, (self.__class__.__module__, "join")

    file = tmp_path / "iter_1.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hub": Getter()}, file)
    assert type(restricted_load(file)["hub"]).__name__ == "_Ignored"


def test_the_loss_scaler_of_float16_training(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    file = tmp_path / "optim_states.pt"
    scaler = DynamicLossScaler(256.0, 2.0, 1000, 1.0, 2, False, dtype=torch.half)
    torch.save({"loss_scaler": scaler}, file)
    assert set(restricted_load(file)) == {"loss_scaler"}


@pytest.mark.parametrize("size", [0, 10, 2000])
def test_a_file_that_was_cut_short(checkpoint, size):
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(
        PolarError, match=r"iter_7.pth: is not a whole checkpoint file.*an earlier checkpoint"
    ):
        read_checkpoint(checkpoint)


def test_what_is_no_checkpoint(tmp_path, checkpoint):
    with pytest.raises(PolarError, match=r"iter_9.pth: no such checkpoint; there are .*iter_7.pth"):
        read_checkpoint(tmp_path / "iter_9.pth")
    with pytest.raises(PolarError, match=r"holds no DeepSpeed checkpoint; there are .*iter_7.pth"):
        read_checkpoint(tmp_path)
    torch.save({"epoch": 3}, checkpoint)
    with pytest.raises(PolarError, match="holds no state_dict of tensors, but epoch"):
        read_checkpoint(checkpoint)
    torch.save([1, 2], checkpoint)
    with pytest.raises(PolarError, match="holds a list, not a checkpoint"):
        read_checkpoint(checkpoint)


def test_a_huggingface_folder_is_no_checkpoint(base):
    with pytest.raises(PolarError, match="it is a HuggingFace folder already"):
        read_checkpoint(base)
