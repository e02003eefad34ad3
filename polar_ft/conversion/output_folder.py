"""Writing a folder atomically: to a temporary folder next to it, which then takes its place.

Whenever the process is killed, the folder is the old one or the new one. What it leaves is removed by the
next run: a temporary folder is locked while its process lives (``flock`` of the folder itself).
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from polar_ft.errors import PolarError

# linux/fcntl.h and linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def unfinished_folder(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder next to ``out``, which takes its place at the end; a failure leaves nothing behind.

    Args:
        out: Folder to write; of a symbolic link, what it points to.
        force: Replace a model folder that exists.

    Raises:
        PolarError: It is a file or not empty, holds something else than a model, or cannot be written.
    """
    if out.is_symlink():
        out = out.resolve()
    _recover(out)
    if out.exists() and not out.is_dir():
        raise PolarError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise PolarError(f"{out}: is not empty; name another folder, or replace it with --force")
        if not (out / "config.json").is_file():
            raise PolarError(
                f"{out}: is not empty and holds no model, so it is not replaced; name another one"
            )
    made = [parent for parent in out.parents if not parent.exists()]
    partial: Path | None = None
    locked: int | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        partial.chmod(0o755)
        locked = _locked(partial)
        yield partial
        _replace(out, partial)
        made = []
    except (OSError, SafetensorError) as error:
        raise PolarError(f"{out}: cannot be written ({error}); nothing of it was left behind") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # the old folder, if there was one to be replaced
        if locked is not None:
            os.close(locked)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _recover(out: Path) -> None:
    """Puts back, or removes, what a process left that was killed while it wrote ``out``."""
    old = _old(out)
    if old.is_dir() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        locked = _locked(left)
        if locked is not None:  # its process has ended
            shutil.rmtree(left, ignore_errors=True)
            os.close(locked)


def _locked(folder: Path) -> int | None:
    """A file descriptor that locks a folder until it is closed; None where another process holds the lock."""
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also of file systems without locks of folders
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


def _replace(out: Path, partial: Path) -> None:
    """Puts the new folder in the place of the old one, which is then ``partial`` or gone."""
    if not out.is_dir():
        partial.rename(out)
        return
    if exchange(out, partial):
        return
    # Between the two renames there is no folder; `_recover` would put the old one back.
    old = _old(out)
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders at once; returns whether system and file system can do that."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28, Linux 3.15
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
