"""A small tokenizer, examples and a scorer without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from polar_ft.data.records import Example
from polar_ft.template import PolarTemplate


def byte_tokenizer() -> Tokenizer:
    """One token a byte, `<s>` in front: a text's length in tokens is its length in bytes plus one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|reward|>"])
    tokenizer.add_tokens([AddedToken("[UNUSED_TOKEN_130]", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


class FakeScorer:
    """Scores each candidate by a function of (example, candidate), and remembers what it was given."""

    dtype = "torch.float32"
    device = "cpu"

    def __init__(self, score: Callable[[Example, str], float], template: PolarTemplate) -> None:
        self.score = score
        self.template = template
        self.calls: list[list[Example]] = []

    def score_examples(self, examples: list[Example]) -> list[list[float]]:
        self.calls.append(examples)
        return [[self.score(example, candidate) for candidate in example.candidates] for example in examples]


@pytest.fixture(autouse=True)
def score_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache of scores of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLAR_FT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def template() -> PolarTemplate:
    return PolarTemplate(byte_tokenizer().to_str(), max_length=400, max_response_length=64)


@pytest.fixture(scope="session")
def tight_template() -> PolarTemplate:
    """Limits under which a reference of 64 tokens leaves no prompt: (132 − 4 − 64 − 64) // 2 = 0."""
    return PolarTemplate(byte_tokenizer().to_str(), max_length=132, max_response_length=64)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A folder with a tokenizer; the tests put a fake in place of its model."""
    folder = tmp_path / "polar-tiny"
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSONL and returns the path."""

    def write(rows: list[dict], name: str = "held_out.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_example() -> Callable[..., Example]:
    """Makes the example of one row, with texts of its own."""
    return _make_example


@pytest.fixture
def make_scorer(template: PolarTemplate) -> Callable[[Callable[[Example, str], float]], FakeScorer]:
    """Makes a scorer from a function of (example, candidate)."""
    return lambda score: FakeScorer(score, template)


def _make_example(
    row: int,
    *,
    candidates: tuple[str, ...] = ("good", "bad"),
    pairs: tuple[tuple[int, int], ...] = ((0, 1),),
    **fields: object,
) -> Example:
    values = {
        "prompt": f"prompt {row}",
        "references": (f"reference {row}",),
        "candidates": candidates,
        "pairs": pairs,
        "margins": (None,) * len(pairs),
        "weights": (1.0,) * len(pairs),
        "wrapper": "sft",
        "id": f"row-{row}",
        "subset": None,
        "extra": {},
        "source": f"held_out.jsonl:{row + 1}",
    }
    if "reference" in fields:
        fields["references"] = (fields.pop("reference"),)
    return Example(**{**values, **fields})
