"""The process of a rank of a plain run: what xtuner's training script does with a config of ours.

``xtuner train`` runs ``xtuner/tools/train.py``, which imports all of xtuner, DeepSpeed and peft: most of the
time from a command to its first step. Here the same config is read, the same ``model_resource`` is called and
the same runner of mmengine is built, with what they need; a run has the same bits either way
(``tests/training/test_start_up.py``). Runs with ``--deepspeed`` start by xtuner's script.

`polar_ft.training.launch` starts this file by its path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# mmengine, transformers and accelerate import these where they are installed; a plain run does not use them.
UNUSED = ("deepspeed", "bitsandbytes", "sklearn", "colossalai", "dadaptation", "lion_pytorch", "sophia")


def main() -> None:
    """Trains the config that the command line names."""
    with without(UNUSED):
        from mmengine.config import Config
        from mmengine.runner import Runner

    from polar_ft.training.config import parse_again, parse_arguments
    from polar_ft.training.prepare import call_model_resource, current_run, set_up

    set_up()
    arguments = parse_arguments(sys.argv[1:])
    run = current_run()
    assert run is not None
    cfg = Config.fromfile(arguments.config)
    if run.overridden:
        cfg = parse_again(cfg, run.overridden)
    call_model_resource(cfg)
    cfg.merge_from_dict({name: v for name, v in arguments.options.items() if name not in run.overridden})
    if arguments.resume is not None:
        cfg.merge_from_dict(dict(randomness=dict(seed=_seed_of(Path(arguments.resume)))))
        cfg.resume = True
        cfg.load_from = arguments.resume
    elif arguments.seed is not None:
        cfg.merge_from_dict(dict(randomness=dict(seed=arguments.seed)))
    os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    cfg.launcher = arguments.launcher
    cfg.work_dir = str(run.work_dir)
    Runner.from_cfg(cfg).train()


@contextmanager
def without(packages: tuple[str, ...]) -> Iterator[None]:
    """Imports within the block do not find these packages; a package that is imported already stays."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _seed_of(checkpoint: Path) -> int:
    """The seed of the generators of the run that a checkpoint belongs to."""
    import torch

    return torch.load(checkpoint, map_location="cpu", mmap=True)["meta"]["seed"]


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules (data, log, …) are no packages
    from polar_ft.training import start

    start.main()
