"""Preference accuracy of an exported reward model on held-out pairs; the same as `polar-ft eval`.

python tools/eval_preference.py HF_DIR held_out.jsonl [more files] [--out DIR] [--shuffle-references SEED]
python tools/eval_preference.py --from-scores FILE --out DIR
python tools/eval_preference.py compare A B
"""

from polar_ft.cli import run
from polar_ft.evaluation.commands import eval_app

if __name__ == "__main__":
    run(eval_app)
