from __future__ import annotations

import numpy as np
import pytest

from polar_ft.data.reading import read_examples
from polar_ft.errors import PolarError
from polar_ft.evaluation import evaluator
from polar_ft.evaluation.evaluator import chunks, count_tokens, score_references
from polar_ft.evaluation.figures import compute_figures
from polar_ft.evaluation.pairs import PairTable
from tests.shared_data import shared_file


def test_characters_by_hand(make_example):
    # prompt 3, reference 5, prompt again 3, candidates 4 and 1
    assert make_example(0, prompt="abc", reference="12345", candidates=("wxyz", "w")).characters == 16


def test_chunks_hold_every_row_once_longest_first(make_example, monkeypatch):
    monkeypatch.setattr(evaluator, "CHUNK_CHARS", 300)
    examples = [make_example(row, candidates=("x" * (7 * row % 50), "y")) for row in range(40)]
    parts = list(chunks(examples))
    assert len(parts) > 5
    rows = [row for part in parts for row in part]
    assert sorted(rows) == list(range(40))
    chars = [examples[row].characters for row in rows]
    assert chars == sorted(chars, reverse=True)
    # A chunk is full with the row that reaches the limit.
    sizes = [sum(examples[row].characters for row in part) for part in parts]
    assert all(300 <= size < 400 for size in sizes[:-1])


def test_nothing_to_chunk():
    assert list(chunks([])) == []


def test_every_reference_of_every_row_in_one_call(make_example, make_scorer):
    scorer = make_scorer(lambda example, candidate: len(example.reference) + len(candidate) / 10)
    examples = [make_example(0, candidates=("aa", "b")), make_example(1, candidates=("c",))]
    found = score_references(scorer, examples, [["", "xyz"], ["pq"]])
    assert found == [{"": [0.2, 0.1], "xyz": [3.2, 3.1]}, {"pq": [2.1]}]
    assert len(scorer.calls) == 1


def test_a_scorer_that_loses_an_example_is_caught(make_example, make_scorer):
    scorer = make_scorer(lambda example, candidate: 0.0)
    scorer.score_examples = lambda examples: [[0.0, 0.0]]
    with pytest.raises(ValueError, match="rewards for 1 of 2 rows"):
        score_references(scorer, [make_example(0), make_example(1)], [["r"], ["r"]])


def test_of_several_references_the_longest_counts(make_example, template):
    [tokens] = count_tokens(template, [make_example(0, references=("rr", "r" * 9))])
    # Nine bytes and <s>.
    assert (tokens.lengths.reference, tokens.cut.reference) == (10, 0)


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
    scorer = make_scorer(lambda example, candidate: len(candidate))
    found = score_references(scorer, examples, [[example.reference] for example in examples])
    scores = [row[example.reference] for row, example in zip(found, examples, strict=True)]
    lengths = [[len(text) for text in example.candidates] for example in examples]
    assert scores == lengths
    pairs = [
        (row[a], row[b]) for row, example in zip(scores, examples, strict=True) for a, b in example.pairs
    ]
    chosen, rejected = np.array(pairs).T
    figures = compute_figures(
        PairTable(chosen * 1.0, rejected * 1.0, chosen_chars=chosen, rejected_chars=rejected)
    )
    accuracy = figures.overall.accuracy_ties_half
    assert len(pairs) > 20_000
    assert accuracy == figures.baselines.longer_wins.overall
    assert figures.length.score_and_length.pearson == pytest.approx(1.0)
    # What the data's own page says of it: between 58 % and 86 %, by the choice of pairs.
    assert 0.58 <= accuracy <= 0.86
