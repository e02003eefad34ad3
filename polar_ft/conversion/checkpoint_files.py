"""The files of checkpoints: atomic publication with a manifest, verification, and which one to resume from.

A checkpoint of step N is ``iter_N.pth``, a file, or with DeepSpeed a directory. It is written to the folder
``unfinished``; then its files are recorded in a manifest with sizes and checksums, and only then renamed::

    work_dir/iter_40.pth                    a file, or a directory
    work_dir/iter_40.pth.manifest.json      its manifest (of a directory: iter_40.pth/manifest.json)
    work_dir/last_checkpoint                the path of the newest one
    work_dir/best_checkpoint                the path of the best one, weights only

So whatever has a manifest is complete, unless somebody changed it, which the checksums show.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

import polar_ft
from polar_ft.errors import PolarError
from polar_ft.files import first_line, write_atomically

UNFINISHED = "unfinished"
POINTER = "last_checkpoint"
BEST = "best_checkpoint"
_NAME = re.compile(r"iter_(\d+)\.pth")
_BLOCK = 1 << 23


class FileEntry(BaseModel):
    """Size in bytes and XXH3 checksum (128 bits, hexadecimal) of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    xxh3_128: str


class Manifest(BaseModel):
    """What a checkpoint consists of.

    Attributes:
        step: Optimizer steps that its state has seen.
        ranks: Processes that wrote it.
        polar_ft: Version that wrote it.
        run: Settings of the run that it belongs to, by name; None where an older version wrote it.
        files: By path within the checkpoint; a checkpoint that is a file has one, by its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    ranks: int
    polar_ft: str
    run: dict[str, Any] | None = None
    files: dict[str, FileEntry]


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    if checkpoint.is_dir():
        return checkpoint / "manifest.json"
    return checkpoint.with_name(f"{checkpoint.name}.manifest.json")


def publish(unfinished: Path, target: Path, step: int, ranks: int, run: dict[str, Any] | None = None) -> None:
    """Writes the manifest of a checkpoint, then renames it atomically.

    Args:
        unfinished: Where it was written, on the file system of the target.
        target: Its final path; what exists there is replaced.
        step: Optimizer steps that its state has seen.
        ranks: Processes that wrote it.
        run: See `Manifest`.
    """
    names = _files(unfinished)
    with ThreadPoolExecutor() as pool:
        entries = pool.map(lambda name: _entry(_file(unfinished, name), sync=True), names)
        files = dict(zip(names, entries, strict=True))
    manifest = Manifest(step=step, ranks=ranks, polar_ft=polar_ft.__version__, run=run, files=files)
    written = manifest_path(unfinished)
    written.write_text(f"{manifest.model_dump_json(indent=1)}\n", encoding="utf-8")
    remove_checkpoint(target)
    if not unfinished.is_dir():
        # First: a checkpoint that is there has its manifest.
        written.replace(manifest_path(target))
    unfinished.replace(target)


def verify(checkpoint: Path) -> Manifest | None:
    """Compares a checkpoint with its manifest.

    Returns:
        The manifest; None for a checkpoint without one, which another tool or an older version wrote.

    Raises:
        PolarError: There is no such checkpoint, or a file of it is missing, new or changed.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return None
    found = _files(checkpoint)
    for name in sorted(set(found) ^ set(manifest.files)):
        problem = "is not part of this checkpoint" if name in found else "is missing"
        raise PolarError(f"{_file(checkpoint, name)}: {problem}; take another checkpoint")
    for name, entry in manifest.files.items():
        file = _file(checkpoint, name)
        if file.stat().st_size != entry.size:
            raise PolarError(
                f"{file}: has {file.stat().st_size} bytes instead of {entry.size}; take another checkpoint"
            )
    with ThreadPoolExecutor() as pool:
        for name, entry in zip(found, pool.map(lambda n: _entry(_file(checkpoint, n)), found), strict=True):
            if entry != manifest.files[name]:
                raise PolarError(
                    f"{_file(checkpoint, name)}: is not what was saved (its checksum differs); take "
                    f"another checkpoint"
                )
    return manifest


def read_manifest(checkpoint: Path) -> Manifest | None:
    """Reads the manifest of a checkpoint without looking at its files; None where it has none.

    Raises:
        PolarError: There is no such checkpoint, or its manifest is damaged.
    """
    if not checkpoint.exists():
        raise PolarError(f"{checkpoint}: no such checkpoint")
    path = manifest_path(checkpoint)
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, UnicodeDecodeError) as error:
        raise PolarError(f"{path}: is damaged; take another checkpoint") from error


