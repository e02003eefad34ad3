"""Folders and files of models: finding them, reading JSON, writing so that nothing is left half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message; its type where it has none.

    >>> first_line(ValueError("no such key\\nTraceback …")), first_line(AssertionError())
    ('no such key', 'AssertionError')
    """
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def resolve_folder(folder: str | os.PathLike[str]) -> Path:
    """The local folder of a model: the path itself, or the downloaded snapshot of a hub id.

    Raises:
        PolarError: Neither a folder nor something that the hub has.
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
            raise PolarError(
                f"{name}: is no folder here, and the HuggingFace hub did not give it either "
                f"({type(error).__name__}: {first_line(error, 160)}); check the spelling of "
                f"pretrained_model_name_or_path"
            ) from error
    raise PolarError(f"{name}: no such folder; check the spelling of the path")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        PolarError: The file is not there, or is not a JSON object.
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
    """Writes a file to a temporary name and renames it: readers see the old content or the new, never a part.

    Raises:
        OSError: It could not be written; what was there before is unchanged.
    """
    with unfinished(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A temporary path next to ``target``, renamed to it when the block ends without an error, else removed.

    What the block writes there may be a file or a folder; a folder replaces nothing that exists.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
