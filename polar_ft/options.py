"""Options that several commands share, with one name, help text and default each."""

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
Dtype = Annotated[DtypeName, typer.Option(help="auto: on a GPU the dtype of the folder, on a CPU float32.")]
BatchTokens = Annotated[
    int, typer.Option(min=1, help="Most tokens in one forward pass; lower it when memory runs out.")
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
        help="Name of a tokenizer class whose code in the folder may be run; may be repeated.",
    ),
]

# Of data.
Split = Annotated[
    str, typer.Option(help="Split of a HuggingFace data set; eval takes test, everything else train.")
]
Pairing = Annotated[PairingName, typer.Option(help="How ranked rows become pairs.")]
MaxLineMb = Annotated[float, typer.Option(help="Longest line of JSON that is read, in MB.")]

# Of output.
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]

# Of servers.
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="File with the API key of the servers; or set POLAR_API_KEY."),
]
