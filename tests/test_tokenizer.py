"""Splitting a text at a safe place changes no id with any tokenizer; unknown kinds are not split."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from polar_ft.groups import TextGroup
from polar_ft.template import PolarTemplate
from polar_ft.tokenizer import _KNOWN_PATTERNS, TextSplits
from tests.encoding import ids_of
from tests.tokenizers_zoo import CORPUS, train

WORDS = [
    "the",
    "capital",
    "Paris",
    "x",
    "Q's",
    "it's",
    "2",
    "巴黎",
    "é",
    "e\u0301",
    "fox,",
    "(y)",
    "▁a",
    "<|reward|>",
    "🙂",
]
BETWEEN = [" ", " ", " ", "  ", "\n", "", " \n ", "\t", "\u3000"]


def sentencepiece(normalizer) -> Tokenizer:
    """BPE over complete texts whose pieces never cross a space, as SentencePiece trains them."""
    spec = json.loads(train("metaspace_always").to_str())
    spec["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.normalizer = normalizer
    return tokenizer


def split_by(pattern: str) -> Tokenizer:
    tokenizer = train("byte_level")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


REPLACE = normalizers.Replace(" ", "▁")
KNOWN = {
    "byte_level": lambda: train("byte_level"),
    "byte_level_nfc": lambda: train("no_bos"),
    "metaspace_always": lambda: train("metaspace_always"),
    "metaspace_first": lambda: train("metaspace_first"),
    "llama2": lambda: sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])),
    "internlm2": lambda: sentencepiece(REPLACE),
    **{
        f"pattern_{len(pattern)}": lambda pattern=pattern: split_by(pattern)
        for pattern in sorted(_KNOWN_PATTERNS)
    },
}


def text_of(rng: random.Random, words: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(BETWEEN) for _ in range(words))


@pytest.mark.parametrize("kind", KNOWN)
def test_ids_are_those_of_complete_texts(kind):
    template, whole = PolarTemplate(tokenizer_json(kind)), PolarTemplate(tokenizer_json(kind))
    assert template._texts.splits.known
    whole._texts.splits.known = False
    rng = random.Random(0)
    rows = [
        TextGroup(
            text_of(rng, rng.randint(0, 20)),
            (text_of(rng, rng.randint(0, 10)),),
            tuple(text_of(rng, rng.randint(0, 10)) for _ in range(3)),
            rng.choice(["sft", "pretrain"]),
        )
        for _ in range(1500)
    ]
    assert sum(bool(template._texts.splits.last(row.prompt)[0]) for row in rows) > 500
    for ours, expected in zip(template.encode(rows), whole.encode(rows), strict=True):
        assert (ids_of(ours), ours.cut) == (ids_of(expected), expected.cut)


@pytest.mark.parametrize("kind", KNOWN)
def test_fields_near_their_limit_are_cut_as_complete_texts(kind):
    """What is certainly short enough by the joined ids is short enough by its own."""
    limits = dict(max_length=220, max_response_length=40)
    template = PolarTemplate(tokenizer_json(kind), **limits)
    rng = random.Random(1)
    rows = [
        TextGroup(
            text_of(rng, rng.randint(5, 40)),
            (text_of(rng, rng.randint(0, 25)),),
            (text_of(rng, rng.randint(0, 14)),),
        )
        for _ in range(300)
    ]
    # Measuring counts every field by itself.
    expected = template.encode(rows, measure=True)
    found = template.encode(rows)
    assert all(group.lengths is None for group in found)
    assert [(ids_of(group), group.cut) for group in found] == [(ids_of(g), g.cut) for g in expected]
    cut = sum(bool(row.cut) for row in expected)
    assert 50 < cut < 300


@cache
def tokenizer_json(kind: str) -> str:
    return KNOWN[kind]().to_str()


def spec_with(**changes) -> dict:
    return json.loads(train("byte_level").to_str()) | changes


@pytest.mark.parametrize(
    "spec",
    [
        spec_with(normalizer={"type": "Lowercase"}),
        spec_with(normalizer={"type": "Prepend", "prepend": "▁"}),
        spec_with(pre_tokenizer={"type": "Whitespace"}),
        spec_with(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
        json.loads(split_by(r"\w+|\W+").to_str()),
        json.loads(train("unigram").to_str()),
    ],
)
def test_other_tokenizers_are_not_split(spec):
    splits = TextSplits(spec, unspellable={"<s>", "</s>", "<unk>", "<|reward|>", "[UNUSED_TOKEN_130]"})
    assert not splits.known
    assert splits.last("Is the sky blue?") == ("", "Is the sky blue?")
    assert splits.first("Is the sky blue?") is None


def test_pieces_across_a_space_rule_the_places_out():
    """Without a pre-tokenizer, training on complete texts makes such pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = REPLACE
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400))
    assert any("e▁" in piece for piece in tokenizer.get_vocab())
    assert not TextSplits(json.loads(tokenizer.to_str()), set()).known


def test_an_added_token_with_a_space_rules_the_places_out():
    tokenizer = train("byte_level")
    unspellable = {token["content"] for token in json.loads(tokenizer.to_str())["added_tokens"]}
    assert TextSplits(json.loads(tokenizer.to_str()), unspellable).known
    tokenizer.add_tokens([AddedToken("e x", normalized=False)])
    assert not TextSplits(json.loads(tokenizer.to_str()), unspellable).known


def test_a_separator_that_swallows_spaces_keeps_doing_so():
    spec = json.loads(train("byte_level").to_str())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "<|reward|>"
    template, whole = (PolarTemplate(json.dumps(spec)) for _ in range(2))
    assert template._texts.splits.known
    whole._texts.splits.known = False
    group = TextGroup("  the sky is blue and wide ", ("reference text",), ("a b", " c"))
    [expected], [found] = whole.encode([group]), template.encode([group])
    assert ids_of(found) == ids_of(expected)
    assert len(ids_of(expected)[0]) > 20
