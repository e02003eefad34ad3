"""Reading what training saved: real files of mmengine and DeepSpeed, small ones by hand, and bad ones."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer

from polar_ft.conversion.checkpoint import RUN_STATE, check_resumable, read_checkpoint
from polar_ft.conversion.restricted_load import _ZeroStage, restricted_load
from polar_ft.errors import PolarError

# Runs of train_tiny.py with DeepSpeed on three ranks, and the dtype in which the model ran.
RUNS = {
    "zero1": torch.float32,
    "zero2_offload": torch.float16,
    "zero3": torch.bfloat16,
    "zero3_offload": torch.bfloat16,
}


def test_a_file_of_mmengine(train):
    """It holds an optimizer, schedules and a message hub beside the weights."""
    file = train("plain")
    content = torch.load(file, weights_only=False)
    assert {"message_hub", "optimizer", "param_schedulers"} <= set(content)
    read = read_checkpoint(file)
    assert read.dtype == torch.float32
    assert set(read.tensors) == set(content["state_dict"])
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in content["state_dict"].items())


@pytest.mark.parametrize("run", RUNS)
def test_a_deepspeed_folder_gives_the_float32_weights(train, run):
    """The same as DeepSpeed's own script, to the bit, and the dtype in which the model ran."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = train(run)
    assert len(list(folder.glob("*_optim_states.pt"))) == 3
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    read = read_checkpoint(folder)
    assert read.dtype == RUNS[run]
    assert set(read.tensors) == set(expected)
    assert len(expected) == 21  # embeddings, 2 layers of 9, norm, head
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in expected.items())


def test_bfloat16_with_float32_gradients(train):
    """DeepSpeed's own script does not know these files; rounded, they are the weights of the model."""
    folder = train("zero1_float32_gradients")
    module = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    read = read_checkpoint(folder)
    assert read.dtype == torch.bfloat16
    assert set(read.tensors) == set(module)
    assert all(torch.equal(read.tensors[name].bfloat16(), tensor) for name, tensor in module.items())
    assert any(not torch.equal(read.tensors[name], tensor.float()) for name, tensor in module.items())