def checkpoints(work_dir: Path) -> list[Path]:
    """The checkpoints of a work folder that have a manifest, of the greatest step first."""
    found = [
        (int(match[1]), path) for path in work_dir.glob("iter_*.pth") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True) if manifest_path(path).is_file()]


def resolve_checkpoint(named: Path, work_dir: Path) -> Path:
    """The checkpoint that a command line names.

    Args:
        named: A checkpoint; ``best`` or ``last``; or a file ``best_checkpoint`` or ``last_checkpoint``, which
            holds the path of one.
        work_dir: Where ``best`` and ``last`` are looked up.

    Raises:
        PolarError: There is no such file, or what it names is gone.
    """
    pointers = {"best": BEST, "last": POINTER}
    if str(named) in pointers:
        named = work_dir / pointers[str(named)]
    if named.name not in pointers.values() or named.is_dir():
        return named
    checkpoint = pointed_to(named.parent, named.name)
    if checkpoint is None:
        why = ": no validation gave a model better than the first" if named.name == BEST else ""
        raise PolarError(
            f"{named}: no such file{why}; if the run had a --work-dir, name the file {named.name} there, or "
            f"name a checkpoint iter_N.pth"
        )
    if not checkpoint.exists():
        raise PolarError(f"{named}: names {checkpoint}, which is gone; name another checkpoint")
    return checkpoint


def newest_complete(work_dir: Path, on_refused: Callable[[str], None]) -> Path | None:
    """The checkpoint of the greatest step that matches its manifest; None where there is none.

    Args:
        work_dir: Of the run.
        on_refused: Called with what is wrong with a newer one.
    """
    for checkpoint in checkpoints(work_dir):
        try:
            verify(checkpoint)
        except PolarError as error:
            on_refused(str(error))
        else:
            return checkpoint
    return None


def prune(work_dir: Path, keep: int) -> None:
    """Removes all but the checkpoints that were written last; with ``keep`` below 1 none is removed."""
    if keep > 0:
        by_time = sorted(checkpoints(work_dir), key=lambda path: manifest_path(path).stat().st_mtime_ns)
        for outdated in by_time[:-keep]:
            remove_checkpoint(outdated)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint and its manifest, if it exists."""
    if checkpoint.is_dir():
        # Without a manifest it is no checkpoint, whenever this is interrupted.
        manifest_path(checkpoint).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
    else:
        manifest_path(checkpoint).unlink(missing_ok=True)
        checkpoint.unlink(missing_ok=True)


def point_to(checkpoint: Path, pointer: str = POINTER) -> None:
    """Writes the path of a checkpoint into a file next to it, as mmengine does with ``last_checkpoint``."""
    write_atomically(checkpoint.with_name(pointer), str(checkpoint))


def pointed_to(work_dir: Path, pointer: str = POINTER) -> Path | None:
    """The path that `point_to` wrote last, also of a folder that was moved; None where there is none."""
    file = work_dir / pointer
    if not file.is_file():
        return None
    named = Path(file.read_text(encoding="utf-8", errors="replace").strip())
    moved = work_dir / named.name
    return moved if not named.exists() and moved.exists() else named


@contextmanager
def explaining_save_errors(target: Path) -> Iterator[None]:
    """Turns a failure to save a checkpoint into a message that names the last complete one.

    Raises:
        PolarError: It could not be saved.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save turns a failed write into a RuntimeError of its zip writer.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        shutil.rmtree(target.with_name(UNFINISHED), ignore_errors=True)
        last = pointed_to(target.parent)
        kept = f"the last complete checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise PolarError(
            f"{target}: could not be saved, is the disk full? ({_reason(error)}); {kept}; make room or "
            f"choose another --work-dir, then resume with --resume"
        ) from error


def _reason(error: BaseException) -> str:
    """The cause; torch reports a failed write as an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)


def _files(checkpoint: Path) -> list[str]:
    """Names of the files of a checkpoint, its manifest left out."""
    if not checkpoint.is_dir():
        return [checkpoint.name]
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path != manifest_path(checkpoint))
    return sorted(path.relative_to(checkpoint).as_posix() for path in files)


def _file(checkpoint: Path, name: str) -> Path:
    return checkpoint / name if checkpoint.is_dir() else checkpoint


def _entry(file: Path, sync: bool = False) -> FileEntry:
    digest = xxhash.xxh3_128()
    size = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            # What a manifest lists has to survive a loss of power too.
            os.fsync(stream.fileno())
    return FileEntry(size=size, xxh3_128=digest.hexdigest())
