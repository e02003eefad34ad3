"""``polar-ft train`` and ``polar-ft watch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polar_ft.training.terminal.watch import watch

__all__ = ["train", "watch"]


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A config file.")],
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", help="Show all that xtuner and mmengine print, instead of writing train.log."
        ),
    ] = False,
) -> None:
    """Train as `xtuner train` does, and exit with the run's status.

    The terminal shows data, plan, memory, progress and validations; all else is in train.log in the work
    folder. `xtuner train` itself exits with 0 even if training failed.
    """
    from polar_ft.training.launch import launch

    raise typer.Exit(launch(str(config), context.args, verbose=verbose))


# Of Typer's ``command``.
train.command_settings = dict(  # type: ignore[attr-defined]
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["-h", "--help"],
    },
    options_metavar="",
    epilog="""Options after CONFIG are those of `xtuner train`:

\b
  --deepspeed NAME         deepspeed_zero1, deepspeed_zero2, deepspeed_zero3,
                           deepspeed_zero3_offload, or a JSON file
  --work-dir DIR           Where checkpoints and logs go.
                           [default: work_dirs/CONFIG]
  --resume CHECKPOINT      Resume a run; auto takes the newest complete
                           checkpoint, and starts a new run if there is none.
  --overwrite              Remove the checkpoints of an earlier run in the
                           work folder.
  --cfg-options KEY=VALUE  Other settings than the config's; several in a row.
  --seed N                 Random seed.

Processes: NPROC_PER_NODE in the environment; for several machines also NNODES, NODE_RANK, ADDR, PORT.""",
)
