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
        out = tmp_path / "out.jsonl"
        done = export_rows(name, [str(write_rows("in.jsonl", rows))], out, **settings)
        return done, [json.loads(line) for line in out.read_text().splitlines()]

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


@pytest.mark.parametrize("name", sorted(TARGETS))
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
    with pytest.raises(PolarError, match="verl: no such framework; there are trl, openrlhf, llama-factory"):
        export("verl", [pair()])
    with pytest.raises(PolarError, match="know a file by its suffix"):
        export_rows("trl", ["in.jsonl"], tmp_path / "out.jsonl.gz")
    assert not (tmp_path / "out.jsonl").exists()


def test_datasets_loads_what_is_written(export: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [pair(), DIALOGUE, ranked(3, 2, 1)]
    for name in TARGETS:
        export(name, rows)
        loaded = datasets.load_dataset(
            "json", data_files=str(tmp_path / "out.jsonl"), split="train", cache_dir=str(tmp_path / name)
        )
        assert len(loaded) == 3
