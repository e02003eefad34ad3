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
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from polar_ft.conversion.restricted_load import restricted_load
from polar_ft.errors import PolarError

_RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_(optim|model)_states\.pt")


class FlatVector:
    """One-dimensional tensors read as one vector.

    >>> FlatVector([torch.tensor([0, 1, 2]), torch.tensor([3, 4])]).read(1, 3).tolist()
    [1, 2, 3]
    """

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self._pieces = pieces
        self._starts = [0, *accumulate(piece.numel() for piece in pieces)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> torch.Tensor:
        """A copy of ``count`` elements from ``start`` on."""
        stop = start + count
        return torch.cat(
            [
                piece[max(start - first, 0) : stop - first]
                for piece, first in zip(self._pieces, self._starts[:-1], strict=True)
                if first < stop and start < first + piece.numel()
            ]
        )


class ZeroWeights(Mapping[str, torch.Tensor]):
    """Parameters of a ZeRO checkpoint by name, in float32; each is put together when it is asked for.

    Attributes:
        folder: Where the checkpoint is.
        dtype: The dtype in which the model ran.
        shapes: Shape of every parameter.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, ...]],
        readers: Mapping[str, Callable[[], torch.Tensor]],
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.shapes = dict(shapes)
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._readers[name]().view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def is_zero_folder(folder: Path) -> bool:
    """Whether a folder holds a DeepSpeed checkpoint."""
    return any(folder.glob("*_model_states.pt")) or any(folder.glob("*_optim_states.pt"))


def open_zero(folder: Path) -> ZeroWeights:
    """Opens a DeepSpeed checkpoint of ZeRO stage 1, 2 or 3.

    Raises:
        PolarError: Files of some ranks are missing, are damaged, or do not fit each other.
    """
    optimizer_files = _files_by_rank(folder, "optim")
    if not optimizer_files:
        raise PolarError(
            f"{folder}: has no *zero_pp_rank_*_optim_states.pt, in which ZeRO keeps the float32 weights; "
            f"copy the whole folder, from every node"
        )
    states = {rank: _optimizer_state(file) for rank, file in optimizer_files.items()}
    first = next(iter(states.values()))
    stage = int(first["zero_stage"])
    ranks = first["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else int(ranks)
    _check_ranks(folder, "optim", optimizer_files, ranks)

    if stage == 3:
        model_files = _files_by_rank(folder, "model")
        _check_ranks(folder, "model", model_files, ranks)
    else:
        model_files = {0: folder / "mp_rank_00_model_states.pt"}
    models = [restricted_load(model_files[rank]) for rank in sorted(model_files)]

    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    try:
        groups = [states[rank][key] for rank in range(ranks)]
        trained = models[0]["param_shapes"]
        dtype = _model_dtype(models[0]["module"])
    except KeyError as error:
        raise PolarError(f"{folder}: the files have no {error.args[0]!r}; not a ZeRO checkpoint") from error
    if stage == 3:
        _add_stage_3(folder, groups, trained, shapes, readers)
    else:
        _add_stage_1_2(folder, groups, trained, shapes, readers)
    _add_frozen(models, shapes, readers)
    for alias, name in (models[0].get("shared_params") or {}).items():
        if name in readers:
            shapes[alias], readers[alias] = shapes[name], readers[name]
    return ZeroWeights(folder, dtype, shapes, readers)


def _add_stage_1_2(
    folder: Path,
    groups: Sequence[Sequence[torch.Tensor]],
    trained: Sequence[Mapping[str, torch.Size]],
    shapes: dict[str, tuple[int, ...]],
    readers: dict[str, Callable[[], torch.Tensor]],
) -> None:
    ranks = len(groups)
    for number, parameters in enumerate(trained):
        vector = FlatVector([pieces[number] for pieces in groups])
        offset = 0
        for name, shape in parameters.items():
            shapes[name] = tuple(shape)
            readers[name] = _reader(vector, offset, math.prod(shape))
            offset += math.prod(shape)
        # The vector is padded to a multiple of 2 × ranks; how much of that is saved varies.
        align = 2 * ranks
        if math.ceil(offset / align) != math.ceil(len(vector) / align):
            raise _sizes_differ(folder, offset, len(vector))


def _add_stage_3(
    folder: Path,
    groups: Sequence[Sequence[torch.Tensor]],
    trained: Sequence[Mapping[str, torch.Size]],
    shapes: dict[str, tuple[int, ...]],
    readers: dict[str, Callable[[], torch.Tensor]],
) -> None:
    ranks = len(groups)
    vectors = [FlatVector(pieces) for pieces in groups]
    offset = 0
    for parameters in trained:
        for name, shape in parameters.items():
            shapes[name] = tuple(shape)
            piece = math.ceil(math.prod(shape) / ranks)
            readers[name] = _gatherer([_reader(v, offset, piece) for v in vectors], math.prod(shape))
            offset += piece
    if any(len(vector) != offset for vector in vectors):
        raise _sizes_differ(folder, offset, min(map(len, vectors)))


def _add_frozen(
    models: Sequence[Mapping[str, Any]],
    shapes: dict[str, tuple[int, ...]],
    readers: dict[str, Callable[[], torch.Tensor]],
) -> None:
    """Parameters without gradient are beside the model: whole in ZeRO 1 and 2, a piece a rank in ZeRO 3."""
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        shapes[name] = tuple(shape)
        pieces = [_whole(model["frozen_param_fragments"][name]) for model in models]
        readers[name] = _gatherer(pieces, math.prod(shape))


def _reader(vector: FlatVector, offset: int, count: int) -> Callable[[], torch.Tensor]:
    return lambda: vector.read(offset, count)


def _whole(piece: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: piece.flatten()


def _gatherer(pieces: Sequence[Callable[[], torch.Tensor]], count: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([read() for read in pieces])[:count]


def _optimizer_state(file: Path) -> dict[str, Any]:
    state = restricted_load(file).get("optimizer_state_dict")
    if not isinstance(state, dict) or "zero_stage" not in state or "partition_count" not in state:
        raise PolarError(f"{file}: was not saved by DeepSpeed's ZeRO; only ZeRO stages 1, 2 and 3 are read")
    return state


def _files_by_rank(folder: Path, kind: str) -> dict[int, Path]:
    found = {}
    for file in folder.iterdir():
        match = _RANK_FILE.fullmatch(file.name)
        if match and match[2] == kind:
            found[int(match[1])] = file
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


def _model_dtype(module: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype in which the model ran: under ZeRO 3 the tensors are empty, but have it."""
    dtypes = {tensor.dtype for tensor in module.values() if tensor.is_floating_point()}
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    return torch.float16 if torch.float16 in dtypes else dtype


def _sizes_differ(folder: Path, wanted: int, found: int) -> PolarError:
    return PolarError(
        f"{folder}: its parameters have {wanted} elements, but its optimizer files {found}; the files are "
        f"not all of one checkpoint"
    )