@settings(max_examples=40, deadline=None)
@given(
    stage=st.sampled_from([1, 2, 3]),
    ranks=st.integers(1, 9),
    groups=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=3),
    sub_group=st.integers(1, 40),
)
def test_any_number_of_ranks(stage, ranks, groups, sub_group):
    """Random parameters, cut as DeepSpeed cuts them, come back."""
    names = iter(range(100))
    parameters = [
        {f"p{next(names)}": torch.rand(size) for size in group}  # of several optimizer groups
        for group in groups
    ]
    if stage == 3:
        parameters = [{name: tensor for group in parameters for name, tensor in group.items()}]
        vectors = [[] for _ in range(ranks)]
        for tensor in parameters[0].values():
            piece = -(-len(tensor) // ranks)
            padded = torch.cat([tensor, torch.full((piece * ranks - len(tensor),), torch.nan)])
            for rank, own in enumerate(padded.split(piece)):
                vectors[rank].append(own)
        pieces = [list(torch.cat(own).split(sub_group)) for own in vectors]
    else:
        pieces = [[] for _ in range(ranks)]
        for group in parameters:
            flat = torch.cat(list(group.values()))
            padding = -len(flat) % (2 * ranks)
            split = torch.cat([flat, torch.full((padding,), torch.nan)]).chunk(ranks)
            for rank, own in enumerate(split):
                pieces[rank].append(own)
    shapes = [{name: tuple(tensor.shape) for name, tensor in group.items()} for group in parameters]
    module = {name: torch.zeros(0) for group in shapes for name in group}
    with tempfile.TemporaryDirectory() as folder:
        read = read_checkpoint(save_zero(Path(folder, "iter_1.pth"), stage, pieces, module, shapes))
        for group in parameters:
            for name, tensor in group.items():
                assert torch.equal(read.tensors[name], tensor)
        assert len(read.tensors) == len(module)


def save_zero(folder: Path, stage: int, ranks: list, module, shapes, frozen=None, alias=None) -> Path:
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
            "shared_params": alias,
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
    read = read_checkpoint(save_zero(tmp_path / "iter_1.pth", 2, ranks, module, shapes, alias={"again": "b"}))
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


def test_a_folder_that_is_too_short_by_less_than_the_padding(tmp_path):
    """Nine elements are written where ten are needed; with one rank the vector is a multiple of two."""
    ranks = [[torch.zeros(9)]]
    folder = save_zero(tmp_path / "iter_1.pth", 2, ranks, {"a": torch.zeros(10)}, [{"a": (10,)}])
    with pytest.raises(PolarError, match="10 elements, but its optimizer files 9"):
        read_checkpoint(folder)


def test_a_group_that_one_rank_does_not_have(tmp_path):
    ranks = [[torch.zeros(2), torch.zeros(1)], [torch.zeros(2)]]
    folder = save_zero(tmp_path / "iter_1.pth", 2, ranks, {"a": torch.zeros(4)}, [{"a": (4,)}, {"b": (2,)}])
    with pytest.raises(PolarError, match="have 2 groups of parameters, but its optimizer files 1"):
        read_checkpoint(folder)


def test_a_parameter_that_is_there_twice(tmp_path):
    ranks = [[torch.zeros(4), torch.zeros(4)]]
    module = {"a": torch.zeros(4)}
    folder = save_zero(tmp_path / "iter_1.pth", 2, ranks, module, [{"a": (4,)}, {"a": (4,)}])
    with pytest.raises(PolarError, match=r"iter_1.pth: holds a twice"):
        read_checkpoint(folder)


def test_a_rank_that_is_there_twice(tmp_path):
    folder = save_zero(tmp_path / "iter_1.pth", 2, [[torch.zeros(4)]], {"a": torch.zeros(4)}, [{"a": (4,)}])
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copyfile(folder / name, folder / f"bf16_{name}")
    with pytest.raises(PolarError, match=f"has both .*{name}.* not all of one checkpoint"):
        read_checkpoint(folder)


def test_tensor_parallel_files(tmp_path):
    folder = save_zero(tmp_path / "iter_1.pth", 2, [[torch.zeros(4)]], {"a": torch.zeros(4)}, [{"a": (4,)}])
    shutil.copyfile(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(PolarError, match=r"mp_rank_01_model_states.pt: .* tensor parallelism"):
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


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("form", ["pickle", "torch", "zip"])
def test_a_malicious_file_of_any_form_is_said_to_hold_code(tmp_path, protocol, form):
    file = tmp_path / "iter_1.pth"
    content = {"state_dict": {}, "meta": Bomb(tmp_path / "trace")}
    if form == "torch":
        torch.save(content, file, pickle_protocol=protocol)
    else:
        pickled = pickle.dumps(content, protocol=protocol)
        file.write_bytes(pickled)
        if form == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("iter_1/data.pkl", pickled)
                archive.writestr("iter_1/version", "3")
    for read in (read_checkpoint, restricted_load):
        with pytest.raises(PolarError) as refused:
            read(file)
        assert "needs posix.system, which is not known to be harmless: the file holds code and is" in str(
            refused.value
        )
        assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "trace").exists()


RESUMABLE = {
    "meta": {"iter": 2, "epoch": 0, "seed": 0},
    "state_dict": {"a": torch.zeros(1)},
    "message_hub": {"runtime_info": {RUN_STATE: {"ranks": 1}}},
    "optimizer": {},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"meta": {"config": "import os"}}, r"holds code \(a config in Python, in meta\) and is refused"),
        ({"message_hub": {}}, r"was not written by polar_ft \(it holds no step plan\)"),
        ({"optimizer": None}, "holds weights without optimizer; to train from its weights, convert it"),
        ({"meta": Bomb(Path("/dev/null"))}, "the file holds code and is refused"),
        ({"meta": HistoryBuffer([1.0], [1])}, "was written by another tool"),
    ],
)
def test_only_our_own_checkpoints_are_resumed(tmp_path, changes, message):
    file = tmp_path / "iter_2.pth"
    torch.save({name: value for name, value in (RESUMABLE | changes).items() if value is not None}, file)
    if message is None:
        check_resumable(file, deepspeed=False)
        with pytest.raises(PolarError, match="is a checkpoint of a run without DeepSpeed"):
            check_resumable(file, deepspeed=True)
        with pytest.raises(PolarError, match="is a DeepSpeed checkpoint; start the run with --deepspeed"):
            check_resumable(tmp_path, deepspeed=False)
        return
    with pytest.raises(PolarError, match=message) as refused:
        check_resumable(file, deepspeed=False)
    assert str(file) in str(refused.value)


def test_getattr_in_a_pickle_is_not_called(tmp_path):
    """mmengine's histories name it, so it is let through, as something that does nothing."""

    class Getter:
        def __reduce__(self):
            return getattr, (self.__class__.__module__, "join")

    file = tmp_path / "iter_1.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hub": Getter()}, file)
    assert type(restricted_load(file)["hub"]).__name__ == "_Ignored"


@pytest.mark.parametrize("by_name", [False, True], ids=["by value", "by name"])
def test_the_stage_as_every_python_pickles_it(tmp_path, by_name):
    """Some releases of Python 3.11 pickle the member of an enum as getattr(ZeroStageEnum, "gradients")."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    class Stage:
        def __reduce__(self):
            return (getattr, (ZeroStageEnum, "gradients")) if by_name else (ZeroStageEnum, (2,))

    file = tmp_path / "optim_states.pt"
    torch.save({"zero_stage": Stage()}, file)
    assert restricted_load(file)["zero_stage"] == 2
    assert {stage.name: stage.value for stage in _ZeroStage} == {s.name: s.value for s in ZeroStageEnum}


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
