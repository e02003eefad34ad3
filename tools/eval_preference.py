"""Preference accuracy of an exported reward model on held-out pairs; the same as `polar-ft eval`.

python tools/eval_preference.py HF_DIR held_out.jsonl [more files] [--out DIR] [--shuffle-references SEED]
"""

import typer

from polar_ft.cli import run
from polar_ft.evaluation.commands import evaluate

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(evaluate)

if __name__ == "__main__":
    run(app)
