"""What is found again, and what is not."""

from __future__ import annotations

import math
import os

import pytest

from polar_ft.evaluation.cache import CachedScorer, ScoreCache, file_sha256, input_key, model_hash, setup_key


def test_a_second_scorer_computes_only_what_is_new(tmp_path, make_example, make_scorer):
    examples = [make_example(row, candidates=("aa", "b", "aa")) for row in range(3)]
    with ScoreCache(tmp_path) as cache:
        first = CachedScorer(make_scorer(lambda _, text: len(text)), cache, "setup")
        assert first.score_examples(examples) == [[2, 1, 2]] * 3
        # The same text twice in a row is one input.
        assert (first.n_computed, first.n_from_cache) == (6, 0)
    with ScoreCache(tmp_path) as cache:
        inner = make_scorer(lambda _, text: len(text))
        second = CachedScorer(inner, cache, "setup")
        wider = [make_example(row, candidates=("ccc", "b", "aa")) for row in range(4)]
        assert second.score_examples(wider) == [[3, 1, 2]] * 4
        assert (second.n_computed, second.n_from_cache) == (3 + 3, 6)
        assert [example.candidates for example in inner.calls[0]] == [("ccc",)] * 3 + [("ccc", "b", "aa")]
        assert CachedScorer(inner, cache, "setup").score_examples(wider) == [[3, 1, 2]] * 4
        assert len(inner.calls) == 1


def test_another_set_up_finds_nothing(tmp_path, make_example, make_scorer):
    with ScoreCache(tmp_path) as cache:
        for setup in ("float32", "bfloat16"):
            scorer = CachedScorer(make_scorer(lambda *_: 1.0), cache, setup)
            scorer.score_examples([make_example(0)])
            assert scorer.n_computed == 2


@pytest.mark.parametrize("field", ["prompt", "reference", "wrapper"])
def test_every_text_is_part_of_the_key(make_example, field):
    changed = make_example(0, **{field: "pretrain" if field == "wrapper" else "other"})
    assert input_key(changed, "good") != input_key(make_example(0), "good")
    assert input_key(make_example(0), "bad") != input_key(make_example(0), "good")


def test_where_one_text_ends_and_the_next_begins_matters():
    assert setup_key(("ab", "c")) != setup_key(("a", "bc"))


def test_what_is_not_finite_is_computed_again(tmp_path):
    with ScoreCache(tmp_path) as cache:
        cache.put("s", {b"1": math.nan, b"2": math.inf, b"3": 1e300})
        assert cache.get("s", [b"1", b"2", b"3"]) == {b"3": 1e300}


def test_scores_of_the_model_that_was_not_used_for_longest_go_first(tmp_path):
    def keys(start):
        return [number.to_bytes(16, "big") for number in range(start, start + 3000)]

    with ScoreCache(tmp_path) as cache:
        for setup in ("old", "used again"):
            cache.put(setup, dict.fromkeys(keys(0), 1.0))
        cache.touch("used again")
    size = (tmp_path / "scores.sqlite").stat().st_size
    with ScoreCache(tmp_path, limit_bytes=size * 3 // 4) as cache:
        assert cache.get("old", keys(0)) == {}
        assert len(cache.get("used again", keys(0))) == 3000


def test_a_models_hash_follows_its_content(tmp_path):
    assert model_hash(tmp_path) is None
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    (tmp_path / "config.json").write_text("{}")
    with ScoreCache(tmp_path / "cache") as cache:
        first = model_hash(tmp_path, cache)
        assert first == model_hash(tmp_path, cache) == model_hash(tmp_path)
        weights.write_bytes(b"two")
        os.utime(weights, ns=(1, 1))  # another time of change, on the coarsest of clocks
        assert model_hash(tmp_path, cache) == model_hash(tmp_path) != first
    second = model_hash(tmp_path)
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert model_hash(tmp_path) not in (first, second)


def test_a_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    with ScoreCache(tmp_path) as cache:
        known = cache.sha256(file)
        assert known == file_sha256(file)
        monkeypatch.setattr("polar_ft.evaluation.cache.file_sha256", lambda _: pytest.fail("read again"))
        assert cache.sha256(file) == known
