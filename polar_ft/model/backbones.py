"""What is known of a model family: one entry each, which loading, conversion, adapters and kernels ask.

A family is one whose layers `polar_ft.model.reward_model.run_layer` computes. To add one, add an entry to
`BACKBONES`: how its ``config.json`` becomes a config of transformers, which decoder class holds its weights,
and what an exported folder is called. Where its folders name or fuse tensors otherwise than the decoder does,
`WeightNames` says how; nothing else knows. `MODEL_TYPES` of `polar_ft.model.base_folder` has their names,
for checks without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model
from transformers.modeling_utils import no_init_weights
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding

from polar_ft.errors import PolarError
from polar_ft.model import internlm2
from polar_ft.model.base_folder import check_family
from polar_ft.model.reward_model import refuse_unknown_layers

# For fused kernels: norms and feed-forward layers of all families.
NORMS = (LlamaRMSNorm, Qwen2RMSNorm)
MLPS = (LlamaMLP, Qwen2MLP)


class _Float32Frequencies:
    """Rotary frequencies stay float32 when the model is cast.

    DeepSpeed casts buffers together with the parameters. In bfloat16 a frequency is off by up to 0.2 %, so
    that at position 1000 angles are off by a radian and more: a model trained like that is not the one that
    is served.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        device = fn(self.inv_freq.new_empty(0)).device
        self.original_inv_freq = self.original_inv_freq.to(device)
        return super()._apply(lambda tensor: tensor.to(device), recurse)  # type: ignore[misc]


class _LlamaRotary(_Float32Frequencies, LlamaRotaryEmbedding):
    pass


class _Qwen2Rotary(_Float32Frequencies, Qwen2RotaryEmbedding):
    pass


class Qwen3Config(LlamaConfig):
    """Config of dense Qwen3 models (arXiv 2505.09388), which transformers 4.48 does not have."""

    model_type = "qwen3"


class Qwen3Model(LlamaModel):
    """Qwen3 is Llama with an RMSNorm over every query and key head, and heads whose size is set by itself."""

    config_class = Qwen3Config

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        for layer in self.layers:
            for name in ("q_norm", "k_norm"):
                norm = LlamaRMSNorm(layer.self_attn.head_dim, eps=config.rms_norm_eps)
                setattr(layer.self_attn, name, norm)

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError: the inherited forward would leave the norms of heads out."""
        raise NotImplementedError("Qwen3Model is run by polar_ft.model.reward_model.packed_rewards")


@dataclass(frozen=True)
class WeightNames:
    """How the tensors of a folder and those of the decoder correspond; by default they are the same.

    Attributes:
        folder_name: The folder's name of the tensor that holds a decoder tensor.
        decoder_names: The decoder tensors that a tensor of the folder holds.
        split: (tensor of the folder, config) to its decoder tensors, where it holds several.
        fuse: The inverse of ``split``.
        embeddings: The folder's name of the embeddings.
    """

    folder_name: Callable[[str], str] = lambda name: name
    decoder_names: Callable[[str], tuple[str, ...]] = lambda name: (name,)
    split: Callable[[torch.Tensor, PretrainedConfig], Sequence[torch.Tensor]] | None = None
    fuse: Callable[[Sequence[torch.Tensor], PretrainedConfig], torch.Tensor] | None = None
    embeddings: str = "embed_tokens.weight"

    def decoder_tensors(
        self, name: str, tensor: torch.Tensor, config: PretrainedConfig
    ) -> dict[str, torch.Tensor]:
        """The decoder tensors that a tensor of the folder holds, by name.

        Args:
            name: The folder's, without ``llm.`` or ``model.`` before it.
            tensor: Of that name.
            config: Of the decoder.
        """
        names = self.decoder_names(name)
        if len(names) == 1:
            return {names[0]: tensor}
        assert self.split is not None
        return dict(zip(names, self.split(tensor, config), strict=True))

    def folder_tensor(self, parts: Sequence[torch.Tensor], config: PretrainedConfig) -> torch.Tensor:
        """The inverse of `decoder_tensors`: the tensor of the folder that holds these decoder tensors."""
        if len(parts) == 1:
            return parts[0]
        assert self.fuse is not None
        return self.fuse(parts, config)

    def folder_shapes(
        self, decoder: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Every tensor of a folder: the decoder tensors that it holds, and its shape.

        Args:
            decoder: Shapes of the decoder's tensors.
        """
        shapes = {}
        for name in dict.fromkeys(map(self.folder_name, decoder)):
            parts = self.decoder_names(name)
            rows = sum(decoder[part][0] for part in parts)
            shapes[name] = (parts, (rows, *decoder[parts[0]][1:]))
        return shapes


