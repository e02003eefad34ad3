"""What a config says, read before anything of it is built."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.files import first_line


def parse_config(config: Path) -> dict[str, Any]:
    """The names of a config; classes are not imported: a lazy config holds their dotted names.

    Raises:
        PolarError: There is no such file, or it is not Python that mmengine can read.
    """
    from mmengine.config import Config

    if not config.is_file():
        raise PolarError(f"{config}: no such config file; `ls configs` shows those that are shipped")
    try:
        return Config.fromfile(str(config)).to_dict()
    except Exception as error:  # whatever the code of a config raises
        raise PolarError(
            f"{config}: cannot be read ({type(error).__name__}: {first_line(error)}); correct it"
        ) from error


def config_with_options(config: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """`parse_config`, with ``--cfg-options`` merged into it."""
    from mmengine.config import Config

    merged = Config(parse_config(config))
    merged.merge_from_dict(dict(options))
    return merged.to_dict()


def run_model_resource(config: Path, base: str) -> None:
    """Calls the ``model_resource`` of a config, as training does; it may download or make the model."""
    from mmengine.config import Config

    resource = Config.fromfile(str(config)).get("model_resource")
    if not resource:
        return
    hook = sys.excepthook
    with redirect_stdout(sys.stderr):  # DeepSpeed logs to standard output
        resource["fn"](base, **resource.get("args", {}))
    sys.excepthook = hook  # `prepare_training` sets that of training


def config_work_dir(config: str) -> Path:
    """Where xtuner puts a run that has no ``--work-dir``: the config's ``work_dir``, else by its name."""
    named = parse_config(Path(config)).get("work_dir") if Path(config).is_file() else None
    return Path(named or Path("work_dirs", Path(config).stem))
