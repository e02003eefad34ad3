"""The reward model as xtuner and mmengine train it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from mmengine.model import BaseModel
from xtuner.registry import BUILDER

from polar_ft.data.packing import Pack
from polar_ft.model.attention import Backend
from polar_ft.model.losses import LossType, PenaltyType, pair_loss, pair_penalty
from polar_ft.model.reward_model import RewardHead, packed_rewards, use_packed_attention
from polar_ft.model.weights import load_backbone
from polar_ft.template import PolarTemplate
from polar_ft.training.step import Log, StepBatch, StepOptimWrapper, plain_step


class PolarRewardModel(BaseModel):
    """A decoder with a reward head, trained on pairs.

    Parameters are called ``llm.*`` (names of transformers' ``LlamaModel`` or ``Qwen2Model``) and
    ``v_head.weight``. A base model without a head gets one of zeros: every reward starts at 0.

    Args:
        llm: ``dict(pretrained_model_name_or_path=…, torch_dtype=…)``: the folder or hub id of the weights and
            the dtype in which they are loaded (default "float32"; DeepSpeed casts them as its config says).
        tokenizer: ``dict(type=PolarTemplate.from_pretrained, …)``; embeddings grow if it has added tokens.
        loss_type: "ranking" (Bradley–Terry), "focal" or "margin".
        penalty_type: "log_barrier", "L2" or "none".
        penalty_weight: Factor of the penalty.
        attention: Attention backend; "auto" takes the fastest that runs here.
        activation_checkpointing: Recompute every layer in backward: less memory, about a third more time.
    """

    def __init__(
        self,
        llm: Mapping[str, Any],
        tokenizer: Mapping[str, Any] | PolarTemplate,
        loss_type: LossType = "ranking",
        penalty_type: PenaltyType = "log_barrier",
        penalty_weight: float = 0.01,
        attention: Backend | Literal["auto"] = "auto",
        activation_checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.template = tokenizer if isinstance(tokenizer, PolarTemplate) else BUILDER.build(dict(tokenizer))
        self.base_folder: str = os.fspath(llm["pretrained_model_name_or_path"])
        dtype = llm.get("torch_dtype", "float32")
        self.llm, head_weight, _ = load_backbone(
            self.base_folder, getattr(torch, dtype) if isinstance(dtype, str) else dtype
        )
        use_packed_attention(self.llm)
        if len(self.template) > self.llm.config.vocab_size:
            _grow_embeddings(self.llm, len(self.template))
        self.v_head = RewardHead(self.llm.config.hidden_size)
        with torch.no_grad():
            if head_weight is None:
                self.v_head.weight.zero_()
            else:
                self.v_head.weight.copy_(head_weight)
        self.loss_type: LossType = loss_type
        self.penalty_type: PenaltyType = penalty_type
        self.penalty_weight = penalty_weight
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing

    def init_weights(self) -> None:
        """Nothing: the weights were loaded. mmengine would initialise them anew."""

    def forward(  # type: ignore[override]
        self, pack: Pack, mode: Literal["loss", "tensor", "predict"] = "loss"
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Rewards of a pack, or its summed loss.

        Returns:
            With mode "loss": ``loss``, the sum over the pairs of weight × (pair loss + penalty), and
            ``statistics``, see `polar_ft.training.step.STATISTICS`. Otherwise rewards [candidates], float32.
        """
        rewards = packed_rewards(
            self.llm,
            self.v_head,
            pack,
            backend=self.attention,
            checkpointed_layers=len(self.llm.layers) if self.activation_checkpointing and self.training else 0,
        )
        if mode != "loss":
            return rewards
        chosen, rejected = rewards[pack.chosen], rewards[pack.rejected]
        losses = pair_loss(chosen, rejected, pack.margin, self.loss_type)
        losses = losses + self.penalty_weight * pair_penalty(chosen, rejected, self.penalty_type)
        loss = (losses * pack.weight).sum()
        with torch.no_grad():
            sums = [
                loss.double(),
                pack.weight.double().sum(),
                (chosen > rejected).double().sum(),
                chosen.double().sum(),
                rejected.double().sum(),
            ]
            counts = torch.tensor(
                [len(pack.chosen), len(pack.input_ids), pack.flat_tokens], dtype=torch.float64
            ).to(rewards.device, non_blocking=True)
            summed = torch.stack(sums)
            statistics = torch.cat([summed[:2], counts[:1], summed[2:], counts[1:]])
        return {"loss": loss, "statistics": statistics}

    def train_step(self, data: StepBatch, optim_wrapper: StepOptimWrapper) -> Log:  # type: ignore[override]
        """One optimizer step on one device; called by mmengine's train loop."""
        return plain_step(self, data, optim_wrapper, self.v_head.weight.device)

    def to_hf(
        self,
        cfg: Any,
        save_dir: str,
        fp32: bool = False,
        save_pretrained_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Writes a HuggingFace folder; called by ``xtuner convert pth_to_hf``.

        Args:
            cfg: The config, unused: model and tokenizer were built from it.
            save_dir: Folder to write.
            fp32: Write float32; xtuner's default is float16.
            save_pretrained_kwargs: ``max_shard_size`` of it is used.
        """
        from polar_ft.conversion.huggingface import write_hf_folder

        write_hf_folder(
            self.state_dict(),
            base_folder=self.base_folder,
            out_dir=save_dir,
            template=self.template,
            dtype=torch.float32 if fp32 else torch.float16,
            max_shard_size=(save_pretrained_kwargs or {}).get("max_shard_size", "5GB"),
            force=True,  # as xtuner's own does
        )


def _grow_embeddings(llm: torch.nn.Module, size: int) -> None:
    """Rows for added tokens: the mean of the others, as xtuner 0.2.0 does it."""
    old = llm.embed_tokens.weight.data
    new = torch.nn.Embedding(size, old.shape[1], padding_idx=llm.embed_tokens.padding_idx, dtype=old.dtype)
    new.weight.data[: len(old)] = old
    new.weight.data[len(old) :] = old.float().mean(0).to(old.dtype)
    llm.embed_tokens = new
    llm.config.vocab_size = size
