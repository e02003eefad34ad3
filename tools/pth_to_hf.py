"""Converts a saved checkpoint to a HuggingFace folder; the same as `polar-ft convert`.

python tools/pth_to_hf.py CONFIG CHECKPOINT OUT_DIR [--dtype DTYPE] [--verify ROWS] [--force] …
"""

import typer

from polar_ft.cli import run
from polar_ft.conversion.commands import convert
from polar_ft.options import APP_SETTINGS

app = typer.Typer(**APP_SETTINGS)
app.command()(convert)

if __name__ == "__main__":
    run(app)
