"""The reward model as xtuner and mmengine train it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from xtuner.registry import BUILDER

from polar_ft.conversion.adapter import merge_adapter
from polar_ft.conversion.huggingface import write_hf_folder
from polar_ft.model.attention import Backend
from polar_ft.model.fused import use_fused_kernels
from polar_ft.model.lora import Adapter
from polar_ft.model.losses import PairObjective
from polar_ft.model.memory import activation_bytes_per_token, free_memory, layers_to_checkpoint
from polar_ft.model.packing import Pack
from polar_ft.model.reward_model import RewardHead, packed_rewards
from polar_ft.model.settings import Checkpointing, LoraSettings, LossType, PenaltyType
from polar_ft.model.weights import grow_embeddings, load_backbone
from polar_ft.template import PolarTemplate
from polar_ft.training import lora as adapters
from polar_ft.training.terminal.events import report


def weights_dtype(llm: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which ``llm`` of a config loads the weights.

    >>> weights_dtype({"torch_dtype": "bfloat16"}), weights_dtype({})
    (torch.bfloat16, torch.float32)
    """
    dtype = llm.get("torch_dtype", torch.float32)
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


class PolarRewardModel(BaseModel):
    """A decoder with a reward head, trained on pairs.

    Parameters are called ``llm.*`` (names of transformers' ``LlamaModel`` or ``Qwen2Model``) and
    ``v_head.weight``. A base model without a head gets one of zeros: every reward starts at 0. With ``lora``
    only adapters and head are trained, and ``state_dict`` holds only them.

    Args:
        llm: ``dict(pretrained_model_name_or_path=…, torch_dtype=…)``: the folder or hub id of the weights and
            the dtype in which they are loaded (default "float32"; DeepSpeed casts them as its config says).
        tokenizer: ``dict(type=PolarTemplate.from_pretrained, …)``; embeddings grow if it has added tokens.
        loss_type: "ranking" (Bradley–Terry), "focal" or "margin".
        penalty_type: "log_barrier", "L2" or "none".
        penalty_weight: Factor of the penalty.
        attention: Attention backend; "auto" takes the fastest that runs here.
        activation_checkpointing: Which layers are computed again in backward instead of keeping their
            activations: "none", "selective" (every second one), "full" (all: about a third more time), or
            "auto": as few as the memory allows, by an estimate when training starts (`plan_checkpointing`).
        fused_kernels: RMSNorm, rotary embedding and SwiGLU by liger-kernel; on a GPU only.
        lora: ``dict(r=…, alpha=…)``, see `LoraSettings`; None trains all weights.
    """

    def __init__(
        self,
        llm: Mapping[str, Any],
        tokenizer: Mapping[str, Any] | PolarTemplate,
        loss_type: LossType = "ranking",
        penalty_type: PenaltyType = "log_barrier",
        penalty_weight: float = 0.01,
        attention: Backend | Literal["auto"] = "auto",
        activation_checkpointing: Checkpointing = "auto",
        fused_kernels: bool = False,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        report("phase", text="loading the model")
        self.objective = PairObjective(loss_type, penalty_type, penalty_weight)
        self.template = tokenizer if isinstance(tokenizer, PolarTemplate) else BUILDER.build(dict(tokenizer))
        self.base_folder: str = os.fspath(llm["pretrained_model_name_or_path"])
        self.llm, head_weight, _ = load_backbone(self.base_folder, weights_dtype(llm))
        if len(self.template) > self.llm.config.vocab_size:
            grow_embeddings(self.llm, len(self.template))
        self.adapter: Adapter | None = None
        if lora is not None:
            self.adapter = adapters.add_adapters(self.llm, LoraSettings.of_config(lora), self.base_folder)
        self.v_head = RewardHead(self.llm.config.hidden_size)
        with torch.no_grad():
            if head_weight is None:
                self.v_head.weight.zero_()
            else:
                self.v_head.weight.copy_(head_weight)
        self.attention = attention
        self.activation_checkpointing: Checkpointing = activation_checkpointing
        # Safe until `plan_checkpointing` knows the size of a pack and the memory that is left.
        self.checkpointed_layers = len(self.llm.layers)
        if fused_kernels:
            use_fused_kernels(self.llm)
        adapters.refuse_other_tensors(self)
        if self.adapter is not None:
            adapters.work_around_zero3_checkpoint_error(self.llm)
            adapters.record_adapters(self, self.adapter)
            MMLogger.get_current_instance().info(adapters.describe(self, self.adapter))

    def plan_checkpointing(self, tokens: int, unallocated_bytes: int) -> str:
        """Decides how many layers are computed again in backward; called when training starts.

        Args:
            tokens: Of the largest pack.
            unallocated_bytes: Gradients and optimizer state that training will still allocate, for each
                parameter of this rank.

        Returns:
            The decision and how it was made, for the log.
        """
        if self.adapter is not None:
            adapters.check_zero_stage(self, self.adapter)
        layers = len(self.llm.layers)
        device = self.v_head.weight.device
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        free = free_memory(device, trainable, unallocated_bytes)
        per_token, boundary = 0, self.llm.config.hidden_size * self.llm.dtype.itemsize
        if self.activation_checkpointing == "auto":
            per_token = activation_bytes_per_token(self.llm)
        self.checkpointed_layers = layers_to_checkpoint(
            self.activation_checkpointing,
            layers,
            tokens=tokens,
            bytes_per_token=per_token,
            boundary_bytes=boundary,
            free_bytes=free,
        )
        decision = f"{self.checkpointed_layers} of {layers} layers are computed again in backward"
        if self.activation_checkpointing != "auto":
            return f"{decision} (activation_checkpointing={self.activation_checkpointing!r})"
        return (
            f"{decision}: a layer keeps {per_token:,} bytes a token (measured on one layer), a pack has up "
            f"to {tokens:,} tokens, {free / 2**30:.1f} GiB are free for activations"
        )

    def init_weights(self) -> None:
        """Does nothing: the weights were loaded; mmengine would initialise them again."""

    def forward(self, pack: Pack) -> torch.Tensor:  # type: ignore[override]
        """Rewards of a pack, [candidates] float32."""
        return packed_rewards(
            self.llm,
            self.v_head,
            pack,
            backend=self.attention,
            checkpointed_layers=self.checkpointed_layers if self.training else 0,
        )

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
        state: Mapping[str, torch.Tensor] = self.state_dict()
        if self.adapter is not None:
            state = merge_adapter(state, self.base_folder, self.template)
        write_hf_folder(
            state,
            base_folder=self.base_folder,
            out_dir=save_dir,
            template=self.template,
            dtype=torch.float32 if fp32 else torch.float16,
            max_shard_size=(save_pretrained_kwargs or {}).get("max_shard_size", "5GB"),
            force=True,  # as xtuner's own does
        )
