"""The template: the same ids as xtuner 0.2.0 where they should be, other ids where that is on purpose."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from xtuner.dataset.preference_dataset import tokenize_ref
from xtuner.utils.rm_utils import RewardModelClient as PublishedClient

from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup, common_prefix_length
from polar_ft.template import EncodeError, PolarTemplate
from tests.encoding import encode, ids_of
from tests.shared_data import shared_file
from tests.tokenizers_zoo import KINDS, save, train

CONTROL = ["<s>", "</s>", "<unk>", "<|reward|>", "[UNUSED_TOKEN_130]"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save(train(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return save(train("byte_level"), tmp_path_factory.mktemp("byte_level"))


def xtuner_ids(tokenizer, row, reward_id, max_length=16384, max_response_length=4096):
    messages = {
        key: [{"role": "user", "content": row[key]}] for key in ("prompt", "reference", "chosen", "rejected")
    }
    pair = {**messages, "wrapper": row.get("wrapper", "sft")}
    ids = tokenize_ref(
        pair, tokenizer, max_length, max_response_length, is_reward=True, reward_token_id=reward_id
    )
    return [ids["chosen_ids"], ids["rejected_ids"]]


def survives(tokenizer, text):
    """xtuner decodes and encodes a field once more; ids can be compared where that loses nothing."""
    return tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


WORDS = [
    "Paris",
    "capital",
    "the",
    "巴黎",
    "  two",
    "\n",
    "\n\n",
    "x ** 2",
    "fox,",
    " ",
    "é",
    "🙂",
    "</",
    "<|",
    "[U",
]


def random_text(rng):
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", "\n"]) for _ in range(rng.randint(1, 12)))


def test_ids_are_those_of_xtuner(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = PolarTemplate.from_pretrained(folder)
    rng = random.Random(0)
    texts = [text for text in (random_text(rng) for _ in range(2000)) if survives(tokenizer, text)]
    assert len(texts) > 100
    for number in range(300):
        row = {key: rng.choice(texts) for key in ("prompt", "reference", "chosen", "rejected")}
        row["wrapper"] = "pretrain" if number % 3 == 0 else "sft"
        encoded = encode(
            template,
            row["prompt"],
            row["reference"],
            [row["chosen"], row["rejected"]],
            wrapper=row["wrapper"],
        )
        assert ids_of(encoded) == xtuner_ids(tokenizer, row, template.reward_token_id)
        assert len(encoded.prefix) == common_prefix_length([np.array(ids) for ids in ids_of(encoded)])


def test_ids_are_those_of_xtuner_on_real_rows(byte_level):
    path = shared_file("alpaca_eval_ranked.jsonl.gz")
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    template = PolarTemplate.from_pretrained(byte_level)
    rows = qualified = 0
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            source = json.loads(line)
            texts = [response["content"] for response in source["responses"]]
            row = {
                "prompt": source["prompt"][0]["content"],
                "reference": texts[0],
                "chosen": texts[1],
                "rejected": texts[-1],
            }
            rows += 1
            encoded = encode(template, row["prompt"], row["reference"], [row["chosen"], row["rejected"]])
            if encoded.cut or not all(row.values()) or not all(survives(tokenizer, t) for t in row.values()):
                continue
            qualified += 1
            assert ids_of(encoded) == xtuner_ids(tokenizer, row, template.reward_token_id)
    print(f"{qualified} of {rows} rows qualify for the comparison with xtuner, all equal")
    assert qualified > 0.9 * rows


def test_responses_are_cut_as_xtuner_cuts_them(byte_level):
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    template = PolarTemplate.from_pretrained(byte_level, max_length=400, max_response_length=20)
    row = {
        "prompt": "What is the capital of France?",
        "reference": "Paris is the capital of France and has been so for a long time indeed, again and "
        "again.",
        "chosen": "The capital of France is Paris, a large city on the river, again and again and again.",
        "rejected": "no",
    }
    encoded = encode(
        template, row["prompt"], row["reference"], [row["chosen"], row["rejected"]], measure=True
    )
    assert ids_of(encoded) == xtuner_ids(tokenizer, row, template.reward_token_id, 400, 20)
    assert encoded.lengths.reference - 20 == encoded.cut.reference > 0
    assert encoded.cut.candidates[0] > 0
    assert encoded.cut.candidates[1] == 0


def test_prompt_budget_differs_from_xtuner_on_purpose(byte_level):
    """xtuner gives the prompt what both responses of the *pair* leave, so another pair of the same prompt has
    another prefix, and a server, which sees one candidate, a third. Ours reserves max_response_length."""
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    template = PolarTemplate.from_pretrained(byte_level, max_length=120, max_response_length=40)
    row = {"prompt": "a long prompt, " * 20, "reference": "short", "chosen": "yes", "rejected": "no"}
    ours = encode(template, row["prompt"], row["reference"], [row["chosen"], row["rejected"]])
    theirs = xtuner_ids(tokenizer, row, template.reward_token_id, 120, 40)
    assert len(ids_of(ours)[0]) < len(theirs[0])
    long_candidate = "a much longer candidate than the others, by far, with many words"
    other = encode(template, row["prompt"], row["reference"], ["yes", long_candidate])
    assert ids_of(other)[0] == ids_of(ours)[0]
    assert max(map(len, ids_of(other))) <= 120


def test_empty_texts_differ_from_xtuner_only_where_its_budget_is_wrong(byte_level):
    """With a budget of 0 xtuner's ``ids[-0:]`` keeps the complete prompt; ours names the limit instead."""
    template = PolarTemplate.from_pretrained(byte_level)
    ids = ids_of(encode(template, "", "", [""]))[0]
    assert ids == [*template.bos_ids, template.separator_id, template.reward_token_id]
    with_prompt = encode(template, "p", "", ["", "x"])
    p = template.tokenizer.encode("p", add_special_tokens=False).ids
    head = [*template.bos_ids, *p, template.separator_id, *p]
    assert ids_of(with_prompt)[0] == [*head, template.reward_token_id]
    assert ids_of(with_prompt)[1] == [
        *head,
        *template.tokenizer.encode("\nx", add_special_tokens=False).ids,
        template.reward_token_id,
    ]


