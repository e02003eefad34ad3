"""Rewards in this process, from a HuggingFace folder, without running code of the folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from polar_ft.data.packing import Group, build_pack
from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.model.attention import Backend
from polar_ft.model.reward_model import RewardHead, packed_rewards, use_packed_attention
from polar_ft.model.weights import load_backbone
from polar_ft.template import Encoded, PolarTemplate


class RewardScorer:
    """Scores candidates; those of one (prompt, reference) share the computation of their prefix.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model`` of transformers.
        head: The reward head.
        template: The template with the model's tokenizer and limits.
        tokens_per_batch: Tokens that one forward computes at most; a group longer than that is cut into
            several forwards. Does not change the rewards.
        attention: Attention backend.
    """

    def __init__(
        self,
        decoder: Any,
        head: RewardHead,
        template: PolarTemplate,
        *,
        tokens_per_batch: int = 16384,
        attention: Backend | Literal["auto"] = "auto",
    ) -> None:
        use_packed_attention(decoder)
        self.decoder = decoder.eval()
        self.head = head.eval()
        self.template = template
        self.tokens_per_batch = tokens_per_batch
        self.attention: Backend | Literal["auto"] = attention

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | Literal["auto"] = "auto",
        tokens_per_batch: int = 16384,
        attention: Backend | Literal["auto"] = "auto",
        **template_settings: Any,
    ) -> RewardScorer:
        """Loads a reward model.

        Args:
            folder: A HuggingFace folder with a reward head, or a hub id.
            device: None takes CUDA where there is one.
            dtype: "auto" takes the dtype of the checkpoint on CUDA, and float32 on a CPU.
            tokens_per_batch: See the class.
            attention: See the class.
            **template_settings: Of `PolarTemplate.from_pretrained`; by default what the folder says.

        Raises:
            PolarError: No such folder, or no reward head in it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "auto" and device.type == "cpu":
            dtype = torch.float32
        template = PolarTemplate.from_pretrained(folder, **template_settings)
        decoder, head_weight, _ = load_backbone(folder, None if dtype == "auto" else dtype)
        if head_weight is None:
            raise PolarError(
                f"{os.fspath(folder)}: has no reward head (v_head.weight or score.weight), so it is a base "
                f"model; train it first, or name the folder that tools/pth_to_hf.py wrote"
            )
        head = RewardHead(decoder.config.hidden_size).to(head_weight.dtype)
        with torch.no_grad():
            head.weight.copy_(head_weight)
        return cls(
            decoder.to(device),
            head.to(device),
            template,
            tokens_per_batch=tokens_per_batch,
            attention=attention,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which dtype the decoder computes; the head always computes in float32."""
        return self.decoder.dtype

    def score_examples(
        self, examples: Sequence[Example], on_scored: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """A reward for each candidate of each example, in their order.

        Args:
            examples: What to score.
            on_scored: Called with the number of examples done since the last call; for progress bars.
        """
        encoded = self.template.encode_batch(
            [(e.prompt, e.reference, e.candidates, e.wrapper) for e in examples]
        )
        return self.score_encoded(encoded, on_scored)

    def score_encoded(
        self, encoded: Sequence[Encoded], on_scored: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """A reward for each sequence of each `Encoded`, in their order."""
        rewards: list[list[float]] = [[] for _ in encoded]
        for batch in self._batches(encoded):
            pack = build_pack([group for _, group in batch]).to(self.device)
            with torch.inference_mode():
                scores = packed_rewards(self.decoder, self.head, pack, backend=self.attention)
            values = iter(scores.tolist())
            for index, group in batch:
                rewards[index] += [next(values) for _ in group.branches]
            if on_scored is not None:
                done = sum(len(rewards[i]) == len(encoded[i].sequences) for i in {i for i, _ in batch})
                on_scored(done)
        return rewards

    def _batches(self, encoded: Sequence[Encoded]) -> Iterable[list[tuple[int, Group]]]:
        """Groups of about the same length together, at most ``tokens_per_batch`` a batch where possible.

        Pieces of one example come in the order of its candidates.
        """
        pieces = [(index, piece) for index, item in enumerate(encoded) for piece in self._pieces(item)]
        pieces.sort(key=lambda piece: -len(encoded[piece[0]].sequences[0]))
        batch: list[tuple[int, Group]] = []
        tokens = 0
        for index, group in pieces:
            size = group.tree_tokens()
            if batch and tokens + size > self.tokens_per_batch:
                yield batch
                batch, tokens = [], 0
            batch.append((index, group))
            tokens += size
        if batch:
            yield batch

    def _pieces(self, encoded: Encoded) -> Iterable[Group]:
        prefix = encoded.prefix_length
        piece: list[list[int]] = []
        tokens = prefix
        for ids in encoded.sequences:
            if piece and tokens + len(ids) - prefix > self.tokens_per_batch:
                yield Group.of_sequences(piece, prefix)
                piece, tokens = [], prefix
            piece.append(ids)
            tokens += len(ids) - prefix
        if piece:
            yield Group.of_sequences(piece, prefix)
