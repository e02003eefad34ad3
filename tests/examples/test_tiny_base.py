"""The tiny base stands for a published one: transformers has to read it whole, tokenizer and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_base import make_tiny_base
from polar_ft.model.tiny_base import MADE_OF, tiny_base_of
from polar_ft.template import PolarTemplate
from tests.encoding import encode, ids_of

TEXTS = ["What colour is the lamp?\nIt is blue.", "What colour is the chair?\nIt is green."] * 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base"), TEXTS, vocab_size=300, hidden=32)


def test_transformers_loads_every_tensor(base: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(model).__name__ == "InternLM2ForCausalLM"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    logits = model(torch.tensor([[1, 5, 6]]), attention_mask=torch.ones(1, 3)).logits
    assert logits.shape == (1, 3, model.config.vocab_size)


def test_tokenizer_needs_no_code_and_puts_one_bos(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer("What colour?", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}  # what `model(**inputs)` takes
    ids = tokenizer("What colour?").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<s>"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "What colour?"


def test_control_tokens_are_those_of_polar(base: Path) -> None:
    template = PolarTemplate.from_pretrained(base)
    tokens = template.tokens(ids_of(encode(template, "What colour is the lamp?", "It is blue.", ["blue"]))[0])
    assert tokens[0] == "<s>"
    assert tokens.count("<|reward|>") == 1
    assert tokens[-1] == "[UNUSED_TOKEN_130]"
    added = {token.content: token.special for token in template.tokenizer.get_added_tokens_decoder().values()}
    assert added["<|reward|>"]
    assert not added["[UNUSED_TOKEN_130]"]


def test_the_same_seed_gives_the_same_files(base: Path, tmp_path: Path) -> None:
    again = make_tiny_base(tmp_path / "again", TEXTS, vocab_size=300, hidden=32)
    other = make_tiny_base(tmp_path / "other", TEXTS, vocab_size=300, hidden=32, seed=1)
    for file in base.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
        assert (file.read_bytes() == (other / file.name).read_bytes()) == (file.name != "model.safetensors")


def test_a_base_is_made_again_for_other_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def rows(name: str, word: str) -> str:
        row = {"prompt": f"{word}?", "reference": word, "chosen": word, "rejected": "No."}
        (tmp_path / name).write_text(f"{json.dumps(row, ensure_ascii=False)}\n" * 20, encoding="utf-8")
        return str(tmp_path / name)

    def tokens(data: str | list[dict]) -> int:
        tiny_base_of(folder, data, vocab_size=300, hidden=32)
        return len(AutoTokenizer.from_pretrained(folder).tokenize("太阳系"))

    folder = tmp_path / "models" / "base"
    english, chinese = rows("english.jsonl", "planets"), rows("chinese.jsonl", "太阳系")
    assert tokens(english) == 9  # a token for each byte
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert tokens(english) == 9
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert tokens([{"path": chinese}]) == 1
    assert f"{folder}: was made of other data, so it is made again" in caplog.text
    (folder / MADE_OF).unlink()  # as of a user's own model
    assert tokens(english) == 1
    assert f"{folder}: does not say what it was made of, so it is used as it is" in caplog.text
