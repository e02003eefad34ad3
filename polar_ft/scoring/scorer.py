"""`RewardScorer`: rewards in this process from a HuggingFace folder, without running code of the folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from polar_ft.data.score_rows import parse_score_rows
from polar_ft.errors import PolarError
from polar_ft.files import first_line, resolve_folder
from polar_ft.groups import TextGroup, TokenGroup, merge_texts, split_by_tokens, windows
from polar_ft.model.attention import Backend
from polar_ft.model.packing import build_pack
from polar_ft.model.reward_model import RewardHead, packed_rewards
from polar_ft.model.weights import load_backbone
from polar_ft.reward_scale import RewardScale
from polar_ft.template import PolarTemplate

# Batches of rows that `RewardScorer.score` sorts together, by prefix and by length.
_BATCHES_AT_ONCE = 16
_CHARS_PER_TOKEN = 4


class RewardScorer:
    """Scores candidates; those of one (prompt, reference) share the computation of their prefix.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model`` of transformers.
        head: The reward head.
        template: The template with the model's tokenizer and limits.
        tokens_per_batch: Most tokens in a forward; a longer group is divided into several forwards. Does not
            change the rewards.
        attention: Attention backend.
        folder: Folder of the model, from which its reward scale is read.
    """

    def __init__(
        self,
        decoder: Any,
        head: RewardHead,
        template: PolarTemplate,
        *,
        tokens_per_batch: int = 16384,
        attention: Backend | Literal["auto"] = "auto",
        folder: Path | None = None,
    ) -> None:
        self.decoder = decoder.eval()
        self.head = head.eval()
        self.template = template
        self.tokens_per_batch = tokens_per_batch
        self.attention: Backend | Literal["auto"] = attention
        self.folder = folder

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        tokens_per_batch: int = 16384,
        attention: Backend | Literal["auto"] = "auto",
        **template_settings: Any,
    ) -> RewardScorer:
        """Loads a reward model.

        Args:
            folder: A HuggingFace folder with a reward head, or a hub id.
            device: None takes CUDA if available.
            dtype: A dtype or its name; "auto" takes the dtype of the checkpoint on CUDA and float32 on a CPU.
            tokens_per_batch: See the class.
            attention: See the class.
            **template_settings: Of `PolarTemplate.from_pretrained`; by default those of the folder.

        Raises:
            PolarError: The folder does not exist or has no reward head, or there is no such device.
        """
        folder = resolve_folder(folder)
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            raise PolarError(f"device {device}: {first_line(error)}") from error
        if dtype == "auto":
            wanted = torch.float32 if device.type == "cpu" else None
        else:
            wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        template = PolarTemplate.from_pretrained(folder, **template_settings)
        decoder, head_weight, _ = load_backbone(folder, wanted)
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
            folder=folder,
        )

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the decoder computes; the head always computes in float32."""
        return self.decoder.dtype

    @property
    def vocab_size(self) -> int:
        """Size of the model's embeddings; token ids are smaller."""
        return self.decoder.config.vocab_size

    def score(
        self, data: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, scale: bool = False
    ) -> list[float]:
        """Scores rows; rewards come in their order, and rows of one (prompt, reference) share computation.

        Args:
            data: A dict as in the published quick start, or an iterable of them: ``prompt``, ``reference``
                and ``output``, each a string or a list of messages, and an optional ``wrapper``. Few rows are
                held at a time.
            scale: Apply the reward scale that ``polar-ft calibrate`` wrote into the model's folder.

        Raises:
            PolarError: A row cannot be scored, or there is no scale.
        """
        measured = self.reward_scale() if scale else None
        rows = parse_score_rows([data] if isinstance(data, Mapping) else data)
        rewards: list[float] = []
        for window in windows(rows, _BATCHES_AT_ONCE * _CHARS_PER_TOKEN * self.tokens_per_batch):
            merged = merge_texts(window)
            scored = self.score_examples([texts.group for texts in merged])
            placed = {
                number: values[candidate]
                for texts, values in zip(merged, scored, strict=True)
                for number, (candidate,) in texts.members
            }
            rewards += [placed[number] for number in range(len(window))]
        return rewards if measured is None else measured.apply(rewards)

    def reward_scale(self) -> RewardScale:
        """Reads the reward scale that ``polar-ft calibrate`` measured.

        Raises:
            PolarError: It has not been measured for this model.
        """
        if self.folder is None:
            raise PolarError("this model was not read from a folder, so it has no reward scale")
        return RewardScale.load(self.folder)

    def score_examples(
        self, groups: Sequence[TextGroup], on_scored: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Scores each candidate of each group, in their order, against the group's first reference.

        Args:
            groups: The groups.
            on_scored: Called with the number of groups done since the last call; for progress bars.

        Returns:
            Rewards, `[groups][candidates]`.

        Raises:
            EncodeError: A group does not fit the model's limits; ``index`` says which.
        """
        return self.score_encoded(self.template.encode(groups), on_scored)

    def score_encoded(
        self, groups: Sequence[TokenGroup], on_scored: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """As `score_examples`, for token groups."""
        rewards: list[list[float]] = [[] for _ in groups]
        for batch in forward_batches(groups, self.tokens_per_batch):
            values = self.score_groups([group for _, group in batch])
            for (index, _), group_rewards in zip(batch, values, strict=True):
                rewards[index] += group_rewards
            if on_scored is not None:
                done = sum(len(rewards[i]) == len(groups[i].branches) for i in {i for i, _ in batch})
                on_scored(done)
        return rewards

    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Scores groups in one forward, whatever their number; rewards are `[groups][branches]`."""
        pack = build_pack(groups).to(self.device)
        with torch.inference_mode():
            scores = packed_rewards(self.decoder, self.head, pack, backend=self.attention)
        values = iter(scores.tolist())
        return [[next(values) for _ in group.branches] for group in groups]


def forward_batches(
    groups: Sequence[TokenGroup], tokens_per_batch: int
) -> Iterable[list[tuple[int, TokenGroup]]]:
    """Divides groups into forwards of similar lengths, of at most ``tokens_per_batch`` tokens if possible.

    Args:
        groups: The groups to score.
        tokens_per_batch: Most tokens of a forward; a longer group is split into pieces.

    Yields:
        The groups or pieces of a forward, each with its index in ``groups``; pieces of one group come in the
        order of its branches.
    """
    pieces = [
        (index, piece)
        for index, group in enumerate(groups)
        for piece in split_by_tokens(group, tokens_per_batch)
    ]
    pieces.sort(key=lambda piece: -len(groups[piece[0]].prefix) - len(groups[piece[0]].branches[0]))
    batch: list[tuple[int, TokenGroup]] = []
    tokens = 0
    for index, group in pieces:
        size = group.tree_tokens()
        if batch and tokens + size > tokens_per_batch:
            yield batch
            batch, tokens = [], 0
        batch.append((index, group))
        tokens += size
    if batch:
        yield batch
