"""The inputs hold what they say, and are the same every time."""

from __future__ import annotations

from collections import defaultdict

import pytest

from polar_ft.parity.inputs import parity_inputs
from polar_ft.template import REWARD_TOKEN, SEPARATOR_TOKEN, PolarTemplate
from tests.encoding import ids_of


@pytest.fixture(scope="module")
def by_kind(template: PolarTemplate):
    """(input, encoded) of each kind."""
    inputs = parity_inputs(template, 55)
    found = defaultdict(list)
    for item, encoded in zip(inputs, template.encode([i.group() for i in inputs]), strict=True):
        found[item.kind].append((item, encoded))
    return found


def test_the_same_every_time(template):
    assert parity_inputs(template, 30) == parity_inputs(template, 30)
    # More of them begin with the same ones.
    assert parity_inputs(template, 40)[:30] == parity_inputs(template, 30)


def test_eleven_kinds_in_turn(by_kind):
    assert len(by_kind) == 11
    assert all(len(found) == 5 for found in by_kind.values())
    assert all(len(item.candidates) == 4 for found in by_kind.values() for item, _ in found)


def test_each_kind_is_what_its_name_says(by_kind):
    assert all(item.reference == "" for item, _ in by_kind["empty reference"])
    assert all("" in item.candidates for item, _ in by_kind["empty candidate"])
    assert all(item.wrapper == "pretrain" for item, _ in by_kind["wrapper pretrain"])
    assert max(len(item.prompt) for item, _ in by_kind["several turns"]) == 6
    assert all("\u4e00" <= item.prompt[5] <= "\u9fff" for item, _ in by_kind["Chinese"])
    assert all(encoded.cut.prompt > 0 for _, encoded in by_kind["cut prompt"])
    assert all(encoded.cut.reference > 0 for _, encoded in by_kind["cut response"])
    assert all(encoded.cut.candidates[0] > 0 for _, encoded in by_kind["cut response"])


def test_only_what_should_be_cut_is_cut(by_kind):
    for kind in ("short", "long"):
        assert not any(bool(encoded.cut) for _, encoded in by_kind[kind]), kind


def test_lengths_go_from_a_few_tokens_to_the_limit(by_kind, template):
    lengths = [len(ids) for found in by_kind.values() for _, encoded in found for ids in ids_of(encoded)]
    assert min(lengths) < 32
    assert 0.7 * template.max_length < max(lengths) <= template.max_length


def test_spelled_control_tokens_are_text(by_kind, template):
    found = by_kind["spelled control tokens"]
    spelled = [
        name
        for item, _ in found
        for text in (item.prompt, item.reference, *item.candidates)
        for name in (SEPARATOR_TOKEN, REWARD_TOKEN)
        if name in text
    ]
    assert set(spelled) == {SEPARATOR_TOKEN, REWARD_TOKEN}
    for _, encoded in found:
        for ids in ids_of(encoded):
            assert ids.count(template.separator_id) == 1
            assert ids.count(template.reward_token_id) == 1


def test_one_row_a_candidate(by_kind):
    item, _ = by_kind["several turns"][0]
    assert [row["output"] for row in item.rows()] == list(item.candidates)
    group = item.group()
    assert group.prompt == "\n".join(message["content"] for message in item.prompt)
    assert group.candidates[0] == group.reference
