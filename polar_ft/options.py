"""Options that several commands share, with one name, help text and default each."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from polar_ft.groups import Pairing as PairingName

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

# Of every Typer app: plain help, whose option names are never cut to fit a column; `-h` as well as `--help`.
APP_SETTINGS: dict[str, Any] = dict(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class RunUnlessNamed(TyperGroup):
    """A group of commands whose first one needs no name: ``polar-ft eval HF_DIR DATA …``.

    A model folder that is called like a command is named with its path: ``./compare``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            close = difflib.get_close_matches(args[0], self.commands) if args else []
            if close and not Path(args[0]).exists():
                ctx.fail(f"No such folder or command {args[0]!r}. Did you mean {close[0]!r}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)


class CalledAsTheGroup(TyperCommand):
    """A command that help and errors call by the name of its group."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return super().make_context(parent.info_name, args, parent.parent, **extra)


# Arguments.
ModelFolder = Annotated[str, typer.Argument(metavar="HF_DIR", help="Folder of the exported reward model.")]

# Of a model.
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, …", show_default="a GPU if there is one"),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        metavar="DTYPE",
        help=f"{', '.join(get_args(DtypeName))}; auto is float32 on a CPU, and on a GPU the "
        "dtype of the folder.",
    ),
]
BatchTokens = Annotated[
    int,
    typer.Option(
        metavar="TOKENS", min=1, help="Most tokens in one forward pass; lower it when memory runs out."
    ),
]
BATCH_TOKENS = 16384

# Of a template.
MaxLength = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", help="Longest sequence.", show_default="the model's own, else 16384"),
]
MaxResponseLength = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS", help="Longest reference and response.", show_default="the model's own, else 4096"
    ),
]
AllowTokenizerCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-tokenizer-code",
        "--allow",
        metavar="CLASS",
        help="Name of a tokenizer class whose code in the folder may be run; may be repeated.",
    ),
]

# Of data.
Split = Annotated[
    str,
    typer.Option(metavar="NAME", help="Split of a HuggingFace data set."),
]
Pairing = Annotated[PairingName, typer.Option(help="How ranked rows become pairs.")]
MaxLineMb = Annotated[float, typer.Option(metavar="MB", help="Longest line of JSON that is read, in MB.")]

# Of output.
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]

# Of servers.
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with the API key of the servers; or set POLAR_API_KEY."),
]
