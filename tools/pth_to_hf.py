"""Converts a saved checkpoint to a HuggingFace folder; the same as `polar-ft convert`.

python tools/pth_to_hf.py CONFIG CHECKPOINT OUT_DIR [--dtype DTYPE] [--verify ROWS] [--force] …
"""

import typer

from polar_ft.cli import run
from polar_ft.conversion.commands import convert

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(convert)

if __name__ == "__main__":
    run(app)
