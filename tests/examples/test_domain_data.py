"""The catalogue's data: only the reference may tell which answer is right."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from examples.domain_rm.make_data import TOPICS, write_data
from polar_ft.data.reading import read_examples
from polar_ft.data.records import Example


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("domain"))


@pytest.fixture(scope="module", params=[0, 1], ids=["train", "held_out"])
def examples(files: tuple[Path, Path], request: pytest.FixtureRequest) -> list[Example]:
    return list(read_examples([str(files[request.param])]))


def facts_in(text: str, topic: str) -> set[str]:
    """The customer's words for the facts that the text states, in either wording."""
    return {
        answer
        for answer, entries in TOPICS[topic].facts.items()
        if any(states(text, words) for words in (answer, *entries))
    }


def states(text: str, words: str) -> bool:
    return re.search(rf"\b{words}\b", text) is not None


def test_sizes(files: tuple[Path, Path]) -> None:
    assert [len(list(read_examples([str(file)]))) for file in files] == [4000, 800]


def test_chosen_states_the_fact_of_the_reference_in_other_words(examples: list[Example]) -> None:
    for example in examples:
        chosen, rejected = example.candidates
        (fact,) = facts_in(example.reference, example.subset)
        assert not states(example.reference, fact)
        assert facts_in(chosen, example.subset) == {fact}
        assert len(facts_in(rejected, example.subset)) == 1
        assert facts_in(rejected, example.subset) != {fact}


def test_no_fact_is_told_by_another_facts_words() -> None:
    for topic in TOPICS.values():
        words = [w for answer, entries in topic.facts.items() for w in (answer, *entries)]
        assert len(words) == len(set(words)) == 3 * len(topic.facts)


def test_answers_alone_give_chance(examples: list[Example]) -> None:
    """Every set of two answers is chosen one way as often as the other: so no function of them beats 50 %."""
    seen = Counter(example.candidates for example in examples)
    assert all(seen[rejected, chosen] == n for (chosen, rejected), n in seen.items())


def test_no_product_on_both_sides_and_no_prompt_twice(files: tuple[Path, Path]) -> None:
    train, held_out = (list(read_examples([str(file)])) for file in files)
    products = [{e.id.split("/")[0] for e in part} for part in (train, held_out)]
    assert not products[0] & products[1]
    prompts = [e.prompt for e in train + held_out]
    assert len(prompts) == len(set(prompts))


def test_the_same_seed_gives_the_same_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    again = write_data(tmp_path)
    assert [a.read_bytes() for a in files] == [b.read_bytes() for b in again]
    other = write_data(tmp_path, seed=1)
    assert files[0].read_bytes() != other[0].read_bytes()


def test_more_rows_than_products_allow_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n=80000"):
        write_data(tmp_path, n_held_out=80000)
