"""Every format: its documented row converts and is read back, and another layout is named in an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polar_ft.data.converters import CONVERTERS, convert_file
from polar_ft.data.converters.format import Layout
from polar_ft.data.lint import check
from polar_ft.data.reading import as_sources, read_examples, read_rows
from polar_ft.errors import PolarError
from tests.data.converters.published import FORMATS, published, rmb_pairs
from tests.data.rows import WriteRows


def source_rows(name: str) -> list[dict[str, Any]]:
    if name.startswith("rmb") and name != "rmb-bon":  # a reference and a pair need three answers
        return rmb_pairs([("4", "5"), ("four", "5")], {"4": 4.5, "four": 4.0, "5": 2.0})
    if name == "trl-unpaired":
        return [published(name), published(name, completion="5", label=False)]
    if name == "helpsteer2-ratings":  # one answer a row
        return [published(name), published(name, response="5", helpfulness=1)]
    return [published(name)]


def test_there_is_a_row_of_every_format() -> None:
    assert sorted(CONVERTERS) == FORMATS


# What the documented row gives: reference, and for each pair (chosen, rejected), of all the pairs there are.
GIVES = {
    "ranked": ("4", [("four", "5")]),
    "hh-rlhf": ("", [("4", "5")]),
    "chat-pairs": ("", [("4", "5")]),
    "ultrafeedback": ("4", [("four", "5")]),
    "ultrafeedback-binarized": ("", [("4", "5")]),
    "helpsteer2": ("", [("4", "5")]),
    "helpsteer2-ratings": ("", [("4", "5")]),
    "helpsteer3": ("", [("4", "5")]),
    "nectar": ("4", [("four", "5")]),
    "pku-saferlhf": ("", [("4", "5")]),
    "arena": ("", [("4", "5")]),
    "rewardbench": ("", [("4", "5")]),
    "rewardbench-2": ("", [("4", "3"), ("4", "5"), ("4", "22")]),
    "rmb": ("4", [("four", "5")]),
    "rmb-polar": ("4", [("four", "5")]),
    "rmb-bon": ("", [("4", "5"), ("4", "22")]),
    "judgebench": ("", [("4", "5")]),
    "tulu": ("", [("4", "5")]),
    "llama-factory-alpaca": ("", [("4", "5")]),
    "llama-factory-sharegpt": ("", [("4", "5")]),
    "llama-factory-v1": ("", [("4", "5")]),
    "ms-swift": ("", [("4", "5")]),
    "openai": ("", [("4", "5")]),
    "label-studio": ("", [("4", "5")]),
    "argilla": ("", [("4", "5")]),
    "openrlhf": ("", [("4", "5")]),
    "trl": ("", [("4", "5")]),
    "trl-unpaired": ("", [("4", "5")]),
}


@pytest.mark.parametrize("name", sorted(GIVES))
def test_the_documented_row_is_read_back(name: str, write_rows: WriteRows, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    done = convert_file(name, str(write_rows("in.jsonl", source_rows(name))), target)
    assert (done.problems, done.pairs + done.ranked) == ([], 1)
    (example,) = read_examples(target, pairing="all")
    pairs = [(example.candidates[a], example.candidates[b]) for a, b in example.pairs]
    assert (example.prompt, example.reference, pairs) == ("2 + 2?", *GIVES[name])
    report = check(as_sources(target))
    assert (report.rows, report.bad_rows) == (1, 0)


def test_rm_bench_gives_nine_comparisons_of_known_styles(write_rows: WriteRows, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    convert_file("rm-bench", str(write_rows("in.jsonl", [published("rm-bench")])), target)
    (example,) = read_examples(target, pairing="all")
    style = [info["style"] for info in example.candidate_info]
    styles = ["concise", "detailed_plain", "detailed_markdown"]
    assert style == styles * 2
    assert sorted((style[a], style[b]) for a, b in example.pairs) == sorted(
        (a, b) for a in styles for b in styles
    )
    assert all("4" in example.candidates[a] and "5" in example.candidates[b] for a, b in example.pairs)
    assert (example.id, example.subset, example.extra["benchmark"]) == ("math-1", "math", "rm-bench")
    assert check(as_sources(target)).bad_rows == 0


SAME_LAYOUT = {"ultrafeedback-binarized": "chat-pairs", "rmb-polar": "rmb"}


@pytest.mark.parametrize(
    "name", sorted(set(FORMATS) - {"ranked"})
)  # its rows are ours: all their fields count
def test_no_field_of_the_input_changes_what_was_converted(
    name: str, write_rows: WriteRows, tmp_path: Path
) -> None:
    def converted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        convert_file(name, str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl")
        return [row for _, row in read_rows(tmp_path / "out.jsonl")]  # type: ignore[misc]

    rows = source_rows(name)
    before = converted(rows)
    fields = {cls.LAYOUT: cls.model_fields for cls in Layout.__subclasses__()}
    known = {*rows[0], *fields.get(SAME_LAYOUT.get(name, name), ())}
    texts = ("prompt", "reference", "references", "chosen", "rejected", "responses")
    others = {key: f"another {key}" for key in (*before[0], *texts) if key not in known and key != "id"}
    assert others
    for row, was in zip(converted([others | row for row in rows]), before, strict=True):
        assert {key: row[key] for key in was} == was
        assert {row[f"source_{key}"] for key in others} == set(others.values())
        assert row.keys() == was.keys() | {f"source_{key}" for key in others}


def of_one_domain(**changes: Any) -> dict[str, Any]:
    """A row of RM-Bench's data/chat_filtered.json, which has no domain, but a subset of RewardBench."""
    row = published("rm-bench", id=8, subset="alpacaeval", error_key="keen", error="keen on", **changes)
    return {key: value for key, value in row.items() if key != "domain"}


