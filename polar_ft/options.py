"""Options that several commands share: each has one name, one help text and one default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from polar_ft.groups import Pairing as PairingName

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

# Arguments.
ModelFolder = Annotated[str, typer.Argument(metavar="HF_DIR", help="Folder of the exported reward model.")]

# Of a model.
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if any.")]
Dtype = Annotated[DtypeName, typer.Option(help="auto: what the folder has on a GPU, float32 on a CPU.")]
BatchTokens = Annotated[
    int, typer.Option(min=1, help="Tokens in one forward pass; lower it when memory runs out.")
]
BATCH_TOKENS = 16384

# Of a template.
MaxLength = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens. (default: the model's own, else 16384)")
]
MaxResponseLength = Annotated[
    int | None,
    typer.Option(help="Longest reference and response in tokens. (default: the model's own, else 4096)"),
]
AllowTokenizerCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-tokenizer-code",
        "--allow",
        help="Tokenizer class of the folder that may be run, by name; may be repeated.",
    ),
]

# Of data.
Split = Annotated[str, typer.Option(help="Split of a HuggingFace data set.")]
Pairing = Annotated[PairingName, typer.Option(help="How ranked rows become pairs.")]
MaxLineMb = Annotated[float, typer.Option(help="Refuse a longer line of JSON, in MB.")]

# Of output.
Force = Annotated[bool, typer.Option("--force", help="Replace the output where it exists.")]

# Of servers.
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="File with the API key of the servers; or set POLAR_API_KEY."),
]
