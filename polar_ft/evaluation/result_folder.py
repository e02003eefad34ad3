"""A result folder holds one evaluation: `evaluation.json` says whose results are in it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from polar_ft.errors import PolarError
from polar_ft.evaluation.cache import file_sha256
from polar_ft.evaluation.report.report import (
    HTML_FILE,
    MARKDOWN_FILE,
    METRICS_FILE,
    PLOTS_FOLDER,
    DataFile,
    Report,
)
from polar_ft.evaluation.scores import RANKINGS_FILE, SCORES_FILE
from polar_ft.files import write_atomically

EVALUATION_FILE = "evaluation.json"

# What a report says again with other figures of the same scores.
REPORT_FILES = (METRICS_FILE, HTML_FILE, MARKDOWN_FILE)


class Evaluation(BaseModel):
    """What decides the scores of an evaluation, and how long it has taken: the content of `evaluation.json`.

    Attributes:
        model: The model's folder as it was named; None for scores of another tool.
        model_hash: Hash of its weights, config and tokenizer; None where it has no weights.
        data: The files, with the hash of each, in their order.
        settings: Options that decide pairs or scores.
        seconds: Time spent scoring so far, in all parts of an interrupted evaluation.
        pairs_scored: Pairs for which the model computed a reward in that time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: int = 1
    model: str | None = None
    model_hash: str | None = None
    data: list[DataFile]
    settings: dict[str, Any] = {}
    seconds: float = 0.0
    pairs_scored: int = 0

    @property
    def parts(self) -> dict[str, Any]:
        """What must be equal for an evaluation to be the same; a file counts by its content, if it is one."""
        return {
            "model": self.model_hash or self.model,
            "data": [file.sha256 or file.path for file in self.data],
            **self.settings,
        }

    @property
    def key(self) -> str:
        """A hash of `parts`."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_by_content(self) -> bool:
        """Whether model and data are known by their content, so that a change of either is noticed."""
        return self.model_hash is not None and all(file.sha256 is not None for file in self.data)

    def folder_name(self) -> str:
        """A name for its folder that no other evaluation has: model, data and `key`.

        >>> data = [DataFile(path="data/held_out.jsonl.gz", sha256="ab")]
        >>> Evaluation(model="models/polar-tiny", data=data).folder_name()
        'polar-tiny-held_out-bed3c8df'
        """
        names = [Path(self.model or "scores").resolve().name, Path(self.data[0].path).name.partition(".")[0]]
        name = "-".join(re.sub(r"[^\w.-]+", "_", name) for name in names if name)
        return f"{name}-{self.key[:8]}"


def check_free(folder: Path, evaluation: Evaluation, *, replace: bool) -> None:
    """Raises a `PolarError` where a folder holds another evaluation, or results of an unknown one.

    Args:
        folder: The result folder; need not exist.
        evaluation: Whose results are to go there.
        replace: Whether what is there may go.
    """
    held = read_evaluation(folder)
    if replace or (held is not None and held.key == evaluation.key):
        return
    if held is None:
        if any((folder / name).exists() for name in (METRICS_FILE, SCORES_FILE)):
            raise PolarError(
                f"{folder}: holds results that do not say which evaluation they are of; name another folder "
                f"with --out, or replace them with --force"
            )
        return
    theirs, ours = held.parts, evaluation.parts
    differs = [
        f"{name.replace('_', ' ')}: {_shown(name, held)}, now {_shown(name, evaluation)}"
        for name in dict.fromkeys((*theirs, *ours))
        if theirs.get(name) != ours.get(name)
    ]
    raise PolarError(
        f"{folder}: holds the results of another evaluation ({'; '.join(differs)}); name another folder with "
        f"--out, or replace them with --force"
    )


def claim(folder: Path, evaluation: Evaluation, *, replace: bool = False) -> Evaluation:
    """Makes a folder that of an evaluation; what it has taken so far is what the folder says of it.

    Raises:
        PolarError: See `check_free`.
        OSError: It cannot be written to.
    """
    check_free(folder, evaluation, replace=replace)
    held = read_evaluation(folder)
    if held is not None and held.key == evaluation.key:
        return held
    for name in (*REPORT_FILES, SCORES_FILE, RANKINGS_FILE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PLOTS_FOLDER, ignore_errors=True)
    write_evaluation(folder, evaluation)
    return evaluation


def read_evaluation(folder: Path) -> Evaluation | None:
    """Whose results a folder holds; None where it does not say."""
    try:
        return Evaluation.model_validate_json((folder / EVALUATION_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Writes `evaluation.json`."""
    write_atomically(folder / EVALUATION_FILE, f"{evaluation.model_dump_json(indent=2)}\n")


def finished_report(
    folder: Path, evaluation: Evaluation, subset_by: Sequence[str], *, gates: bool, versions: dict[str, str]
) -> Report | None:
    """The report of a folder where nothing is left to do for an evaluation; None where something is.

    Args:
        folder: The result folder.
        evaluation: What is asked for.
        subset_by: Fields to report by.
        gates: Whether the checks of the scorer are asked for.
        versions: Versions of the packages; after an update everything is looked at again.
    """
    held = read_evaluation(folder)
    if held is None or held.key != evaluation.key or not evaluation.is_by_content:
        return None
    try:
        report = Report.model_validate_json((folder / METRICS_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    same = (
        report.run.results_sha256 == results_sha256(folder)
        and report.run.subset_by == list(subset_by)
        and report.run.versions == versions
        and bool(report.gates) == gates
        and all((folder / name).is_file() for name in REPORT_FILES)
    )
    good = report.metrics.overall.n_scored > 0 and not any(gate.status == "failed" for gate in report.gates)
    return report if same and good else None


def results_sha256(folder: Path) -> str | None:
    """Hash of the files of scores; None where there are none."""
    files = [file for name in (SCORES_FILE, RANKINGS_FILE) if (file := folder / name).is_file()]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else None


def _shown(name: str, evaluation: Evaluation) -> str:
    """A part of an evaluation for a message: names of files with the beginning of their hash."""
    if name == "model":
        return f"{evaluation.model} ({(evaluation.model_hash or 'no weights')[:8]})"
    if name == "data":
        return ", ".join(f"{file.path} ({(file.sha256 or 'not local')[:8]})" for file in evaluation.data)
    return str(evaluation.settings.get(name))