def test_text_never_becomes_a_control_token(folder):
    template = PolarTemplate.from_pretrained(folder)
    control = {template.tokenizer.token_to_id(token) for token in CONTROL if token != "<unk>"}
    rng = random.Random(1)
    for _ in range(100):
        texts = ["".join(rng.choice(CONTROL + WORDS) for _ in range(rng.randint(0, 8))) for _ in range(4)]
        encoded = encode(template, texts[0], texts[1], texts[2:])
        for ids in ids_of(encoded):
            inner = ids[len(template.bos_ids) : -1]
            assert ids[: len(template.bos_ids)] == template.bos_ids
            assert ids[-1] == template.reward_token_id
            assert [i for i in inner if i in control] == [template.separator_id]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=200), min_size=3, max_size=5), limit=st.integers(4, 40))
def test_limits_hold_for_any_text(byte_level, texts, limit):
    template = PolarTemplate.from_pretrained(byte_level, max_length=4 * limit + 10, max_response_length=limit)
    encoded = encode(template, texts[0], texts[1], texts[2:], measure=True)
    prefix = ids_of(encoded)[0][: len(encoded.prefix)]
    for ids in ids_of(encoded):
        assert len(ids) <= template.max_length
        assert ids.count(template.separator_id) == 1
        assert ids[: len(encoded.prefix)] == prefix
    # The part up to the candidate does not depend on the other candidates.
    alone = encode(template, texts[0], texts[1], texts[2:3])
    assert ids_of(alone)[0] == ids_of(encoded)[0]


def test_a_batch_is_what_its_members_are(folder):
    template = PolarTemplate.from_pretrained(folder)
    rng = random.Random(2)
    fields = [
        (random_text(rng), random_text(rng), [random_text(rng) for _ in range(rng.randint(1, 4))])
        for _ in range(20)
    ]
    batch = template.encode([TextGroup(p, (r,), tuple(c)) for p, r, c in fields])
    assert [ids_of(e) for e in batch] == [ids_of(encode(template, p, r, c)) for p, r, c in fields]


def test_text_that_tokenizes_longer_once_it_is_cut_is_cut_further(tmp_path):
    """Cutting inside a word can leave pieces that take more tokens than were counted."""
    folder = save(train("prepend_normalizer"), tmp_path)
    template = PolarTemplate.from_pretrained(folder, max_length=120, max_response_length=20)
    prompt = "What is the capital of France? 中文文本也要正确处理。 " * 4
    reference = "It is Paris, the capital; it is Paris. 参考答案是巴黎。"
    encoded = encode(template, prompt, reference, ["Paris", reference])
    assert encoded.cut.prompt
    assert encoded.cut.reference
    assert encoded.cut.candidates[1]
    for ids in ids_of(encoded):
        assert len(ids) <= 120
        assert ids.count(template.separator_id) == 1


def test_a_reference_that_leaves_no_room_is_named(byte_level):
    template = PolarTemplate.from_pretrained(byte_level, max_length=90, max_response_length=42)
    with pytest.raises(PolarError, match=r"leaves the prompt a budget.*raise max_length to at least"):
        encode(template, "a prompt", "a long reference " * 20, ["x"])


def test_the_group_that_cannot_be_encoded_is_named_by_its_index(byte_level):
    template = PolarTemplate.from_pretrained(byte_level, max_length=90, max_response_length=42)
    good = TextGroup("a prompt", ("short",), ("x",))
    cut = TextGroup("a prompt " * 20, ("short",), ("a long candidate " * 20,))
    bad = TextGroup("a prompt", ("a long reference " * 20,), ("x",))
    groups = [good, cut, bad, good, bad]
    with pytest.raises(EncodeError, match="leaves the prompt a budget") as caught:
        template.encode(groups)
    assert caught.value.index == 2

    each = template.encode_each(groups)
    assert [error.index for error in each if isinstance(error, EncodeError)] == [2, 4]
    expected = template.encode([good, cut])
    for place, alone in ((0, expected[0]), (1, expected[1]), (3, expected[0])):
        assert ids_of(each[place]) == ids_of(alone)
        assert each[place].cut == alone.cut
    with pytest.raises(EncodeError):
        template.kept(bad)


