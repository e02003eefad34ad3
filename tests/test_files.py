"""Finding the folder of a model, and what is said where it is neither here nor on the hub; locks."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import requests
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from polar_ft.errors import PolarError
from polar_ft.files import first_line, lock_file, resolve_folder

NAME = "internlm/POLAR-1_8B-Base"


def not_here(cause: Exception) -> Exception:
    """What a download raises where the hub was not reached, and why."""
    error = LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
    error.__cause__ = cause
    return error


def answer(status: int) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    return response


# What huggingface_hub 0.36 raises in each case, and what the user has to be told.
FAILURES = {
    "offline": (
        not_here(OfflineModeIsEnabled("offline mode is enabled")),
        "switched off (HF_HUB_OFFLINE); unset it, or name a folder",
    ),
    "no network": (
        not_here(requests.ConnectionError("no route to host")),
        "cannot be reached from here; check the network",
    ),
    "no such model": (
        RepositoryNotFoundError("404 Client Error. (Request ID: x)\n\nNot Found", response=answer(404)),
        "has no such model; check the spelling, or log in if it is private",
    ),
    "terms": (GatedRepoError("403 Client Error", response=answer(403)), "accepted its terms"),
    "name": (HFValidationError("Repo id must not end with '.'"), "check the spelling"),
    "other": (OSError("No space left on device"), "failed (OSError: No space left on device)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_why_the_hub_gave_no_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, said = FAILURES[case]

    def snapshot_download(name: str) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(PolarError) as raised:
        resolve_folder(NAME)
    message = str(raised.value)
    assert message.startswith(f"{NAME}: is no folder here, and ")
    assert said in message
    # The name may come from a config or the command line, and spelling is not blamed for a missing network.
    assert "pretrained_model_name_or_path" not in message
    assert ("spelling" in message) == (case in ("no such model", "name"))


def test_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: pytest.fail("asked the hub"))
    assert resolve_folder(tmp_path) == tmp_path
    with pytest.raises(PolarError, match="no such folder; check the spelling of the path"):
        resolve_folder(tmp_path / "none")


def test_a_long_line_ends_with_a_word() -> None:
    assert first_line(ValueError("abc defg hij"), limit=7) == "abc …"
    assert first_line(ValueError("abcdefgh"), limit=4) == "abcd …"


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    file = tmp_path / ".lock"
    held = lock_file(file, "held by another")
    with pytest.raises(PolarError, match="held by another"):
        lock_file(file, "held by another")
    held.close()
    lock_file(file, "held by another").close()
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "missing" / ".lock", "held")
