"""InternLM2 written as Llama: a folder that engines and transformers read without code of the folder.

InternLM2 is Llama with other names and one matrix for queries, keys and values (`polar_ft.model.internlm2`),
so nothing is computed: tensors are renamed, ``wqkv`` is split, and the config says the same in Llama's terms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from polar_ft.errors import PolarError
from polar_ft.files import read_json
from polar_ft.model.backbones import backbone_of, decoder_config
from polar_ft.template import PolarTemplate

_CONFIG_KEYS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)
# What else tokenizer_config.json of an InternLM2 folder says is for its own code, or in tokenizer.json too.
_TOKENIZER_KEYS = (
    "additional_special_tokens",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "eos_token",
    "model_input_names",
    "model_max_length",
    "unk_token",
)


def llama_config(hf_config: Mapping[str, Any], template: PolarTemplate, name: str) -> dict[str, Any]:
    """The ``config.json`` of Llama for the same mathematics up to the template's ``max_length``.

    Engines read a plain RoPE alike, dynamic scaling not: transformers leaves the base alone up to
    ``max_position_embeddings`` tokens, SGLang 0.5.23 and older versions of vLLM never do. Up to that length
    no scaling is what training computed, so dynamic scaling is left out.

    Args:
        hf_config: ``config.json`` of an InternLM2 model, or of a Llama, which stays as it is.
        template: What the model was trained with.
        name: Of the model in error messages.

    Raises:
        PolarError: The model is of another family, or ``max_length`` is in the range of dynamic RoPE.
    """
    backbone = backbone_of(hf_config, name)
    if backbone.model_type == "llama":
        return dict(hf_config)
    if backbone.model_type != "internlm2":
        raise PolarError(
            f"{name}: --as llama is for InternLM2 models; a {backbone.model_type} model is exported as "
            f"{backbone.architecture}, which engines read without code of the folder: leave --as out"
        )
    llama = decoder_config(hf_config, name)
    return {
        "model_type": "llama",
        **{key: getattr(llama, key) for key in _CONFIG_KEYS},
        "attention_dropout": 0.0,
        "rope_scaling": _rope_scaling(llama, template, name),
        "tie_word_embeddings": False,  # there is no output layer
    }


def _rope_scaling(llama: PretrainedConfig, template: PolarTemplate, name: str) -> dict[str, Any] | None:
    scaling = llama.rope_scaling
    if scaling is None:
        return None
    if scaling["rope_type"] == "linear":
        return {"type": "linear", **scaling}  # the older key and the newer one
    if template.max_length > llama.max_position_embeddings:
        raise PolarError(
            f"{name}: beyond max_position_embeddings={llama.max_position_embeddings} tokens its RoPE is "
            f"scaled, which engines compute in different ways, and max_length={template.max_length} is "
            f"beyond it; lower max_length, or leave --as out"
        )
    return None


def write_tokenizer(base: Path, folder: Path, template: PolarTemplate, config: Mapping[str, Any]) -> None:
    """Writes a tokenizer that transformers loads without code of the folder, with the ids of the template.

    Its padding token is that of ``config.json``: LlamaForSequenceClassification scores the token before it.

    Args:
        base: Folder of the InternLM2 model.
        folder: Folder to write into.
        template: Has the tokenizer.
        config: ``config.json`` of the written folder.
    """
    (folder / "tokenizer.json").write_text(template.tokenizer_json, encoding="utf-8")
    file = base / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    settings = {key: settings[key] for key in _TOKENIZER_KEYS if key in settings}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["pad_token"] = template.tokenizer.id_to_token(config["pad_token_id"])
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
