"""A tiny InternLM2-shaped base model with its tokenizer, made on the spot: what the demo and tests train.

It stands in for ``internlm/POLAR-1_8B-Base``: same architecture, same tensor names, same control tokens,
same code files next to the weights; random weights and a vocabulary learned from the texts it is given.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from polar_ft.data.reading import Sources, read_examples
from polar_ft.files import read_json, unfinished
from polar_ft.template import REWARD_TOKEN, SEPARATOR_TOKEN

CODE_FILES = ("configuration_internlm2.py", "modeling_internlm2.py")
# File in a base that a run made, which says of what.
MADE_OF = "made_of.json"

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", SEPARATOR_TOKEN)


def make_tiny_base(
    out_dir: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 768,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 2048,
    seed: int = 0,
) -> Path:
    """Writes a base folder: ``model.safetensors``, ``config.json``, the tokenizer and InternLM2's code files.

    Args:
        out_dir: Folder to write into; made if it is missing, its files of these names are replaced.
        texts: What the byte-level BPE is trained on.
        vocab_size: Upper limit of the vocabulary, control tokens counted; at least 256 bytes + 5.
        hidden: Width of the model; the feed-forward layer is twice as wide.
        layers: Number of decoder layers.
        heads: Attention heads; ``hidden`` is a multiple of it.
        kv_heads: Key and value heads, fewer than ``heads`` for grouped-query attention.
        max_positions: ``max_position_embeddings`` of the config.
        seed: Seed of the random weights; the same arguments give the same files.

    Returns:
        ``out_dir`` as a path.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, vocab_size)
    _save_tokenizer(tokenizer, out_dir)
    config = _config(tokenizer, hidden, layers, heads, kv_heads, max_positions)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(dict(_weights(config, seed)), out_dir / "model.safetensors", metadata={"format": "pt"})
    code = _code_folder()
    for name in CODE_FILES:
        shutil.copyfile(code / name, out_dir / name)
    return out_dir


def tiny_base_of(folder: Path, data: Sources, *, vocab_size: int, hidden: int) -> None:
    """Makes a tiny base of a run's data; again if the folder holds one that was made of other data.

    A folder that does not say what it was made of holds a user's own model, and is left as it is. Processes
    that call this together make one.

    Args:
        folder: Of the base.
        data: Rows, in the form that ``data`` of a config has.
        vocab_size: See `make_tiny_base`.
        hidden: See `make_tiny_base`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        record = folder / MADE_OF
        if (folder / "config.json").is_file() and not record.is_file():
            logger.warning("%s: does not say what it was made of, so it is used as it is", folder)
            return
        made_of = {"texts": _digest(texts_of(data)), "vocab_size": vocab_size, "hidden": hidden}
        if record.is_file() and read_json(record) == made_of:
            return
        with unfinished(folder) as part:
            make_tiny_base(part, texts_of(data), vocab_size=vocab_size, hidden=hidden)
            (part / MADE_OF).write_text(json.dumps(made_of) + "\n", encoding="utf-8")
            if folder.is_dir():
                logger.warning("%s: was made of other data, so it is made again", folder)
                shutil.rmtree(folder)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with POLAR's control tokens: ``<s>`` first, the reward token an added token last.

    ``[UNUSED_TOKEN_130]`` is not flagged special, as in some published InternLM2 tokenizers: the harder case
    for whoever must keep text from spelling it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the reward token comes on top
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B:1",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    return tokenizer


def texts_of(data: Sources) -> Iterator[str]:
    """All prompts, references and candidates of rows, each with the ⏎ that the template puts.

    Args:
        data: Files, or what ``data`` of a config may be.
    """
    for example in read_examples(data):
        for response in (example.reference, *example.candidates):
            yield f"{example.prompt}\n{response}"


def _save_tokenizer(tokenizer: Tokenizer, out_dir: Path) -> None:
    tokenizer.save(str(out_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": False,
        # Not token_type_ids, which transformers would add, and InternLM2's code does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1_000_000_000,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _config(
    tokenizer: Tokenizer, hidden: int, layers: int, heads: int, kv_heads: int, max_positions: int
) -> dict[str, object]:
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "attn_implementation": "eager",
        "bias": False,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
        "pad_token_id": tokenizer.token_to_id("</s>"),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": hidden**-0.5,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": max_positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        # The shipped modelling code reads it, the shipped config class has no default for it.
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
    }


def _weights(config: dict, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """InternLM2's tensors by name: norms one, the rest normal. Queries, keys and values are one matrix."""
    generator = torch.Generator().manual_seed(seed)
    # 1/√hidden: 0.022 at InternLM2's widths (its 0.02). At width 64, 0.02 would leave attention nearly flat
    # and more than double the steps until anything is learned.
    std = config["initializer_range"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "model.tok_embeddings.weight", normal(vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.attention.wqkv.weight", normal((heads + 2 * kv_heads) * (hidden // heads), hidden)
        yield f"{prefix}.attention.wo.weight", normal(hidden, hidden)
        yield f"{prefix}.feed_forward.w1.weight", normal(inner, hidden)
        yield f"{prefix}.feed_forward.w3.weight", normal(inner, hidden)
        yield f"{prefix}.feed_forward.w2.weight", normal(hidden, inner)
        yield f"{prefix}.attention_norm.weight", torch.ones(hidden)
        yield f"{prefix}.ffn_norm.weight", torch.ones(hidden)
    yield "model.norm.weight", torch.ones(hidden)
    yield "output.weight", normal(vocabulary, hidden)


def _code_folder() -> Path:
    """Where xtuner keeps InternLM2's code; found without importing xtuner, which takes seconds."""
    spec = find_spec("xtuner")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("xtuner is not installed: pip install '.[train]'")
    return Path(spec.origin).parent / "tools" / "model_converters" / "modeling_internlm2_reward"
