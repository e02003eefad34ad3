"""What of a base model can be checked before its weights are loaded; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.files import read_json
from polar_ft.template import PolarTemplate

# The families of `polar_ft.model.backbones`.
MODEL_TYPES = ("internlm2", "llama", "qwen2", "qwen3")


def check_base(folder: Path, tokenizer: Mapping[str, Any] | None) -> None:
    """Checks the folder of a base model: its family, its tokenizer, and what its export will need.

    Args:
        folder: With ``config.json`` and the tokenizer.
        tokenizer: Keyword arguments of `PolarTemplate.from_pretrained`; None leaves the tokenizer unread.

    Raises:
        PolarError: It cannot be trained, or what is trained could not be exported.
    """
    hf_config = read_json(folder / "config.json")
    check_family(hf_config, str(folder))
    if tokenizer is None:
        return
    template = PolarTemplate.from_pretrained(folder, **tokenizer)
    check_tokenizer(template)
    if hf_config["model_type"] != "internlm2":
        padding_token(hf_config, template, str(folder))


def check_family(hf_config: Mapping[str, Any], name: str) -> None:
    """Raises PolarError for a model of another family, or a variant of one that is not supported.

    Args:
        hf_config: The model's ``config.json``.
        name: Name used in error messages.
    """
    kind = hf_config.get("model_type")
    if kind not in MODEL_TYPES:
        *others, last = MODEL_TYPES
        raise PolarError(
            f"{name}: model_type {kind!r} in config.json is not supported; {', '.join(others)} and {last} are"
        )
    if hf_config.get("use_sliding_window"):
        raise PolarError(
            f"{name}: sliding-window attention (use_sliding_window in config.json) is not supported"
        )
    if hf_config.get("quantization_config"):
        raise PolarError(
            f"{name}: is quantized (quantization_config in config.json); name the original model"
        )


def check_tokenizer(template: PolarTemplate) -> None:
    """Raises PolarError for a tokenizer that cannot write texts as they are, as BERT's.

    The template separates prompt and answer by a line feed, and answers may differ in upper and lower case.
    """

    def ids(text: str) -> list[int]:
        return template.tokenizer.encode(text, add_special_tokens=False).ids

    unknown = template.tokenizer.token_to_id("<unk>"), template.tokenizer.token_to_id("[UNK]")
    if ids("a\nb") in (ids("a b"), ids("ab")) or any(i in unknown for i in ids("a\nb")):
        lost = "line feeds, which stand between prompt and answer"
    elif ids("Word") == ids("word"):
        lost = "upper case"
    else:
        return
    raise PolarError(f"{template.name}: its tokenizer drops {lost}; take a base with a byte-level tokenizer")


def padding_token(hf_config: Mapping[str, Any], template: PolarTemplate, name: str) -> int:
    """The padding token of an exported model.

    The …ForSequenceClassification classes score the token before the first padding token. So padding has to
    be a token that no input holds: not one of the template's. Text never becomes an end-of-text token.

    Args:
        hf_config: ``config.json`` of the base.
        template: Of the trained model.
        name: Of the base in error messages.

    Raises:
        PolarError: There is no such token.
    """
    eos = hf_config.get("eos_token_id")
    used = {*template.bos_ids, template.separator_id, template.reward_token_id}
    for token in (hf_config.get("pad_token_id"), *(eos if isinstance(eos, list) else [eos])):
        if (
            token is not None
            and 0 <= token < max(hf_config["vocab_size"], len(template))
            and token not in used
        ):
            return token
    raise PolarError(
        f"{name}: its config.json has no pad_token_id that could be used, which export needs; set one there "
        f"that no input holds, for instance the id of an end-of-text token"
    )
