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
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from polar_ft.model.imports import import_decoders, without

# What mmengine imports and a plain run does not use, see `without`.
_UNUSED = {
    **dict.fromkeys(("deepspeed", "bitsandbytes", "torch.distributed.optim", "torch.distributed.fsdp"), ()),
    "mmengine.model.wrappers.fully_sharded_distributed": ("MMFullyShardedDataParallel",),
}


def main() -> None:
    """Trains the config that the command line names."""
    import_decoders()  # first: mmengine imports transformers
    with without(_UNUSED):
        from mmengine.config import Config
        from mmengine.runner import Runner
    leave_out_compiler()

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
    if not cfg.get("custom_hooks"):
        leave_out_figure()
    with without({"torchvision": ()}):  # mmengine asks for its version, for the log
        runner = Runner.from_cfg(cfg)
    runner.train()


def leave_out_compiler() -> None:
    """Keeps torch from importing its compiler, which takes a second, for an optimizer that is not compiled.

    torch marks functions that must not be compiled when they are first called (``torch/_compile.py``,
    _disable_dynamo), and tells the compiler of each update (``torch/optim/optimizer.py``,
    _use_grad_for_differentiable). Without a compiler the function itself may stand for the marked one.
    """
    import torch
    from torch.optim import Optimizer
    from torch.utils import checkpoint

    def told_nobody(update: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(update)
        def step(self: Optimizer, *arguments: Any, **named: Any) -> Any:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                return update(self, *arguments, **named)

        return step

    for kind in vars(torch.optim).values():
        step = vars(kind).get("step") if isinstance(kind, type) else None
        if step is not None and step.__code__.co_name == "_use_grad":
            kind.step = told_nobody(step.__wrapped__)

    for value in (*vars(Optimizer).values(), *vars(checkpoint).values()):
        function = getattr(value, "__wrapped__", None)
        if function is not None:
            setattr(function, "__dynamo_disable", function)


def leave_out_figure() -> None:
    """Keeps mmengine's Visualizer from importing matplotlib for a figure on which only hooks of users draw.

    Upstream: mmengine 0.10.6 ``visualization/visualizer.py``, which makes it with every Visualizer.
    """
    from mmengine.visualization import Visualizer

    figure = SimpleNamespace(get_dpi=lambda: 100.0)
    Visualizer._initialize_fig = lambda self, settings: (None, figure, None)


def _seed_of(checkpoint: Path) -> int:
    """The seed of the generators of the run that a checkpoint belongs to."""
    import torch

    return torch.load(checkpoint, map_location="cpu", mmap=True)["meta"]["seed"]


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules (data, log, …) are no packages
    from polar_ft.training import start

    start.main()
