"""Small tokenizers of every kind that a base model may come with, trained on the spot."""

from __future__ import annotations

from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

KINDS = ("byte_level", "metaspace_always", "metaspace_first", "prepend_normalizer", "unigram", "no_bos")

CORPUS = [
    "The capital of France is Paris. What is the capital of Japan?",
    "reward unused token the quick brown fox jumps over the lazy dog, again and again",
    "<s> </s> <|reward|> [UNUSED_TOKEN_130] are spelled in this corpus so that merges could make them",
    "中文文本也要正确处理。参考答案是巴黎。",
    "def f(x):\n    return x ** 2\n\nprint(f(3))  # nine",
] * 20


def train(kind: str) -> Tokenizer:
    """A tokenizer of the kind, with the control tokens of POLAR."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    elif kind in ("byte_level", "no_bos"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        if kind == "no_bos":
            tokenizer.normalizer = normalizers.NFC()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + byte_tokens)
        if kind == "prepend_normalizer":  # as InternLM2's and Llama 2's converted SentencePiece models
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            tokenizer.decoder = decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(content=" ", left=1),
                ]
            )
        else:
            scheme = kind.removeprefix("metaspace_")
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
            tokenizer.decoder = decoders.Sequence(
                [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
            )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|reward|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("[UNUSED_TOKEN_130]", special=False, normalized=False)])
    if kind != "no_bos":
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    """Saves it as transformers does, so that AutoTokenizer can read it back."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder
