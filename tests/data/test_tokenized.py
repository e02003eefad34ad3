"""The tokenization cache: what it contains, when it is made again, and what is in it only once."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from polar_ft.data import tokenized
from polar_ft.data.group_file import GroupReader
from polar_ft.data.reading import as_sources
from polar_ft.data.tokenized import TokenizedGroups, tokenize
from polar_ft.errors import DataError, PolarError
from polar_ft.groups import TokenGroup
from polar_ft.template import PolarTemplate
from tests.data.rows import pair, ranked
from tests.encoding import encode, ids_of


@pytest.fixture
def template(tokenizer_folder) -> PolarTemplate:
    return PolarTemplate.from_pretrained(tokenizer_folder, max_length=256, max_response_length=64)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def sequences(group: TokenGroup) -> list[list[int]]:
    return [[*group.prefix.tolist(), *branch.tolist()] for branch in group.branches]


def all_sequences(groups: TokenizedGroups) -> list[list[list[int]]]:
    return [sequences(groups.group(index)) for index in range(len(groups))]


def test_groups_are_what_the_template_encodes(template, cache, write_rows):
    rows = [pair(prompt=f"{number} + 2?") for number in range(3)]
    file = write_rows("rows.jsonl", rows)
    groups = tokenize(as_sources(file), template, cache)
    assert all_sequences(groups) == [
        ids_of(encode(template, row["prompt"], row["reference"], [row["chosen"], row["rejected"]]))
        for row in rows
    ]
    for index in range(3):
        group = groups.group(index)
        assert group.pairs.tolist() == [[0, 1]]
        assert groups.source(index) == f"{file}:{index + 1}"
        assert groups.pairs[index] == 1
        assert groups.tokens["tree"][index] == group.tree_tokens()
        assert groups.tokens["flat"][index] == sum(map(len, sequences(group)))
    assert (groups.summary.rows, groups.summary.pairs, groups.summary.groups) == (3, 3, 3)
    assert groups.summary.flat_tokens == groups.tokens["flat"].sum()


def test_second_start_does_not_tokenize(template, cache, write_rows, monkeypatch):
    sources = as_sources(write_rows("rows.jsonl", [pair()]))
    first = tokenize(sources, template, cache)
    monkeypatch.setattr(PolarTemplate, "encode", None)
    second = tokenize(sources, template, cache, seed=7)  # without reference_dropout the seed decides nothing
    assert all_sequences(second) == all_sequences(first)
    assert second.summary == first.summary


def _append_row(file: Path) -> None:
    with file.open("a") as out:
        out.write(f"{json.dumps(pair(prompt='3 + 3?'))}\n")


def _rewrite_at_another_time(file: Path) -> None:
    file.write_text(file.read_text().replace("four", "FOUR"))  # same size
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize(
    "change", [_append_row, _rewrite_at_another_time], ids=["another size", "another time of change"]
)
def test_changed_file_is_tokenized_again(template, cache, write_rows, change):
    file = write_rows("rows.jsonl", [pair()])
    before = all_sequences(tokenize(as_sources(file), template, cache))
    change(file)
    assert all_sequences(tokenize(as_sources(file), template, cache)) != before


@pytest.mark.parametrize("changes", [{"max_length": 255}, {"max_response_length": 63}, {"separator": "</s>"}])
def test_changed_template_is_another_cache(template, tokenizer_folder, cache, write_rows, changes):
    sources = as_sources(write_rows("rows.jsonl", [pair()]))
    limits = {"max_length": 256, "max_response_length": 64}
    changed = PolarTemplate.from_pretrained(tokenizer_folder, **(limits | changes))
    assert tokenize(sources, template, cache).folder != tokenize(sources, changed, cache).folder


def test_changed_tokenizer_is_another_cache(template, cache, write_rows):
    spec = json.loads(template.tokenizer_json)
    spec["model"]["merges"] = []
    changed = PolarTemplate(json.dumps(spec), max_length=256, max_response_length=64)
    sources = as_sources(write_rows("rows.jsonl", [pair(prompt="What is the capital of France?")]))
    assert all_sequences(tokenize(sources, template, cache)) != all_sequences(
        tokenize(sources, changed, cache)
    )


def test_pairs_identical_after_cutting_are_left_out_and_counted(tokenizer_folder, cache, write_rows):
    template = PolarTemplate.from_pretrained(tokenizer_folder, max_length=64, max_response_length=6)
    rows = [
        pair(prompt="kept"),
        pair(prompt="cut", chosen="0123456789 yes", rejected="0123456789 no"),
        pair(prompt="given", chosen="same", rejected="same"),
    ]
    groups = tokenize(as_sources(write_rows("rows.jsonl", rows)), template, cache)
    assert len(groups) == 1
    assert groups.summary.identical_pairs == 2
    assert groups.summary.candidates_cut == 2
    assert "left out: 2 pairs" in " ".join(groups.summary.lines())


def test_data_without_a_pair_is_an_error(template, cache, write_rows):
    file = write_rows("rows.jsonl", [pair(chosen="same", rejected="same")])
    for _ in range(2):  # also where it comes from the cache
        with pytest.raises(PolarError, match=r"rows\.jsonl: 1 rows gave no pair"):
            tokenize(as_sources(file), template, cache)


def test_rows_of_one_prompt_and_reference_are_one_group(template, cache, write_rows):
    rows = [
        pair(chosen="four", rejected="five"),
        pair(prompt="another"),
        pair(chosen="4.", rejected="four", weight=3.0),
        pair(wrapper="pretrain"),
        pair(reference="another"),
    ]
    groups = tokenize(as_sources(write_rows("rows.jsonl", rows)), template, cache)
    assert len(groups) == 4
    merged = groups.group(0)
    assert sequences(merged) == ids_of(encode(template, "2 + 2?", "4", ["four", "five", "4."]))
    assert merged.pairs.tolist() == [[0, 1], [2, 0]]
    assert merged.weights.tolist() == [1.0, 3.0]
    assert groups.weights.tolist() == [4.0, 1.0, 1.0, 1.0]


def test_ranked_rows(template, cache, write_rows):
    # The best becomes the reference; of 3, 2, 2, 1 the pair of equals is a tie.
    groups = tokenize(as_sources(write_rows("rows.jsonl", [ranked(9, 3, 2, 2, 1)])), template, cache)
    (group,) = [groups.group(index) for index in range(len(groups))]
    candidates = [f"text {number}" for number in (1, 2, 3, 4)]
    assert sequences(group) == ids_of(encode(template, "Which?", "text 0", candidates))
    chosen_and_rejected = group.pairs.tolist()
    assert chosen_and_rejected[0] == [0, 1]
    assert chosen_and_rejected[-1][1] == 3
    assert groups.summary.ties == 1
    assert groups.summary.pairs == len(chosen_and_rejected) == 2


def test_a_candidate_without_a_pair_is_not_computed(template, cache, write_rows):
    """A becomes the reference, B and C are equal: what is left is the other row's pair."""
    responses = [("A", 3), ("B", 1), ("C", 1)]
    row = ranked(responses=[{"content": text, "score": score} for text, score in responses])
    other = pair(prompt=row["prompt"], reference="A", chosen="C", rejected="D")
    groups = tokenize(as_sources(write_rows("rows.jsonl", [row, other])), template, cache)
    assert (len(groups), groups.summary.rows, groups.summary.ties) == (1, 2, 1)
    assert sequences(groups.group(0)) == ids_of(encode(template, row["prompt"], "A", ["C", "D"]))


def test_cuts_of_a_group_are_counted_by_row(template, cache, write_rows):
    long = "far too long " * 100
    rows = [pair(prompt=long, reference=long, chosen=long, rejected=f"{number}") for number in range(3)]
    summary = tokenize(as_sources(write_rows("rows.jsonl", rows)), template, cache).summary
    assert (summary.groups, summary.rows, summary.pairs) == (1, 3, 3)
    assert (summary.prompts_cut, summary.references_cut, summary.candidates_cut) == (3, 3, 3)


def test_sources_with_weights_limits_and_margins(template, cache, write_rows):
    first = write_rows("first.jsonl", [pair(prompt="1", weight=2.0, margin=0.5), pair(prompt="2")])
    second = write_rows("second.jsonl", [pair(prompt=str(number)) for number in range(3, 9)])
    sources = as_sources([{"path": str(first), "weight": 0.5}, {"path": str(second), "max_samples": 2}])
    groups = tokenize(sources, template, cache)
    loaded = [groups.group(index) for index in range(len(groups))]
    assert [group.weights.tolist() for group in loaded] == [[1.0], [0.5], [1.0], [1.0]]
    assert [group.margins.tolist() for group in loaded] == [[0.5], [0.0], [0.0], [0.0]]
    assert [groups.source(index) for index in (1, 2)] == [f"{first}:2", f"{second}:1"]


def test_reference_dropout(template, cache, write_rows):
    rows = [pair(prompt=str(number)) for number in range(400)]
    sources = as_sources(write_rows("rows.jsonl", rows))
    groups = tokenize(sources, template, cache, reference_dropout=0.25, seed=1)

    def prompts_without_reference(groups: TokenizedGroups) -> list[int]:
        return [
            number
            for number, found in enumerate(all_sequences(groups))
            if found == ids_of(encode(template, str(number), "", ["four", "five"]))
        ]

    dropped = prompts_without_reference(groups)
    assert groups.summary.references_dropped == len(dropped)
    assert 60 < len(dropped) < 140  # 100 expected, four standard deviations of 8.7 and more
    assert f"{len(dropped)} rows without their reference" in " ".join(groups.summary.lines())
    # The same again where nothing is cached; others with another seed.
    again = tokenize(sources, template, cache.with_name("other"), reference_dropout=0.25, seed=1)
    assert prompts_without_reference(again) == dropped
    other = tokenize(sources, template, cache, reference_dropout=0.25, seed=2)
    assert prompts_without_reference(other) != dropped


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 3)])
def test_reference_dropout_of_none_and_of_all(template, cache, write_rows, share, dropped):
    rows = [pair(prompt=str(number)) for number in range(3)]
    sources = as_sources(write_rows("rows.jsonl", rows))
    groups = tokenize(sources, template, cache, reference_dropout=share)
    assert groups.summary.references_dropped == dropped


def test_reference_dropout_is_a_share(template, cache, write_rows):
    with pytest.raises(PolarError, match="reference_dropout is a share between 0 and 1, not 25"):
        tokenize(as_sources(write_rows("rows.jsonl", [pair()])), template, cache, reference_dropout=25)


def test_bad_row_leaves_no_cache_behind(template, cache, write_rows):
    file = write_rows("rows.jsonl", [pair(), pair(chosen=3)])
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        tokenize(as_sources(file), template, cache)
    write_rows("rows.jsonl", [pair()])
    assert len(tokenize(as_sources(file), template, cache)) == 1


def test_reference_that_leaves_no_room_is_named_by_its_line(tokenizer_folder, cache, write_rows):
    template = PolarTemplate.from_pretrained(tokenizer_folder, max_length=40, max_response_length=18)
    file = write_rows("rows.jsonl", [pair(), pair(reference="0123456789 " * 9)])
    with pytest.raises(PolarError, match=r"rows\.jsonl:2: a reference of 18 tokens leaves the prompt"):
        tokenize(as_sources(file), template, cache)


def test_many_batches(template, cache, write_rows, monkeypatch):
    monkeypatch.setattr(tokenized, "BATCH", 4)
    rows = [pair(prompt=str(number // 2), rejected=str(number)) for number in range(30)]
    groups = tokenize(as_sources(write_rows("rows.jsonl", rows)), template, cache)
    assert len(groups) == 15
    for index in (0, 7, 14):
        expected = ids_of(encode(template, str(index), "4", ["four", str(2 * index), str(2 * index + 1)]))
        assert sequences(groups.group(index)) == expected


def test_only_groups_of_several_batches_are_merged(template, cache, write_rows, monkeypatch):
    """Batches of two rows: "again" comes in the first and the third, the others in one each."""
    monkeypatch.setattr(tokenized, "BATCH", 2)
    prompts = ["again", "once", "twice", "twice", "again", "last"]
    rows = [pair(prompt=prompt, rejected=str(number)) for number, prompt in enumerate(prompts)]
    groups = tokenize(as_sources(write_rows("rows.jsonl", rows)), template, cache)
    # Rows of the two files: as they were tokenized, and the merged ones.
    tokenized_rows = GroupReader([groups.folder / "groups.arrow"])
    merged_rows = GroupReader([groups.folder / "merged.arrow"])
    assert [tokenized_rows.source(number)[-1] for number in range(5)] == ["1", "2", "3", "5", "6"]
    assert merged_rows.source(0).endswith("rows.jsonl:1")
    with pytest.raises(IndexError):
        merged_rows.source(1)
    # The order of groups is that of their first rows.
    expected = {"again": ["four", "0", "4"], "once": ["four", "1"], "twice": ["four", "2", "3"]}
    expected["last"] = ["four", "5"]
    assert all_sequences(groups) == [
        ids_of(encode(template, prompt, "4", candidates)) for prompt, candidates in expected.items()
    ]
    assert [groups.source(index)[-1] for index in range(4)] == ["1", "2", "3", "6"]
    assert groups.group(0).pairs.tolist() == [[0, 1], [0, 2]]
    assert groups.pairs.tolist() == [2, 1, 2, 1]
    for index in range(4):
        group = groups.group(index)
        assert groups.tokens["tree"][index] == group.tree_tokens()
        assert groups.attended["tree"][index] == group.attended("tree")
    assert groups.summary.pairs == 6


def test_the_cache_does_not_depend_on_the_batches(template, tmp_path, write_rows, monkeypatch):
    rows = [pair(prompt=str(number % 7), rejected=str(number % 5), weight=number + 1) for number in range(40)]
    sources = as_sources(write_rows("rows.jsonl", rows))

    def pairs_by_group(batch: int) -> list[list[tuple[list[int], list[int], float]]]:
        monkeypatch.setattr(tokenized, "BATCH", batch)
        groups = tokenize(sources, template, tmp_path / str(batch))
        loaded = [groups.group(index) for index in range(len(groups))]
        return [
            [
                (found[chosen], found[rejected], weight)
                for (chosen, rejected), weight in zip(group.pairs, group.weights.tolist(), strict=True)
            ]
            for group in loaded
            for found in [sequences(group)]
        ]

    together = pairs_by_group(100)
    assert len(together) == 7
    for batch in (1, 3, 8):
        assert pairs_by_group(batch) == together


def test_an_error_of_a_later_batch_is_named_by_its_line(tokenizer_folder, cache, write_rows, monkeypatch):
    """Rows 1 and 3 are one group, so that the failing group's number is not its row's."""
    monkeypatch.setattr(tokenized, "BATCH", 4)
    template = PolarTemplate.from_pretrained(tokenizer_folder, max_length=40, max_response_length=18)
    rows = [pair(prompt=str(number)) for number in range(4)]
    rows += [pair(), pair(prompt="b"), pair(chosen="4"), pair(reference="0123456789 " * 9)]
    file = write_rows("rows.jsonl", rows)
    with pytest.raises(PolarError, match=r"rows\.jsonl:8: a reference of 18 tokens leaves the prompt"):
        tokenize(as_sources(file), template, cache)


def test_identical_pairs_of_a_ranked_row_go_and_the_others_stay(tokenizer_folder, cache, write_rows):
    """The best becomes the reference; the next two are the same once they are cut, the last one is not."""
    template = PolarTemplate.from_pretrained(tokenizer_folder, max_length=64, max_response_length=6)
    texts = [("best", 4), ("0123456789 yes", 3), ("0123456789 no", 2), ("x", 1)]
    row = ranked(responses=[{"content": text, "score": score} for text, score in texts])
    groups = tokenize(as_sources(write_rows("rows.jsonl", [row])), template, cache)
    assert (groups.summary.identical_pairs, groups.summary.pairs) == (1, 1)
    group = groups.group(0)
    assert sequences(group) == ids_of(encode(template, row["prompt"], "best", ["0123456789", "x"]))
    assert group.pairs.tolist() == [[0, 1]]


def test_groups_go_to_workers_of_a_data_loader(template, cache, write_rows):
    groups = tokenize(as_sources(write_rows("rows.jsonl", [pair()])), template, cache)
    assert all_sequences(pickle.loads(pickle.dumps(groups))) == all_sequences(groups)


def _tokenize_and_count(folder, file, cache, results, die=False):
    """In its own process: tokenizes and reports how many batches it encoded, or dies while it writes."""
    template = PolarTemplate.from_pretrained(folder, max_length=256, max_response_length=64)
    encode_groups = PolarTemplate.encode
    batches = []

    def counted(self, batch, **settings):
        batches.append(len(batch))
        return encode_groups(self, batch, **settings)

    PolarTemplate.encode = counted
    if die:
        tokenized._merge_repeated = lambda *_: os._exit(9)
    groups = tokenize(as_sources(file), template, cache)
    results.put((len(batches), len(groups)))


def test_killed_while_writing(tokenizer_folder, template, cache, write_rows):
    file = write_rows("rows.jsonl", [pair()])
    processes = multiprocessing.get_context("spawn")
    arguments = (tokenizer_folder, file, cache, processes.SimpleQueue(), True)
    killed = processes.Process(target=_tokenize_and_count, args=arguments)
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    assert list(cache.glob("*.partial"))
    groups = tokenize(as_sources(file), template, cache)
    assert len(groups) == 1
    assert not list(cache.glob("*.partial"))


def test_two_processes_at_once_write_one_cache(tokenizer_folder, cache, write_rows):
    file = write_rows("rows.jsonl", [pair(prompt=str(number)) for number in range(50)])
    processes = multiprocessing.get_context("spawn")
    results = processes.SimpleQueue()
    both = [
        processes.Process(target=_tokenize_and_count, args=(tokenizer_folder, file, cache, results))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    counts = sorted(results.get() for _ in both)
    assert [groups for _, groups in counts] == [50, 50]
    assert [batches for batches, _ in counts] == [0, 1]
