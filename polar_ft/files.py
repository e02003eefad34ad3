"""Folders and files of models: finding folders, reading JSON, writing files atomically, locks."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from polar_ft.errors import PolarError


def first_line(error: BaseException, limit: int = 200) -> str:
    """First line of an error's message; the name of its type if the message is empty.

    >>> first_line(ValueError("no such key\\nTraceback …")), first_line(AssertionError())
    ('no such key', 'AssertionError')
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # Cut between words.
    return lines[0] if len(lines[0]) <= limit else f"{lines[0][:limit].rsplit(maxsplit=1)[0]} …"


def resolve_folder(folder: str | os.PathLike[str]) -> Path:
    """Finds the local folder of a model: the path itself, or the downloaded snapshot of a hub id.

    Raises:
        PolarError: It is neither a folder nor a model of the hub.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    name = os.fspath(folder)
    if path.exists():
        raise PolarError(f"{name}: is a file; name the folder that holds the model")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(name))
        except Exception as error:
            raise PolarError(f"{name}: is no folder here, and {_hub_failure(error)}") from error
    raise PolarError(f"{name}: no such folder; check the spelling of the path")


def _hub_failure(error: BaseException) -> str:
    """Why the hub did not give a model, and what to do."""
    kinds = set()
    cause: BaseException | None = error
    while cause is not None:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    if "OfflineModeIsEnabled" in kinds:
        return (
            "downloading from the HuggingFace hub is switched off (HF_HUB_OFFLINE); unset it, or name a "
            "folder that holds the model"
        )
    if "GatedRepoError" in kinds:
        return (
            "the HuggingFace hub gives it only to users who have accepted its terms; do so on its page, then "
            "log in: huggingface-cli login"
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            "the HuggingFace hub has no such model; check the spelling, or log in if it is private: "
            "huggingface-cli login"
        )
    if "HFValidationError" in kinds:
        return "it is no name of a model of the HuggingFace hub; check the spelling"
    if kinds & {"ConnectionError", "ConnectError", "ConnectTimeout", "Timeout", "TimeoutException"}:
        return (
            "the HuggingFace hub cannot be reached from here; check the network and its proxy (HTTPS_PROXY; "
            "HF_ENDPOINT names a mirror), or copy the model to this machine and name its folder"
        )
    reason = f"{type(error).__name__}: {first_line(error)}"
    return f"the download from the HuggingFace hub failed ({reason}); try again"


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a model folder.

    Raises:
        PolarError: The file does not exist, or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PolarError(
            f"{file.parent}: has no {file.name}; name a folder that holds a complete model"
        ) from error
    except ValueError as error:  # also of the decoding
        raise PolarError(f"{file}: is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise PolarError(f"{file}: is not a JSON object; the file is damaged")
    return content


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name, then renames it: readers see the old content or the new one.

    Raises:
        OSError: The file could not be written; the old file is unchanged.
    """
    with unfinished(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Gives a temporary path next to ``target``; renamed to it if the block succeeds, else removed.

    The block may write a file or a folder there; a folder replaces nothing that exists.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def lock_file(file: Path, held: str) -> BinaryIO:
    """Creates a file and locks it until it is closed or the process ends, however it ends.

    Args:
        file: The file, in a folder that exists; what is in it is removed.
        held: What is said if another process has locked it.

    Raises:
        PolarError: Another process has locked it.
        OSError: It cannot be written, or the file system has no locks.
    """
    import fcntl  # not on Windows, where the client alone is used

    stream = file.open("wb")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise PolarError(held) from None
    except OSError:
        stream.close()
        raise
    return stream
