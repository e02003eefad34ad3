"""What is made and measured after training: the converted model, its accuracy, the range of its rewards."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polar_ft.data.report import many
from polar_ft.fit.choices import Base
from polar_ft.fit.steps import Result, Tell


def convert(config: Path, checkpoint: Path, model: Path, rows: Path, tell: Tell) -> Result:
    """Converts a checkpoint, and verifies that it gives the same rewards.

    Args:
        config: Of the training.
        checkpoint: What it saved.
        model: Folder to write.
        rows: Rows that are scored with both.
        tell: Says how far it is.
    """
    from polar_ft.conversion.convert import convert_checkpoint

    tell("reading")
    verified: list[Any] = []
    written = convert_checkpoint(
        config,
        checkpoint,
        model,
        force=True,
        verify=rows,
        on_written=lambda done, total: tell("writing", done / max(1, total)),
        on_verified=verified.append,
    )
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    [same] = verified
    return {
        "difference": same.difference,
        "said": f"{model}: {str(written).removeprefix('torch.')}, {size / 1e6:,.1f} MB; verified on "
        f"{many(same.rows, 'row')}, rewards differ by {same.difference:.1e}",
    }


def evaluate(model: str, held_out: Path, folder: Path, code: Sequence[str], *, shuffle: bool) -> Result:
    """Scores the held-out pairs, as `polar-ft eval` does.

    Args:
        model: The folder or hub id of the model.
        held_out: The pairs.
        folder: For scores, figures and report.
        code: Tokenizer classes that may be run.
        shuffle: Score also with references shuffled between rows, and check the scorer.
    """
    from polar_ft.data.reading import DataSource
    from polar_ft.evaluation.evaluate import score_and_report
    from polar_ft.evaluation.references import ReferenceSettings
    from polar_ft.evaluation.report.report import METRICS_FILE, Report
    from polar_ft.evaluation.report.texts import percent, percent_interval

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    score_and_report(
        model,
        [DataSource(path=str(held_out))],
        folder,
        ReferenceSettings(shuffle_seed=0 if shuffle else None),
        (),
        device=None,
        dtype="auto",
        batch_tokens=None,
        template={"max_length": None, "max_response_length": None, "allow_tokenizer_code": tuple(code)},
        gates=shuffle,
        cache_dir=Path(os.environ.get("POLAR_FT_CACHE", "~/.cache/polar_ft")),
        force=True,
    )
    overall = Report.model_validate_json((folder / METRICS_FILE).read_bytes()).metrics.overall
    said = f"{percent(overall.accuracy)} % of {many(overall.n_scored, 'held-out pair')} right"
    return {
        "accuracy": overall.accuracy,
        "interval": overall.interval,
        "said": f"{said} (95 % interval {percent_interval(overall.interval)})",
    }


def evaluate_base(base: Base, held_out: Path, folder: Path | None) -> Result:
    """Scores the held-out pairs with the base; without a folder it gives no rewards."""
    if folder is None:
        return {"said": "the base gives no rewards: chance is what the new model is held against"}
    return evaluate(base.name, held_out, folder, base.allow_tokenizer_code, shuffle=False)


def measure_part(
    config: Path, checkpoint: Path, scratch: Path, held_out: Path, folder: Path, code: Sequence[str]
) -> Result:
    """Converts and scores a training on a part of the data; its weights are not kept.

    Args:
        config: Of the training.
        checkpoint: What it saved.
        scratch: Folder for the converted model.
        held_out: The pairs.
        folder: For scores, figures and report.
        code: Tokenizer classes that may be run.
    """
    from polar_ft.conversion.convert import convert_checkpoint

    convert_checkpoint(config, checkpoint, scratch, force=True)
    result = evaluate(str(scratch), held_out, folder, code, shuffle=False)
    shutil.rmtree(scratch)
    return result


def measure_range(model: Path, held_out: Path, code: Sequence[str]) -> Result:
    """Measures the range of the rewards, as `polar-ft calibrate` does, into the model's folder."""
    from polar_ft.evaluation.scale import calibrate
    from polar_ft.reward_scale import RewardScale

    calibrate(str(model), [str(held_out)], allow_tokenizer_code=list(code))
    scale = RewardScale.load(model)
    said = f"rewards {scale.centre:.2f} ± {scale.spread:.2f}"
    said += "" if scale.temperature is None else f", temperature {scale.temperature:.2f}"
    return {"said": f"{said}, kept in the model's folder"}
