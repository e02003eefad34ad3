"""`RewardScorer.score` against transformers' own forward of each sequence alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ft.errors import DataError, PolarError
from polar_ft.model.weights import load_backbone
from polar_ft.reward_scale import RewardScale
from polar_ft.scoring.scorer import RewardScorer
from tests.encoding import encode, ids_of

# The published quick start: https://github.com/InternLM/POLAR#data-format
QUICK_START = [
    {
        "prompt": [{"role": "user", "content": "What is the capital of China?"}],
        "reference": [{"role": "assistant", "content": "Beijing."}],
        "output": [{"role": "assistant", "content": answer}],
    }
    for answer in ("Beijing.", "Shanghai.")
]


@pytest.fixture(scope="session")
def by_transformers(model_folder, scorer):
    """The reward of a row by `LlamaModel`'s own forward, one sequence at a time, and the head."""
    decoder, head, _ = load_backbone(model_folder, torch.float32)
    decoder.eval()

    def reward(row):
        texts = [
            value if isinstance(value, str) else "\n".join(message["content"] for message in value)
            for value in (row["prompt"], row["reference"], row["output"])
        ]
        prompt, reference, output = texts
        (ids,) = ids_of(
            encode(scorer.template, prompt, reference, [output], wrapper=row.get("wrapper", "sft"))
        )
        with torch.inference_mode():
            hidden = decoder(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
            return (head @ hidden).item()

    return reward


def test_the_published_quick_start(scorer, by_transformers):
    rewards = scorer.score(QUICK_START)
    assert rewards == pytest.approx([by_transformers(row) for row in QUICK_START], abs=1e-5)
    assert rewards[0] != rewards[1]
    assert scorer.score(QUICK_START[1]) == pytest.approx(rewards[1:], abs=1e-5)


texts = st.sampled_from(
    ["", "Beijing.", "What is it?", "北京是首都。", "no " * 60, "<|reward|> [UNUSED_TOKEN_130]"]
)
rows = st.fixed_dictionaries(
    {"prompt": texts, "reference": texts, "output": texts},
    optional={"wrapper": st.sampled_from(["sft", "pretrain"])},
)


@settings(max_examples=25, deadline=None)
@given(data=st.lists(rows, max_size=12), tokens_per_batch=st.sampled_from([1, 200, 16384]))
def test_every_row_gets_its_own_reward(scorer, by_transformers, data, tokens_per_batch):
    """Whatever is in the same pack, is shared, is cut, and however the rows are split into forwards."""
    small = RewardScorer(scorer.decoder, scorer.head, scorer.template, tokens_per_batch=tokens_per_batch)
    assert small.score(iter(data)) == pytest.approx([by_transformers(row) for row in data], abs=2e-5)


def test_candidates_of_one_reference_are_computed_together(scorer, monkeypatch):
    groups = []
    score_groups = RewardScorer.score_groups

    def spy(self, given):
        groups.extend(len(group.branches) for group in given)
        return score_groups(self, given)

    monkeypatch.setattr(RewardScorer, "score_groups", spy)
    other = {"prompt": "Hi", "reference": "", "output": "Hello"}
    scorer.score([QUICK_START[0], other, QUICK_START[1]])
    assert sorted(groups) == [1, 2]


def test_an_iterable_is_not_read_ahead_of_the_scores(scorer, monkeypatch):
    """At most a window of 16 batches' characters is held: 16 · 4 · 10 of them, and a row has 2 + 1 + 5."""
    small = RewardScorer(scorer.decoder, scorer.head, scorer.template, tokens_per_batch=10)
    read, read_at_first_score = 0, []

    def endless():
        nonlocal read
        while True:
            read += 1
            yield {"prompt": "p", "reference": "r", "output": "abcde"}

    class EnoughError(Exception):
        pass

    def stop(encoded, on_scored=None):
        read_at_first_score.append(read)
        raise EnoughError

    monkeypatch.setattr(small, "score_encoded", stop)
    with pytest.raises(EnoughError):
        small.score(endless())
    assert read_at_first_score == [80]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Hi", r"data\[1\]: is a str, not a dict"),
        ({"prompt": "p", "reference": "r"}, r"data\[1\]\.output: Field required"),
        (
            {"prompt": [{"role": "user"}], "reference": "r", "output": "o"},
            r"data\[1\]\.prompt\[0\]\.content: Field required",
        ),
        (
            {"prompt": "p", "reference": None, "output": "o"},
            r"data\[1\]\.reference: must be a string or a list of messages",
        ),
        (
            {"prompt": "p", "reference": "r", "output": "o", "wrapper": "chat"},
            r"data\[1\]\.wrapper: Input should be 'sft' or 'pretrain'",
        ),
        (
            {"prompt": "p", "reference": "r", "chosen": "o", "rejected": "x"},
            r"data\[1\]: has chosen and rejected; a row to score has one answer, as output",
        ),
        (
            {"prompt": "p", "candidates": ["o", "x"]},
            r"data\[1\]: has candidates; .* a row of prompt, reference",
        ),
        ({"prompt": "p", "reference": "r", "output": "o", "outptu": "o"}, r"data\[1\]\.outptu: Extra inputs"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(scorer, row, message):
    with pytest.raises(DataError, match=message):
        scorer.score([QUICK_START[0], row])


def test_the_scale_is_applied_where_it_is_asked_for(model_folder, scorer):
    raw = scorer.score(QUICK_START)
    with pytest.raises(PolarError, match="polar-ft calibrate"):
        scorer.score(QUICK_START, scale=True)
    file = RewardScale(centre=1.0, spread=2.0, within_spread=1.0).save(model_folder)
    try:
        assert scorer.score(QUICK_START, scale=True) == pytest.approx([(r - 1.0) / 2.0 for r in raw])
        assert scorer.score(QUICK_START) == raw
    finally:
        file.unlink()
