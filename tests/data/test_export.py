"""Rows as TRL, OpenRLHF and LLaMA-Factory read them, and what is said of what they cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polar_ft.data.converters import CONVERTERS, convert_file, recognise_file
from polar_ft.data.export import TARGETS, Export, export_rows
from polar_ft.data.reading import read_examples
from polar_ft.errors import DataError, PolarError
from tests.data.rows import WriteRows, pair, ranked

SYSTEM, USER, ANSWER, OTHER = (
    {"role": role, "content": content}
    for role, content in (("system", "Brief."), ("user", "Hi"), ("assistant", "A"), ("assistant", "B"))
)
FOR_PEOPLE = ("label-studio", "argilla")
DIALOGUE = {
    "id": 7,
    "prompt": [SYSTEM, USER, ANSWER, USER],
    "reference": "",
    "chosen": [ANSWER],
    "rejected": "B",
    "subset": "chat",
}


@pytest.fixture
def export(write_rows: WriteRows, tmp_path: Path) -> Any:
    def run(name: str, rows: list[dict[str, Any]], **settings: Any) -> tuple[Export, list[dict[str, Any]]]:
        out = tmp_path / ("out.json" if name in FOR_PEOPLE else "out.jsonl")
        done = export_rows(name, [str(write_rows("in.jsonl", rows))], out, **settings)
        text = out.read_text()
        return done, json.loads(text) if name in FOR_PEOPLE else [
            json.loads(line) for line in text.splitlines()
        ]

    return run


def test_each_framework_gets_its_layout(export: Any) -> None:
    assert export("trl", [DIALOGUE])[1] == [
        {"id": "7", "prompt": DIALOGUE["prompt"], "chosen": [ANSWER], "rejected": [OTHER]}
    ]
    assert export("openrlhf", [DIALOGUE])[1] == [
        {"id": "7", "chosen": [*DIALOGUE["prompt"], ANSWER], "rejected": [*DIALOGUE["prompt"], OTHER]}
    ]
    spoken = [("system", "Brief."), ("human", "Hi"), ("gpt", "A"), ("human", "Hi")]
    assert export("llama-factory", [DIALOGUE])[1] == [
        {
            "id": "7",
            "conversations": [{"from": speaker, "value": text} for speaker, text in spoken],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        }
    ]


@pytest.mark.parametrize("name", sorted(set(TARGETS) - set(FOR_PEOPLE)))
def test_what_is_exported_is_recognised_and_has_the_same_texts(
    export: Any, name: str, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [pair(id="p"), DIALOGUE]
    export(name, rows)
    found = recognise_file(CONVERTERS, str(tmp_path / "out.jsonl"))
    convert_file(found.name, str(tmp_path / "out.jsonl"), tmp_path / "back.jsonl")
    before = read_examples(write_rows("in.jsonl", rows))
    for was, example in zip(before, read_examples(tmp_path / "back.jsonl"), strict=True):
        assert (example.id, example.prompt, example.candidates) == (was.id, was.prompt, was.candidates)


def test_what_has_no_place_is_counted(export: Any) -> None:
    rows = [pair(margin=0.5, weight=2.0), pair(references=["4", "IV"], reference=None), DIALOGUE]
    done, _ = export("trl", [*rows, pair(reference="", wrapper="pretrain")])
    assert dict(done.lost) == {
        "a reference": 2,
        "a margin": 1,
        "a weight other than 1": 1,
        'the wrapper "pretrain", which is no dialogue': 1,
        "other fields": 1,
    }


def test_pairs_that_llama_factory_would_skip_are_left_out(export: Any) -> None:
    call = [ANSWER, {"role": "tool", "content": "3"}, ANSWER]
    rows = [pair(), pair(chosen=call), pair(prompt=[USER, USER]), pair(prompt=[USER, SYSTEM, USER])]
    done, written = export("llama-factory", rows)
    assert len(written) == done.pairs == 1
    assert sorted(done.left_out.values()) == [1, 2]
    done, written = export("trl", rows)
    assert (done.pairs, done.left_out) == (4, {})
    assert written[1]["chosen"] == call


def test_ranked_rows_become_the_pairs_of_training(export: Any) -> None:
    rows = [ranked(4, 3, 2, 2)]
    done, written = export("trl", rows)
    assert [(row["id"], row["chosen"][0]["content"]) for row in written] == [("in.jsonl:1", "text 1")]
    assert (done.ties, done.lost["a reference"]) == (1, 1)
    _, written = export("trl", rows, pairing="all", reference="none")
    assert [(row["id"], row["chosen"][0]["content"]) for row in written] == [
        (f"in.jsonl:1-{number}", text)
        for number, text in enumerate(["text 0", "text 0", "text 0", "text 1", "text 1"], start=1)
    ]


def test_margins_are_written_where_every_pair_has_one(export: Any, tmp_path: Path) -> None:
    done, written = export("openrlhf", [pair(margin=0.5)], margins=True)
    assert (written[0]["margin"], done.lost["a margin"]) == (0.5, 0)
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(DataError, match=r"in.jsonl:2: margin: is missing"):
        export("openrlhf", [pair(margin=0.5), pair()], margins=True)
    with pytest.raises(PolarError, match="--margins: the rows of llama-factory have no place"):
        export("llama-factory", [pair(margin=0.5)], margins=True)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_exported(export: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in.jsonl:2: chosen: is the number 1"):
        export("trl", [pair(), pair(chosen=1)])
    with pytest.raises(PolarError, match=r"no pair of .* can be written for llama-factory \(1 whose"):
        export("llama-factory", [pair(prompt=[USER, USER])])
    with pytest.raises(
        PolarError, match="verl: no such framework; there are trl, openrlhf, llama-factory, label"
    ):
        export("verl", [pair()])
    with pytest.raises(PolarError, match="know a file by its suffix"):
        export_rows("trl", ["in.jsonl"], tmp_path / "out.jsonl.gz")
    assert not (tmp_path / "out.jsonl").exists()


def label_left(task: dict[str, Any], better: str) -> dict[str, Any]:
    """A task of Label Studio as its export has it, after a labeller chose the answer with a text."""
    side = "left" if task["data"]["answer1"] == better else "right"
    result = {
        "type": "pairwise",
        "value": {"selected": side},
        "to_name": "comparison",
        "from_name": "comparison",
    }
    return {"id": 1, **task, "annotations": [{"completed_by": 3, "lead_time": 2.5, "result": [result]}]}


def rank(record: dict[str, Any], better: str) -> dict[str, Any]:
    """A record of Argilla as its client writes it, after a labeller ranked the answer with a text first."""
    order = sorted(("response1", "response2"), key=lambda name: record["fields"][name] != better)
    answer = {"value": order, "user_id": "7d1e"}
    return {**record, "metadata": {}, "suggestions": {}, "responses": {"ranking": [answer]}, "vectors": {}}


@pytest.mark.parametrize(("name", "label"), [("label-studio", label_left), ("argilla", rank)])
def test_what_people_are_given_to_compare_comes_back_as_pairs(
    export: Any, name: str, label: Any, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [pair(id=f"p{number}", chosen=f"good {number}", rejected=f"bad {number}") for number in range(20)]
    done, written = export(name, rows)
    assert (done.pairs, done.lost) == (20, {})
    first = [task.get("data", task.get("fields")) for task in written]
    lefts = [fields["answer1" if name == "label-studio" else "response1"] for fields in first]
    # The order says nothing: of 20 fair coins 3 to 17 show heads, but for one time in 2,500.
    assert 3 <= sum("good" in text for text in lefts) <= 17
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert export(name, swapped)[1] == written

    back = tmp_path / "labelled.json"
    labelled = [label(task, f"good {number}") for number, task in enumerate(written)]
    back.write_text(json.dumps(labelled, indent=1))
    assert recognise_file(CONVERTERS, str(back)).name == name
    convert_file(name, str(back), tmp_path / "back.jsonl")
    before = read_examples(write_rows("in.jsonl", rows))
    for was, example in zip(before, read_examples(tmp_path / "back.jsonl"), strict=True):
        assert (example.id, example.prompt, example.reference) == (was.id, was.prompt, was.reference)
        assert example.candidates == was.candidates
        assert example.extra["labeller"] in ("3", "7d1e")


def test_what_people_cannot_be_shown_is_counted(export: Any, tmp_path: Path) -> None:
    rows = [DIALOGUE, pair(references=["4", "IV"], reference=None), pair(margin=0.5)]
    done, written = export("argilla", rows)
    assert dict(done.lost) == {
        "a prompt of several turns, which became one text": 1,
        "other fields": 1,
        "several references, of which the first was written": 1,
        "a margin": 1,
    }
    assert written[0]["fields"]["instruction"].startswith("system: Brief.\n\nuser: Hi")
    assert "reference" not in written[0]["fields"]
    with pytest.raises(PolarError, match=r"let it end in .json$"):
        export_rows("argilla", ["in.jsonl"], tmp_path / "out.jsonl")


def test_datasets_loads_what_is_written(export: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [pair(), DIALOGUE, ranked(3, 2, 1)]
    for name in TARGETS:
        export(name, rows)
        loaded = datasets.load_dataset(
            "json",
            data_files=str(tmp_path / f"out{TARGETS[name].suffix}"),
            split="train",
            cache_dir=str(tmp_path / name),
        )
        assert len(loaded) == 3
