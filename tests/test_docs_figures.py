"""The figures of the documentation are those of `benchmarks/results`, and of what the code does now."""

from __future__ import annotations

import json

import pytest

from benchmarks.docs_figures import REPOSITORY, RESULTS, example_figures, outdated, with_figures


def test_pages_say_what_the_results_have() -> None:
    rewritten = [page.relative_to(REPOSITORY) for page, _ in outdated()]
    assert not rewritten, "python benchmarks/docs_figures.py writes these again"


def test_figures_and_blocks_are_replaced() -> None:
    results = {"a.tokens": 12345, "a.lines": ["one", "two"]}
    page = "It has 9\ntokens, and\n1 or\n2\nend"
    page = with_figures(page, "has {a.tokens:,} tokens", results.__getitem__)
    assert page == "It has 12,345\ntokens, and\n1 or\n2\nend"
    page = with_figures(page, "and {a.lines} end", results.__getitem__)
    assert page == "It has 12,345\ntokens, and\none\ntwo\nend"


@pytest.mark.parametrize("page", ["no such sentence", "of 1 and of 2"])
def test_a_sentence_has_to_stand_there_once(page: str) -> None:
    with pytest.raises(ValueError, match=r"is there [02] times"):
        with_figures(page, "of {a.tokens:,}", {"a.tokens": 1}.__getitem__)


def test_the_example_data_gives_the_figures_of_its_file() -> None:
    """Where this fails and the change is meant: python benchmarks/docs_figures.py --measure."""
    counted = json.loads(json.dumps(example_figures()))
    assert counted == json.loads((RESULTS / "example_data.json").read_text(encoding="utf-8"))
