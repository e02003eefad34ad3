"""The first step of a run: `prepare_training`, named by ``model_resource`` in every config."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from polar_ft.conversion.checkpoint_files import Manifest, verify
from polar_ft.errors import PolarError
from polar_ft.files import resolve_folder
from polar_ft.model.base_folder import check_base
from polar_ft.model.tiny_base import make_tiny_base, texts_of
from polar_ft.training import upstream
from polar_ft.training.check import CheckedRun, check_rows, check_run
from polar_ft.training.config import parse_again
from polar_ft.training.ranks import FOLDER_VARIABLE, report_ending


def prepare_training(pretrained_model_name_or_path: str) -> str:
    """Applies the upstream workarounds and checks the model folder, before xtuner builds anything.

    xtuner 0.2.0 calls ``model_resource["fn"]`` right after it has parsed a config: the one early hook that a
    config has. What it returns replaces every ``pretrained_model_name_or_path`` of the config.

    To fetch the model from elsewhere first, compose::

        def fetch(path):
            return prepare_training(my_download(path))

        model_resource = dict(fn=fetch)

    Args:
        pretrained_model_name_or_path: The config's.

    Returns:
        The local folder.

    Raises:
        PolarError: No such folder, and the hub does not have it; a setting, a file or a row of the data is
            wrong; or the checkpoint of ``--resume`` is not what was saved, or was saved by another number of
            ranks.
    """
    if _options_pending():
        return pretrained_model_name_or_path
    _check_resumed_checkpoint(sys.argv)
    run = _run()
    resumed = run is not None and run.arguments.resume is not None  # then the rows were read at its start
    if run is not None and run.settings is not None and not resumed and _is_main():
        check_rows(run.settings)
    folder = resolve_folder(pretrained_model_name_or_path)
    if run is not None and _is_main():
        check_base(folder, run.template_settings)
    return str(folder)


def prepare_tiny_training(pretrained_model_name_or_path: str, data: str) -> str:
    """`prepare_training` for the tiny config: makes the base model of the data where it is not there yet.

    Args:
        pretrained_model_name_or_path: Folder of the base model.
        data: File whose texts its vocabulary is learned from.
    """
    if _options_pending():
        return pretrained_model_name_or_path
    folder = Path(pretrained_model_name_or_path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # ranks start together
        if not (folder / "config.json").is_file():
            make_tiny_base(folder, texts_of([Path(data)]), vocab_size=4096, hidden=96)
    return prepare_training(pretrained_model_name_or_path)


@cache
def _run() -> CheckedRun | None:
    """The run that xtuner's script was started for, after its checks; None in another program."""
    if not sys.argv[0].endswith("xtuner/tools/train.py"):
        return None
    run = check_run(sys.argv[1:])
    if FOLDER_VARIABLE not in os.environ and _is_main():  # else the launcher has printed them
        for warning in run.warnings:
            print(f"warning: {run.config}: {warning}", file=sys.stderr)
    return run


def _is_main() -> bool:
    """Whether this is the first process of the run; one look at the data is enough."""
    return os.environ.get("RANK", "0") == "0"


def _options_pending() -> bool:
    """Sets up the process, and returns whether xtuner's config is still one without ``--cfg-options``.

    xtuner 0.2.0 (``tools/train.py``) calls ``model_resource``, then merges the options into the config:
    ``lr=5e-4`` sets a name from which ``optim_wrapper`` was computed before, so it has no effect. Here the
    first call replaces that merge: it reads the config again with the options in place, and calls
    ``model_resource`` again.
    """
    from mmengine.config import Config

    sys.excepthook = _short_excepthook
    upstream.apply()
    run = _run()
    merge = Config.merge_from_dict
    if run is None or not run.overridden or hasattr(merge, "polar_ft"):
        return False

    def merge_from_dict(self: Any, options: Mapping[str, Any], **settings: Any) -> None:
        from xtuner.tools.utils import set_model_resource

        again = parse_again(self, run.overridden)
        set_model_resource(again)
        object.__setattr__(self, "_cfg_dict", again._cfg_dict)
        Config.merge_from_dict = merge
        rest = {name: value for name, value in options.items() if name not in run.overridden}
        self.merge_from_dict(rest, **settings)

    merge_from_dict.polar_ft = True  # type: ignore[attr-defined]
    Config.merge_from_dict = merge_from_dict
    return True


def _check_resumed_checkpoint(arguments: Sequence[str]) -> None:
    """Verifies the checkpoint of ``--resume`` before xtuner and mmengine read it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--resume", type=Path)
    checkpoint = parser.parse_known_args(arguments[1:])[0].resume
    if checkpoint is None:
        return
    manifest = None
    if os.environ.get("LOCAL_RANK", "0") == "0":  # it may be large, and one check is enough
        manifest = verify(checkpoint)
        if manifest is None:
            print(f"{checkpoint}: its integrity cannot be checked (no manifest)", file=sys.stderr)
    ranks_now = int(os.environ.get("WORLD_SIZE", "1"))
    if manifest is not None and manifest.ranks != ranks_now and _is_partitioned(manifest):
        raise PolarError(
            f"{checkpoint}: was saved by {manifest.ranks} ranks, each with its part of the optimizer (ZeRO), "
            f"and this run has {ranks_now}; start with as many (NPROC_PER_NODE, NNODES), or convert it with "
            f"tools/pth_to_hf.py and train from its weights"
        )


def _is_partitioned(manifest: Manifest) -> bool:
    return any(name.endswith("_optim_states.pt") for name in manifest.files)


def _short_excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints errors that the user can fix in one line, without a traceback; the exit status stays 1."""
    report_ending(f"{kind.__name__}: {error}" if not isinstance(error, PolarError) else str(error))
    if isinstance(error, PolarError):
        print(f"\nerror: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"\nerror: {error}; make room there, then start again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