def test_rm_bench_takes_the_domain_from_the_name_of_the_file(write_rows: WriteRows, tmp_path: Path) -> None:
    folder, target = tmp_path / "data", tmp_path / "out.jsonl"
    folder.mkdir()
    write_rows("data/chat_filtered.jsonl", [of_one_domain()])
    write_rows("data/safety-refuse_filtered.jsonl", [of_one_domain(), published("rm-bench")])
    assert convert_file("rm-bench", str(folder), target).ranked == 3
    rows = [row for _, row in read_rows(target)]
    found = [(row["subset"], row.get("source_subset"), row.get("error")) for row in rows]  # type: ignore[union-attr]
    assert found == [
        ("chat", "alpacaeval", "keen on"),
        ("safety-refuse", "alpacaeval", "keen on"),
        ("math", None, None),  # a row's own domain comes first
    ]


def test_rm_bench_is_told_the_domain(write_rows: WriteRows, tmp_path: Path) -> None:
    source, target = str(write_rows("mine.jsonl", [of_one_domain()])), tmp_path / "out.jsonl"
    with pytest.raises(PolarError, match="domain: is missing, and the file's name does not say it"):
        convert_file("rm-bench", source, target)
    with pytest.raises(
        PolarError,
        match="--domain safety: the format rm-bench has chat, code, math, safety-refuse, safety-resp",
    ):
        convert_file("rm-bench", source, target, options={"domain": "safety"})
    convert_file("rm-bench", source, target, options={"domain": "code"})
    assert [row["subset"] for _, row in read_rows(target)] == ["code"]  # type: ignore[index]


