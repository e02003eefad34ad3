"""Whether an exported folder gives the rewards of the checkpoint that it was made from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from polar_ft.conversion.huggingface import HEAD
from polar_ft.data.reading import DataSource, read_examples
from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.model.backbones import backbone_of, decoder_config, empty_decoder
from polar_ft.model.reward_model import RewardHead
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate

ROWS = 32


@dataclass(frozen=True)
class Verification:
    """How far apart the rewards of a checkpoint and of its folder are.

    Attributes:
        rows: Rows that were scored.
        difference: Largest difference of two rewards.
        spread: Largest minus smallest reward of the checkpoint.
        pairs: Pairs of chosen and rejected in the rows.
        turned: Pairs that are ordered otherwise than before.
    """

    rows: int
    difference: float
    spread: float
    pairs: int
    turned: int

    def __str__(self) -> str:
        return (
            f"in {self.rows} rows the largest difference of the rewards is {self.difference:.2g}, their "
            f"range {self.spread:.4g}; {self.turned} of {self.pairs} pairs changed their order"
        )


def sample(file: str | os.PathLike[str], rows: int = ROWS) -> list[Example]:
    """The first rows of a file.

    Raises:
        PolarError: There is none, or a row cannot be used.
    """
    return list(read_examples(DataSource(path=os.fspath(file), max_samples=rows)))


def scorer_of_weights(
    weights: Mapping[str, torch.Tensor], base_folder: str | os.PathLike[str], template: PolarTemplate
) -> RewardScorer:
    """A scorer with the weights of training in float32; nothing of it comes from an exported folder.

    Args:
        weights: ``llm.…`` in Llama's or InternLM2's names, and ``v_head.weight``.
        base_folder: The model that was trained, for its config.
        template: What it was trained with.
    """
    base = resolve_folder(base_folder)
    hf_config = read_json(base / "config.json")
    config, names = decoder_config(hf_config, str(base)), backbone_of(hf_config, str(base)).names
    as_folder = f"llm.{names.embeddings}" in weights
    state: dict[str, torch.Tensor] = {}
    for name in empty_decoder(config).state_dict():
        source = names.folder_name(name) if as_folder else name
        tensor = weights[f"llm.{source}"].detach().float()
        state[name] = names.decoder_tensors(source, tensor, config)[name] if as_folder else tensor
    config.vocab_size = len(state["embed_tokens.weight"])
    decoder = empty_decoder(config)
    decoder.load_state_dict(state, strict=True, assign=True)
    head = RewardHead(config.hidden_size)
    with torch.no_grad():
        head.weight.copy_(weights[HEAD])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RewardScorer(decoder.to(device), head.to(device), template)


def compare_rewards(
    examples: Sequence[Example],
    *,
    trained: Callable[[], RewardScorer],
    exported: Callable[[], RewardScorer],
    tolerance: float,
) -> Verification:
    """Scores rows with both models, of which one is in memory at a time.

    Args:
        examples: Rows to score.
        trained: Makes the scorer of the checkpoint.
        exported: Makes that of the folder.
        tolerance: Largest difference, as a share of the range of the checkpoint's rewards.

    Raises:
        PolarError: A difference is larger, or all rewards of the checkpoint are the same.
    """
    before = trained().score_examples(examples)
    after = exported().score_examples(examples)
    first = torch.tensor([reward for row in before for reward in row], dtype=torch.float64)
    second = torch.tensor([reward for row in after for reward in row], dtype=torch.float64)
    spread = float(first.max() - first.min())
    if not spread > 0:
        raise PolarError(
            f"--verify: the checkpoint gives every candidate the reward {first[0]:.4g}, so there is nothing "
            f"to compare; was it trained?"
        )
    differences = (first - second).abs().nan_to_num(torch.inf)
    turned = [
        (before[row][chosen] > before[row][rejected]) != (after[row][chosen] > after[row][rejected])
        for row, example in enumerate(examples)
        for chosen, rejected in example.pairs
    ]
    outcome = Verification(len(examples), float(differences.max()), spread, len(turned), sum(turned))
    if outcome.difference > tolerance * spread:
        worst = int(differences.argmax())
        places = [example.source for example in examples for _ in example.candidates]
        raise PolarError(
            f"--verify: {outcome}. {places[worst]} has a reward of {first[worst]:.4f} by the checkpoint and "
            f"{second[worst]:.4f} by what was written: more than {tolerance:g} of the range, so nothing was "
            f"kept. Try --dtype float32; if that differs too, report it"
        )
    return outcome
