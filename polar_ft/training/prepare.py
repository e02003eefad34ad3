"""The first step of a run: `prepare_training`, named by ``model_resource`` in every config."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import TracebackType

from polar_ft.data.reading import Sources
from polar_ft.errors import PolarError
from polar_ft.files import resolve_folder
from polar_ft.model.tiny_base import tiny_base_of
from polar_ft.training import upstream, work_folder
from polar_ft.training.ranks import end_with_launcher, report_ending


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
        PolarError: No such folder, and the hub does not have it; or see `work_folder.enter`.
    """
    sys.excepthook = _short_excepthook
    upstream.apply()
    training = Path(sys.argv[0]).name == "train.py"  # xtuner's; `polar-ft doctor` calls this too
    if training:
        end_with_launcher()
        work_folder.enter(sys.argv[1:])
    folder = resolve_folder(pretrained_model_name_or_path)
    if training:
        work_folder.check_tokenizer(folder)
    return str(folder)


def prepare_tiny_training(pretrained_model_name_or_path: str, data: Sources) -> str:
    """`prepare_training` for the tiny config: makes the base model of the data where it is not there yet.

    Args:
        pretrained_model_name_or_path: Folder of the base model.
        data: Rows whose texts its vocabulary is learned from.
    """
    tiny_base_of(Path(pretrained_model_name_or_path), data, vocab_size=4096, hidden=96)
    return prepare_training(pretrained_model_name_or_path)


def _short_excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints errors that the user can fix in one line, without a traceback; the exit status stays 1."""
    report_ending(f"{kind.__name__}: {error}" if not isinstance(error, PolarError) else str(error))
    if isinstance(error, PolarError):
        print(f"\nerror: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"\nerror: {error}; make room there, then start again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