LAYOUTS = sorted(set(FORMATS) - {"ranked", "hh-rlhf"})  # these two say in their own words what they expect
REQUIRED = {
    "chat-pairs": ["chosen", "rejected"],
    "ultrafeedback": ["instruction", "completions"],
    "ultrafeedback-binarized": ["chosen", "rejected"],
    "helpsteer2": ["prompt", "response_1", "response_2", "preference_strength"],
    "helpsteer2-ratings": ["prompt", "response", "helpfulness"],
    "helpsteer3": ["context", "response1", "response2", "overall_preference"],
    "nectar": ["prompt", "answers"],
    "pku-saferlhf": ["prompt", "response_0", "response_1", "better_response_id"],
    "arena": ["conversation_a", "conversation_b", "winner"],
    "rewardbench": ["prompt", "chosen", "rejected", "subset"],
    "rewardbench-2": ["id", "prompt", "chosen", "rejected", "subset"],
    "rm-bench": ["id", "prompt", "chosen", "rejected"],
    "rmb": ["pair_uid", "conversation_input", "chosen", "reject", "category_path"],
    "rmb-polar": ["pair_uid", "conversation_input", "chosen", "reject", "category_path"],
    "rmb-bon": ["bon_uid", "conversation_input", "bon_best", "loser_list", "category_path"],
    "judgebench": ["pair_id", "source", "question", "response_A", "response_B", "label"],
    "tulu": ["chosen", "rejected"],
    "llama-factory-alpaca": ["instruction", "chosen", "rejected"],
    "llama-factory-sharegpt": ["conversations", "chosen", "rejected"],
    "llama-factory-v1": ["chosen_messages", "rejected_messages"],
    "ms-swift": ["messages"],
    "openai": ["input", "preferred_output", "non_preferred_output"],
    "label-studio": ["data", "annotations"],
    "argilla": ["fields", "responses"],
    "openrlhf": ["chosen", "rejected"],
    "trl": ["chosen", "rejected"],
    "trl-unpaired": ["prompt", "completion", "label"],
}
# Formats with the layout of another one.
SAME_LAYOUT = dict.fromkeys(("ultrafeedback-binarized", "tulu", "openrlhf", "trl"), "chat-pairs")
SAME_LAYOUT["rmb-polar"] = "rmb"


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in LAYOUTS for field in REQUIRED[name]])
def test_a_missing_or_changed_field_is_named(
    name: str, field: str, write_rows: WriteRows, tmp_path: Path
) -> None:
    layout = SAME_LAYOUT.get(name, name)
    renamed = {"renamed_field": None} | published(name)  # first: of many fields the message has twelve
    renamed["renamed_field"] = renamed.pop(field)
    changed = published(name, **{field: 3.5})
    if field in ("preference_strength", "overall_preference", "helpfulness"):
        changed = published(name, **{field: "much better"})
    for row, message in (
        (
            renamed,
            rf"is not laid out as {layout}: {field} missing; expected .*{field}.* found .*renamed_field",
        ),
        (changed, rf"in.jsonl:1: {field}: is .*, but {field} is .* in {layout} \(.*has the layout changed\?"),
    ):
        with pytest.raises(PolarError, match=message):
            convert_file(name, str(write_rows("in.jsonl", [row])), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "rm-bench",
            {"chosen": ["4", "It is 4."]},
            "chosen: is a list of 2, but chosen is a list of three texts",
        ),
        (
            "rewardbench-2",
            {"rejected": []},
            "rejected: is a list of 0, but rejected is a list of wrong answers",
        ),
        ("rewardbench-2", {"rejected": ["3", 5]}, r"rejected\[1\]: is the number 5, but"),
        ("judgebench", {"label": "A=B"}, 'label: is the string \'A=B\', but label is "A>B" or "B>A"'),
        ("rmb", {"chosen": {"llm_name": "m", "score": 4.0}}, "chosen: is an object .* without 'answer', but"),
        (
            "rmb",
            {"conversation_input": [{"role": "user"}]},
            r"conversation_input\[0\]: is .* without 'content'",
        ),
        (
            "helpsteer3",
            {"context": [{"role": "user", "content": None}]},
            r"context\[0\].content: is null, but",
        ),
        ("ultrafeedback", {"completions": [{"model": "a"}]}, r"completions\[0\]: .* without 'response', but"),
        (
            "chat-pairs",
            {"chosen": [{"role": "user", "content": 1}]},
            r"chosen\[0\].content: is the number 1, but",
        ),
    ],
)
def test_what_is_wrong_deep_in_a_row_is_named(
    name: str, change: dict[str, Any], message: str, write_rows: WriteRows, tmp_path: Path
) -> None:
    with pytest.raises(PolarError, match=message):
        convert_file(name, str(write_rows("in.jsonl", [published(name, **change)])), tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("name", "given", "hint"),
    [
        ("rewardbench-2", "rm-bench", "this looks like rm-bench"),
        ("rm-bench", "rewardbench-2", "this looks like rewardbench-2"),
        ("rmb", "rmb-bon", "this looks like rmb-bon"),
        ("rmb-bon", "rmb", "this looks like rmb or rmb-polar"),
        ("judgebench", "hh-rlhf", "this looks like hh-rlhf"),
        (
            "ultrafeedback",
            "ultrafeedback-binarized",
            "this looks like chat-pairs or ultrafeedback-binarized or tulu or trl or openrlhf",
        ),
    ],
)
def test_data_of_another_format_is_recognised(
    name: str, given: str, hint: str, write_rows: WriteRows, tmp_path: Path
) -> None:
    with pytest.raises(PolarError, match=rf"(is not laid out as|has the layout changed).* — {hint}$"):
        convert_file(name, str(write_rows("in.jsonl", [published(given)])), tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", FORMATS)
def test_fields_that_nobody_knows_are_kept(name: str, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [row | {"colour": "red"} for row in source_rows(name)]
    convert_file(name, str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl")
    (example,) = read_examples(tmp_path / "out.jsonl")
    assert example.extra["colour"] == "red"


@pytest.mark.parametrize("name", LAYOUTS)
def test_nulls_of_columns_are_as_good_as_no_column(name: str, write_rows: WriteRows, tmp_path: Path) -> None:
    # Parquet and data sets have every column in every row.
    optional = {
        "chat-pairs": ["prompt", "messages", "prompt_id", "score_chosen", "score_rejected", "other"],
        "rewardbench": ["id", "chosen_model", "rejected_model"],
        "rewardbench-2": [
            "num_correct",
            "num_incorrect",
            "total_completions",
            "models",
            "additional_metadata",
        ],
        "judgebench": ["original_id", "response_model"],
        "ultrafeedback": ["source", "correct_answers"],
    }.get(name, ["other"])
    rows = [row | dict.fromkeys(optional) for row in source_rows(name)]
    convert_file(name, str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl")
    ((_, row),) = read_rows(tmp_path / "out.jsonl")
    assert isinstance(row, dict)
    assert None not in row.values()


@pytest.mark.parametrize(
    ("name", "hub", "split"),
    [
        ("rewardbench", "allenai/reward-bench", "filtered"),
        ("rewardbench-2", "allenai/reward-bench-2", "test"),
        ("judgebench", "ScalerLab/JudgeBench", "gpt"),
        ("ultrafeedback-binarized", "HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
        ("helpsteer3", "nvidia/HelpSteer3:preference", "train"),
    ],
)
def test_a_hub_id_is_read_from_the_split_of_its_format(
    name: str, hub: str, split: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(repository: str, config: str | None, *, split: str) -> Any:
        asked.append((":".join(filter(None, (repository, config))), split))
        return datasets.Dataset.from_list(source_rows(name))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert convert_file(name, hub, tmp_path / "out.jsonl").problems == []
    convert_file(name, hub, tmp_path / "other.jsonl", split="mine")
    assert asked == [(hub, split), (hub, "mine")]
    assert CONVERTERS[name].hub == hub