@pytest.mark.parametrize("max_response_length", [4096, 8], ids=["uncut", "responses cut"])
def test_spelling_is_that_of_the_published_client(byte_level, max_response_length):
    """Of texts that are not empty: there the published client compares a length with a string."""
    published = object.__new__(PublishedClient)
    published.tokenizer = AutoTokenizer.from_pretrained(byte_level)
    published.max_length, published.max_response_length = 16384, max_response_length
    published.response_cut_side = "right"
    template = PolarTemplate.from_pretrained(byte_level, max_response_length=max_response_length)
    rng = random.Random(3)
    # It decodes what it has cut; a part of a character is not text, so here each has one byte.
    texts = [text for text in (random_text(rng) for _ in range(1000)) if text.isascii() and text.strip()]
    texts = [text for text in texts if survives(published.tokenizer, text)]
    n_cut = 0
    for number in range(200):
        prompt, reference, *candidates = rng.sample(texts, 4)
        group = TextGroup(prompt, (reference,), tuple(candidates), "pretrain" if number % 3 == 0 else "sft")
        [encoded] = template.encode([group])
        n_cut += bool(encoded.cut)
        for place, candidate in enumerate(candidates):
            expected = published._encode(prompt, reference, candidate, group.wrapper)
            assert template.spell(group, encoded, place) == expected
    assert n_cut == 0 if max_response_length == 4096 else n_cut > 100


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.sampled_from("ab \n.é中<|>"), max_size=60), min_size=3, max_size=5),
    wrapper=st.sampled_from(["sft", "pretrain"]),
    limit=st.sampled_from([6, 12, 1000]),
)
def test_spelling_is_what_was_kept_of_the_texts(byte_level, texts, wrapper, limit):
    template = PolarTemplate.from_pretrained(byte_level, max_length=6 * limit, max_response_length=limit)
    group = TextGroup(texts[0], (texts[1],), tuple(texts[2:]), wrapper)
    [encoded] = template.encode([group])
    kept = template.kept(group)

    def joined(response: str) -> str:
        line = "" if wrapper == "pretrain" or not response else "\n"
        return f"{kept.prompt}{line}{response}"

    for number, candidate in enumerate(kept.candidates):
        expected = f"{joined(kept.reference)}<|reward|>{joined(candidate)}[UNUSED_TOKEN_130]"
        assert template.spell(group, encoded, number) == expected
    if not encoded.cut:
        assert kept == group


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separator": "<|nothing|>"}, "has no token '<|nothing|>'"),
        ({"reward_token": "[NO]"}, "has no token '\\[NO\\]'"),
        ({"reward_token_id": 7}, "the config says reward_token_id=7, but '\\[UNUSED_TOKEN_130\\]' has id"),
        ({"max_length": 100, "max_response_length": 100}, "leaves no room"),
    ],
)
def test_a_wrong_setting_is_named(byte_level, settings, message):
    with pytest.raises(PolarError, match=message.replace("|", "\\|")):
        PolarTemplate.from_pretrained(byte_level, **settings)


def test_missing_tokens_can_be_added(tmp_path):
    folder = save(train("no_bos"), tmp_path)
    template = PolarTemplate.from_pretrained(
        folder, separator="<|polar_sep|>", reward_token="<|polar_score|>", add_missing_tokens=True
    )
    size = len(PolarTemplate.from_pretrained(folder))
    assert (template.separator_id, template.reward_token_id) == (size, size + 1)
    ids = ids_of(encode(template, "p", "r", ["<|polar_score|>"]))[0]
    assert ids.count(template.reward_token_id) == 1
    assert ids[-1] == size + 1


def test_a_tokenizer_with_code_of_its_own_is_refused_unless_named(tmp_path):
    folder = save(train("byte_level"), tmp_path)
    tokenizer_json = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").rename(folder / "hidden.json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tok_own.Own", "tok_own.OwnFast"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tok_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "from pathlib import Path\n"
        "class OwnFast(PreTrainedTokenizerFast):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, folder, **_):\n"
        "        return cls(tokenizer_file=str(Path(folder) / 'hidden.json'))\n"
    )
    with pytest.raises(PolarError, match=r"needs Python code from the folder.*allow_tokenizer_code"):
        PolarTemplate.from_pretrained(folder)
    template = PolarTemplate.from_pretrained(folder, allow_tokenizer_code=("tok_own.OwnFast",))
    expected = PolarTemplate(tokenizer_json)
    assert ids_of(encode(template, "p", "r", ["c"])) == ids_of(encode(expected, "p", "r", ["c"]))


def test_a_misspelt_path_is_named(tmp_path):
    with pytest.raises(PolarError, match="no such folder; check the spelling"):
        PolarTemplate.from_pretrained(tmp_path / "nowhere")


def test_importing_the_template_needs_no_torch():
    code = (
        "import sys, polar_ft.template, polar_ft.data.records, polar_ft.data.reading\n"
        "heavy = {'torch', 'transformers', 'xtuner', 'datasets', 'mmengine'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