LLAMA_NAMES = WeightNames()
INTERNLM2_NAMES = WeightNames(
    folder_name=internlm2.to_internlm2_name,
    decoder_names=internlm2.to_llama_names,
    split=lambda tensor, config: internlm2.split_wqkv(
        tensor, config.num_attention_heads, config.num_key_value_heads
    ),
    fuse=lambda parts, config: internlm2.fuse_wqkv(
        parts[0], parts[1], parts[2], config.num_attention_heads, config.num_key_value_heads
    ),
    embeddings="tok_embeddings.weight",
)


@dataclass(frozen=True)
class Backbone:
    """A model family.

    Attributes:
        model_type: In ``config.json``.
        config: ``config.json`` to a config of transformers.
        decoder: Class that holds the weights; its layers are of the Llama kind.
        rotary: Its rotary embedding, with frequencies that stay float32.
        architecture: Of an exported reward model.
        head: Name of the reward head in an exported folder.
        names: Tensors of its folders.
        code: Python files that an exported folder needs; empty where transformers knows the architecture.
        auto_map: ``auto_map`` of an exported folder with such files.
    """

    model_type: str
    config: Callable[[Mapping[str, Any]], PretrainedConfig]
    decoder: type[PreTrainedModel]
    rotary: type
    architecture: str
    head: str = "score.weight"
    names: WeightNames = LLAMA_NAMES
    code: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)


def _from_dict(config_class: type[PretrainedConfig]) -> Callable[[Mapping[str, Any]], PretrainedConfig]:
    def build(hf_config: Mapping[str, Any]) -> PretrainedConfig:
        fields = dict(hf_config)
        # transformers 5 writes rope_theta and rope_scaling as one; 4.48 would take its default for them.
        rope = fields.pop("rope_parameters", None)
        if rope is not None:
            fields["rope_theta"] = rope["rope_theta"]
            scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
            fields["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
        return config_class.from_dict(fields)

    return build


BACKBONES: dict[str, Backbone] = {
    backbone.model_type: backbone
    for backbone in (
        Backbone(
            "internlm2",
            config=internlm2.internlm2_config_to_llama,
            decoder=LlamaModel,
            rotary=_LlamaRotary,
            architecture="InternLM2ForRewardModel",
            head="v_head.weight",
            names=INTERNLM2_NAMES,
            code=("configuration_internlm2.py", "modeling_internlm2.py"),
            auto_map={
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
            },
        ),
        Backbone(
            "llama",
            config=_from_dict(LlamaConfig),
            decoder=LlamaModel,
            rotary=_LlamaRotary,
            architecture="LlamaForSequenceClassification",
        ),
        Backbone(
            "qwen2",
            config=_from_dict(Qwen2Config),
            decoder=Qwen2Model,
            rotary=_Qwen2Rotary,
            architecture="Qwen2ForSequenceClassification",
        ),
        Backbone(
            "qwen3",
            config=_from_dict(Qwen3Config),
            decoder=Qwen3Model,
            rotary=_LlamaRotary,
            architecture="Qwen3ForSequenceClassification",
        ),
    )
}


def backbone_of(hf_config: Mapping[str, Any], name: str = "config.json") -> Backbone:
    """The family of a model.

    Args:
        hf_config: The model's ``config.json``.
        name: Name used in error messages.

    Raises:
        PolarError: It is none of `BACKBONES`, or a variant that is not supported.
    """
    check_family(hf_config, name)
    return BACKBONES[hf_config["model_type"]]


def decoder_config(hf_config: Mapping[str, Any], name: str) -> PretrainedConfig:
    """The config of the transformers decoder that runs a model.

    Args:
        hf_config: The model's ``config.json``.
        name: Name used in error messages.

    Raises:
        PolarError: The model's type, or a variant of it, is not supported.
    """
    backbone = backbone_of(hf_config, name)
    try:
        return backbone.config(hf_config)
    except PolarError as error:
        raise PolarError(f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise PolarError(
            f"{name}: config.json is not that of a {backbone.model_type} model ({error})"
        ) from error


def empty_decoder(config: PretrainedConfig) -> Any:
    """A decoder without memory for its parameters (device "meta"), but with correct rotary frequencies.

    Args:
        config: What `decoder_config` gives, perhaps with other sizes.

    Raises:
        PolarError: Its layers have a part that polar_ft does not know.
    """
    backbone = BACKBONES[config.model_type]  # InternLM2's is a config of Llama
    with no_init_weights(), _parameters_on_meta():
        decoder = backbone.decoder(config)
    refuse_unknown_layers(decoder, f"a {backbone.model_type} model")
    decoder.rotary_emb = backbone.rotary(config=config)
    return decoder


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made within the block move to the device "meta" at once; all else is computed on the CPU.

    Under ``torch.device("meta")`` the rotary frequencies would be computed there too, for which torch imports
    its compiler: seconds.
    """
    original = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        original(self, name, parameter)

    with patch.object(nn.Module, "register_parameter", register_parameter):
        yield
