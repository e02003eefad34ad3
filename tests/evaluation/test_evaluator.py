from __future__ import annotations

import pytest

from polar_ft.data.reading import read_examples
from polar_ft.errors import PolarError
from polar_ft.evaluation import evaluator
from polar_ft.evaluation.baselines import length_baselines
from polar_ft.evaluation.evaluator import count_tokens, example_chars, score_all
from polar_ft.evaluation.metrics import summarize
from tests.shared_data import shared_file


def test_example_chars_by_hand(make_example):
    # prompt 3, reference 5, prompt again 3, candidates 4 and 1
    assert example_chars(make_example(0, prompt="abc", reference="12345", candidates=("wxyz", "w"))) == 16


def test_scores_come_back_in_order_longest_scored_first(make_example, make_scorer, monkeypatch):
    monkeypatch.setattr(evaluator, "CHUNK_CHARS", 300)
    examples = [make_example(row, candidates=("x" * (7 * row % 50), "y")) for row in range(40)]
    scorer = make_scorer(lambda example, candidate: len(candidate))
    done = []
    scores = score_all(scorer, examples, on_chunk=done.extend)
    assert scores == [[7 * row % 50, 1] for row in range(40)]
    assert len(scorer.calls) > 5
    scored = [example for call in scorer.calls for example in call]
    assert done == scored
    assert sorted(scored, key=lambda example: example.id) == sorted(examples, key=lambda example: example.id)
    chars = [example_chars(example) for example in scored]
    assert chars == sorted(chars, reverse=True)


def test_nothing_to_score(make_scorer):
    assert score_all(make_scorer(lambda example, candidate: 0.0), []) == []


def test_a_scorer_that_loses_an_example_is_caught(make_example, make_scorer):
    scorer = make_scorer(lambda example, candidate: 0.0)
    scorer.score_examples = lambda examples: [[0.0, 0.0]]
    with pytest.raises(ValueError, match="shorter"):
        score_all(scorer, [make_example(0), make_example(1)])


def test_tokens_of_each_field_and_what_was_cut(make_example, template):
    # One token a byte and <s>. Limits: a sequence 400, a response 64, so the prompt's budget beside a
    # reference of 10 + 1 tokens is (400 − 4 − 11 − 64) // 2 = 160 tokens, <s> included.
    [tokens] = count_tokens(
        template,
        [make_example(0, prompt="p" * 200, reference="r" * 10, candidates=("c" * 70, "short"))],
    )
    assert (tokens.lengths.prompt, tokens.lengths.reference, tokens.lengths.candidates) == (201, 11, (71, 6))
    assert (tokens.cut.prompt, tokens.cut.reference, tokens.cut.candidates) == (201 - 160, 0, (71 - 64, 0))


def test_a_row_that_does_not_fit_is_named(make_example, tight_template):
    examples = [make_example(row) for row in range(5)]
    examples[3] = make_example(3, reference="r" * 64, source="held_out.jsonl:4")
    with pytest.raises(PolarError, match=r"^held_out\.jsonl:4: .*max_length"):
        count_tokens(tight_template, examples)


def test_scoring_by_length_gives_the_length_baseline_on_real_answers(make_scorer):
    """On the full AlpacaEval file a scorer that counts characters is the "longer wins" baseline."""
    examples = list(read_examples(shared_file("alpaca_eval_ranked.jsonl.gz"), pairing="all"))
    examples = [example for example in examples if example.pairs]
    scores = score_all(make_scorer(lambda example, candidate: len(candidate)), examples)
    lengths = [[len(text) for text in example.candidates] for example in examples]
    assert scores == lengths
    pairs = [
        (row[a], row[b]) for row, example in zip(scores, examples, strict=True) for a, b in example.pairs
    ]
    chosen, rejected = zip(*pairs, strict=True)
    baselines = length_baselines(chosen, rejected, chosen_scores=chosen, rejected_scores=rejected)
    accuracy = summarize(chosen, rejected).overall.accuracy_ties_half
    assert len(pairs) > 20_000
    assert accuracy == baselines.longer_wins.overall
    # What the data's own page says of it: between 58 % and 86 %, by the choice of pairs.
    assert 0.58 <= accuracy <= 0.86
