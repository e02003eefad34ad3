"""A small POLAR tokenizer, and the folder of full data files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

REPOSITORY = Path(__file__).resolve().parents[2]

TEXTS = [
    "What is the capital of France? Paris is the capital of France.",
    "How do I make tea? Boil the water, add the leaves, wait four minutes.",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Human: Assistant: user reference chosen rejected candidate prompt",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with POLAR's control tokens and a BOS, saved as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|reward|>"])
    tokenizer.add_tokens([AddedToken("[UNUSED_TOKEN_130]", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the full data files: POLAR_FT_SHARED_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("POLAR_FT_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the full data files are not here: {folder} (set POLAR_FT_SHARED_DATA)")
    return folder


WriteRows = Callable[[str, Iterable[Mapping[str, Any]]], Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows as JSON lines into the test's folder."""

    def write(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path

    return write


def pair(**changes: Any) -> dict[str, Any]:
    """A good pair row, with changes."""
    return {"prompt": "2 + 2?", "reference": "4", "chosen": "four", "rejected": "five"} | changes
