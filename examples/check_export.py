"""Compares the scores of a training checkpoint with those of the HuggingFace folder exported from it.

The training model is built from its config and scores as in training. The folder is read by transformers with
the InternLM2ForRewardModel of xtuner 0.2.0, one sequence at a time; of polar_ft only the template is used.
Both compute in float32.

    python examples/check_export.py CONFIG CHECKPOINT HF_DIR held_out.jsonl
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from xtuner.registry import BUILDER
from xtuner.tools.model_converters.modeling_internlm2_reward.modeling_internlm2 import InternLM2ForRewardModel

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.convert import read_training_config
from polar_ft.data.reading import read_examples
from polar_ft.groups import TokenGroup
from polar_ft.scoring.scorer import RewardScorer


def training_scores(config_file: Path, checkpoint: Path, encoded: list[TokenGroup]) -> list[list[float]]:
    """Scores of the model that was trained, loaded from its checkpoint."""
    model = BUILDER.build(read_training_config(config_file).model)
    model.load_state_dict(read_checkpoint(checkpoint).tensors)
    return RewardScorer(model.llm.float(), model.v_head, model.template).score_encoded(encoded)


def exported_scores(hf_dir: Path, encoded: list[TokenGroup]) -> list[list[float]]:
    """Scores of the exported folder, with transformers and xtuner's model code."""
    model = InternLM2ForRewardModel.from_pretrained(hf_dir, torch_dtype=torch.float32).eval()
    scores = []
    with torch.inference_mode():
        for item in encoded:
            inputs = [torch.tensor([ids.tolist()]) for ids in item.sequences]
            scores.append([model(ids, attention_mask=torch.ones_like(ids)).logits.item() for ids in inputs])
    return scores


def main(
    config: Annotated[Path, typer.Argument(help="The config that the run was started with.")],
    checkpoint: Annotated[Path, typer.Argument(help="iter_N.pth of the run.")],
    hf_dir: Annotated[Path, typer.Argument(help="The folder that tools/pth_to_hf.py wrote.")],
    data: Annotated[Path, typer.Argument(help="Preference data to score.")],
    n: Annotated[int, typer.Option(help="Rows to score.")] = 50,
) -> None:
    """Prints the largest difference between two scores of the same text, as JSON."""
    template = BUILDER.build(dict(read_training_config(config).tokenizer))
    encoded = template.encode(list(islice(read_examples([str(data)]), n)))
    trained = training_scores(config, checkpoint, encoded)
    exported = exported_scores(hf_dir, encoded)
    differences = [
        abs(a - b)
        for row, other in zip(trained, exported, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    typer.echo(json.dumps({"n_scores": len(differences), "max_abs_score_diff_export": max(differences)}))


if __name__ == "__main__":
    typer.run(main)
