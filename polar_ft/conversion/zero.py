"""The float32 master weights of a DeepSpeed ZeRO checkpoint, read tensor by tensor.

What ``deepspeed/utils/zero_to_fp32.py`` (0.16.2) does, without holding the whole model in memory and
without ``torch.load(weights_only=False)``. Where a parameter lies:

ZeRO 1 and 2: the parameters of an optimizer group stand one after the other in one vector, of which each
rank holds a piece; a parameter may cross from one piece into the next::

    group   | a a a a a a | b b b b | c c c c c c |
    rank    | 0 0 0 0 0 0   0 0 | 1 1   1 1 1 1 1 1 |

ZeRO 3: each parameter is cut into equal pieces, one a rank, the last one padded; a rank's pieces stand one
after the other, spread over several vectors where the optimizer has sub-groups::

    rank 0  | a a a | b b | c c c |
    rank 1  | a a a | b b | c c c |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from polar_ft.conversion.restricted_load import restricted_load
from polar_ft.errors import PolarError

_RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_(optim|model)_states\.pt")
_MODEL_PARALLEL_FILE = re.compile(r".*mp_rank_(?!00_)\d+_.*states\.pt")

# Pieces that stand one after the other, as views of what is on disk.
_Read = Callable[[], list[torch.Tensor]]


class FlatVector:
    """One-dimensional tensors read as one vector.

    >>> vector = FlatVector([torch.tensor([0, 1, 2]), torch.tensor([3, 4])])
    >>> [piece.tolist() for piece in vector.read(1, 3)]
    [[1, 2], [3]]
    """

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self._pieces = pieces
        self._starts = [0, *accumulate(piece.numel() for piece in pieces)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> list[torch.Tensor]:
        """``count`` elements from ``start`` on, as views of the tensors that they are in."""
        stop = start + count
        return [
            piece[max(start - first, 0) : stop - first]
            for piece, first in zip(self._pieces, self._starts[:-1], strict=True)
            if first < stop and start < first + piece.numel()
        ]


class ZeroWeights(Mapping[str, torch.Tensor]):
    """Parameters of a ZeRO checkpoint by name, in float32; each is put together when it is asked for.

    One that lies in one piece is a view of the file; only others take memory.

    Attributes:
        folder: Where the checkpoint is.
        dtype: The dtype in which the model ran.
        shapes: Shape of every parameter.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, _Read] = {}

    def add(self, name: str, shape: Sequence[int], read: _Read) -> None:
        """Makes a parameter known.

        Raises:
            PolarError: There is one of this name.
        """
        if name in self.shapes:
            raise PolarError(f"{self.folder}: holds {name} twice; take another checkpoint")
        self.shapes[name] = tuple(shape)
        self._readers[name] = read

    def add_alias(self, alias: str, name: str) -> None:
        """Makes a parameter known by another name too."""
        self.add(alias, self.shapes[name], self._readers[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces = self._readers[name]()
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat[: math.prod(self.shapes[name])].view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def is_zero_folder(folder: Path) -> bool:
    """Whether a folder holds a DeepSpeed checkpoint."""
    return any(folder.glob("*_model_states.pt")) or any(folder.glob("*_optim_states.pt"))


def open_zero(folder: Path) -> ZeroWeights:
    """Opens a DeepSpeed checkpoint: ZeRO stage 1, 2 or 3, with offload or without, of any number of ranks.

    Raises:
        PolarError: Files of some ranks are missing, are damaged, or do not fit each other.
    """
    parallel = sorted(file.name for file in folder.iterdir() if _MODEL_PARALLEL_FILE.fullmatch(file.name))
    if parallel:
        raise PolarError(
            f"{folder / parallel[0]}: is a part of a model that was cut by tensor parallelism, which is not "
            f"read; only ZeRO is"
        )
    optimizer_files = _files_by_rank(folder, "optim")
    if not optimizer_files:
        raise PolarError(
            f"{folder}: has no *zero_pp_rank_*_optim_states.pt, in which ZeRO keeps the float32 weights; "
            f"copy the whole folder, from every node"
        )
    states = {rank: _optimizer_state(file) for rank, file in optimizer_files.items()}
    first = next(iter(states.values()))
    stage = int(first.get("zero_stage", 1))
    ranks = first["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else int(ranks)
    _check_ranks(folder, "optim", optimizer_files, ranks)
    _check_steps(optimizer_files, states)

    if stage == 3:
        model_files = _files_by_rank(folder, "model")
        _check_ranks(folder, "model", model_files, ranks)
    else:
        model_files = {0: folder / "mp_rank_00_model_states.pt"}
    models = [restricted_load(model_files[rank]) for rank in sorted(model_files)]

    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    try:
        groups = [states[rank][key] for rank in range(ranks)]
        trained = models[0]["param_shapes"]
        weights = ZeroWeights(folder, _model_dtype(models[0]["module"]))
        (_add_stage_3 if stage == 3 else _add_stage_1_2)(weights, groups, trained)
        _add_frozen(weights, models)
        _add_buffers(weights, models[0])
    except KeyError as error:
        raise PolarError(f"{folder}: the files have no {error.args[0]!r}; not a ZeRO checkpoint") from error
    for alias, name in (models[0].get("shared_params") or {}).items():
        if name in weights.shapes:
            weights.add_alias(alias, name)
    return weights


def _add_stage_1_2(
    weights: ZeroWeights,
    groups: Sequence[Sequence[torch.Tensor]],
    trained: Sequence[Mapping[str, torch.Size]],
) -> None:
    ranks = len(groups)
    if any(len(pieces) != len(trained) for pieces in groups):
        raise _sizes_differ(weights.folder, len(trained), min(map(len, groups)), "groups of parameters")
    for number, parameters in enumerate(trained):
        vector = FlatVector([pieces[number] for pieces in groups])
        offset = 0
        for name, shape in parameters.items():
            weights.add(name, shape, partial(vector.read, offset, math.prod(shape)))
            offset += math.prod(shape)
        # The vector is padded to a multiple of 2 × ranks; how much of that is saved varies.
        align = 2 * ranks
        if len(vector) < offset or math.ceil(offset / align) != math.ceil(len(vector) / align):
            raise _sizes_differ(weights.folder, offset, len(vector))


def _add_stage_3(
    weights: ZeroWeights,
    groups: Sequence[Sequence[torch.Tensor]],
    trained: Sequence[Mapping[str, torch.Size]],
) -> None:
    ranks = len(groups)
    vectors = [FlatVector(pieces) for pieces in groups]
    offset = 0
    for parameters in trained:
        for name, shape in parameters.items():
            piece = math.ceil(math.prod(shape) / ranks)
            weights.add(name, shape, partial(_read_all, vectors, offset, piece))
            offset += piece
    if any(len(vector) != offset for vector in vectors):
        raise _sizes_differ(weights.folder, offset, min(map(len, vectors)))


def _read_all(vectors: Sequence[FlatVector], start: int, count: int) -> list[torch.Tensor]:
    return [piece for vector in vectors for piece in vector.read(start, count)]


def _add_frozen(weights: ZeroWeights, models: Sequence[Mapping[str, Any]]) -> None:
    """Parameters without gradient are saved apart: whole in ZeRO 1 and 2, a piece a rank in ZeRO 3."""
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        pieces = [model["frozen_param_fragments"][name] for model in models]
        if sum(piece.numel() for piece in pieces) < math.prod(shape):
            raise _sizes_differ(weights.folder, math.prod(shape), sum(p.numel() for p in pieces))
        weights.add(name, shape, partial(_flattened, pieces))


def _add_buffers(weights: ZeroWeights, model: Mapping[str, Any]) -> None:
    """Buffers are whole on every rank; adapters keep their settings in one."""
    for name in model.get("buffer_names") or ():
        if name in model["module"]:
            buffer = model["module"][name]
            weights.add(name, buffer.shape, partial(_flattened, [buffer]))


def _flattened(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [piece.flatten() for piece in pieces]


def _optimizer_state(file: Path) -> dict[str, Any]:
    state = restricted_load(file).get("optimizer_state_dict")
    # Without ZeRO, or with its stage 1 and float32 gradients, DeepSpeed keeps the master weights of bf16 as
    # stage 1 does, but names no stage (``runtime/bf16_optimizer.py``).
    known = {"zero_stage", "single_partition_of_fp32_groups"}
    if not isinstance(state, dict) or not known & set(state) or "partition_count" not in state:
        raise PolarError(f"{file}: was not saved by DeepSpeed's ZeRO; only ZeRO stages 1, 2 and 3 are read")
    return state


def _files_by_rank(folder: Path, kind: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for file in folder.iterdir():
        match = _RANK_FILE.fullmatch(file.name)
        if match and match[2] == kind:
            rank = int(match[1])
            if rank in found:
                raise PolarError(
                    f"{folder}: has both {found[rank].name} and {file.name}; the files are not all of one "
                    f"checkpoint"
                )
            found[rank] = file
    return dict(sorted(found.items()))


def _check_ranks(folder: Path, kind: str, files: Mapping[int, Path], ranks: int) -> None:
    missing = sorted(set(range(ranks)) - set(files))
    extra = sorted(set(files) - set(range(ranks)))
    if missing or extra:
        found = (
            f"those of ranks {missing} are missing" if missing else f"those of ranks {extra} are left over"
        )
        raise PolarError(
            f"{folder}: was saved by {ranks} ranks, and of the *_{kind}_states.pt files {found}; "
            f"gather the files of all nodes in one folder"
        )


def _check_steps(files: Mapping[int, Path], states: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises PolarError if the optimizers of two ranks have made different numbers of steps."""
    steps = {rank: made for rank, state in states.items() if (made := _steps(state))}
    for rank, made in steps.items():
        first = min(steps)
        if made != steps[first]:
            raise PolarError(
                f"{files[rank]}: was saved after step {max(made)}, but {files[first].name} after step "
                f"{max(steps[first])}; the files are not all of one checkpoint"
            )


def _steps(state: Mapping[str, Any]) -> set[int]:
    """The numbers of steps that an optimizer keeps: with every tensor of its state, or for a whole group."""
    optimizer = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    if not isinstance(optimizer, Mapping):
        return set()
    entries = [*(optimizer.get("state") or {}).values(), *(optimizer.get("param_groups") or ())]
    return {int(entry["step"]) for entry in entries if isinstance(entry, Mapping) and "step" in entry}


def _model_dtype(module: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype in which the model ran: under ZeRO 3 the tensors are empty, but have it."""
    dtypes = {tensor.dtype for tensor in module.values() if tensor.is_floating_point()}
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    return torch.float16 if torch.float16 in dtypes else dtype


def _sizes_differ(folder: Path, wanted: int, found: int, what: str = "elements") -> PolarError:
    return PolarError(
        f"{folder}: its parameters have {wanted} {what}, but its optimizer files {found}; the files are "
        f"not all of one checkpoint"
    )
