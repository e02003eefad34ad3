"""The first step of a run: `prepare_training`, named by ``model_resource`` in every config."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from polar_ft.data.reading import Sources
from polar_ft.errors import PolarError
from polar_ft.files import resolve_folder
from polar_ft.model.base_folder import check_base
from polar_ft.model.tiny_base import tiny_base_of
from polar_ft.training import upstream, work_folder
from polar_ft.training.check import CheckedRun, check_rows, check_run
from polar_ft.training.config import parse_again
from polar_ft.training.ranks import FOLDER_VARIABLE, end_with_launcher, report_ending
from polar_ft.training.terminal.events import report, report_log_records


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
            wrong; or see `polar_ft.training.work_folder.enter`.
    """
    if _options_pending():
        return pretrained_model_name_or_path
    run = current_run()
    if run is not None:
        work_folder.enter(run)
    report("phase", text="reading the data")
    resumed = run is not None and run.arguments.resume is not None  # then the rows were read at its start
    if run is not None and run.settings is not None and not resumed and _is_main():
        check_rows(run.settings)
    folder = resolve_folder(pretrained_model_name_or_path)
    if run is not None and _is_main():
        check_base(folder, run.template_settings)
    work_folder.check_tokenizer(folder)
    return str(folder)


def prepare_tiny_training(pretrained_model_name_or_path: str, data: Sources) -> str:
    """`prepare_training` for the tiny config: makes the base model of the data where it is not there yet.

    Args:
        pretrained_model_name_or_path: Folder of the base model.
        data: Rows whose texts its vocabulary is learned from.
    """
    if _options_pending():
        return pretrained_model_name_or_path
    run = current_run()
    if run is not None:
        work_folder.enter(run)  # before a base is made again
    report("phase", text="looking for the tiny base model")
    tiny_base_of(Path(pretrained_model_name_or_path), data, vocab_size=4096, hidden=96)
    return prepare_training(pretrained_model_name_or_path)


def set_up() -> None:
    """Sets up the process of a rank: short errors, workarounds, events. May be called again."""
    sys.excepthook = _short_excepthook
    # xtuner's script imports DeepSpeed for every run.
    upstream.apply(deepspeed=_started_by_xtuner())
    report_log_records()


def call_model_resource(cfg: Any) -> None:
    """Calls the ``model_resource`` of a config, as xtuner 0.2.0 does (``tools/utils.py``).

    Args:
        cfg: mmengine's Config; every ``pretrained_model_name_or_path`` in it becomes what the function
            returns.
    """
    resource = cfg.get("model_resource")
    if not resource:
        return
    folder = resource["fn"](cfg["pretrained_model_name_or_path"], **resource.get("args", {}))
    places = [cfg._cfg_dict]
    while places:
        place = places.pop()
        values = list(place.values()) if isinstance(place, dict) else place
        if isinstance(place, dict) and "pretrained_model_name_or_path" in place:
            place["pretrained_model_name_or_path"] = folder
        places += [value for value in values if isinstance(value, (dict, list))]


@cache
def current_run() -> CheckedRun | None:
    """The run that this process was started for, after its checks; None in another program."""
    if not (_started_by_xtuner() or sys.argv[0].endswith("polar_ft/training/start.py")):
        return None
    end_with_launcher()
    run = check_run(sys.argv[1:])
    if FOLDER_VARIABLE not in os.environ and _is_main():  # else the launcher has printed them
        for warning in run.warnings:
            print(f"warning: {run.config}: {warning}", file=sys.stderr)
    return run


def _started_by_xtuner() -> bool:
    return sys.argv[0].endswith("xtuner/tools/train.py")


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

    set_up()
    run = current_run()
    merge = Config.merge_from_dict
    if run is None or not run.overridden or hasattr(merge, "polar_ft") or not _started_by_xtuner():
        return False

    def merge_from_dict(self: Any, options: Mapping[str, Any], **settings: Any) -> None:
        again = parse_again(self, run.overridden)
        call_model_resource(again)
        object.__setattr__(self, "_cfg_dict", again._cfg_dict)
        Config.merge_from_dict = merge
        rest = {name: value for name, value in options.items() if name not in run.overridden}
        self.merge_from_dict(rest, **settings)

    merge_from_dict.polar_ft = True  # type: ignore[attr-defined]
    Config.merge_from_dict = merge_from_dict
    return True


def _short_excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints errors that the user can fix in one line, without a traceback; the exit status stays 1."""
    if isinstance(error, PolarError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"{error}; make room there, then start again"
    else:
        report_ending(f"{kind.__name__}: {error}", trace="".join(traceback.format_exception(error)))
        sys.__excepthook__(kind, error, trace)
        return
    report_ending(text)
    print(f"\nerror: {text}", file=sys.stderr)
