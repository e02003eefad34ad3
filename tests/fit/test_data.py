"""What would spoil training is found before it, and said in one sentence that names rows."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polar_ft.data.lint import check
from polar_ft.data.reading import DataSource
from polar_ft.errors import PolarError
from polar_ft.fit.data import OURS, Source, faults, held_out_source, look, part_of, read, split

Row = dict[str, Any]


def rows(count: int = 40) -> list[Row]:
    return [
        {
            "prompt": f"What is {n} + 1?",
            "reference": f"{n + 1}",
            "chosen": f"It is {n + 1}.",
            "rejected": "No.",
        }
        for n in range(count)
    ]


def changed(**fields: object) -> list[Row]:
    """Good rows, of which the third and the fifth have other fields."""
    made = rows()
    for number in (2, 4):
        made[number] = {k: v for k, v in (made[number] | fields).items() if v is not ...}
    return made


def lines(made: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode()


def exchanged(row: Row) -> Row:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def tied(row: Row) -> Row:
    answers = [{"content": text, "score": 1.0} for text in ("a", "b", "c")]
    return {"prompt": row["prompt"], "reference": "r", "responses": answers}


@dataclass(frozen=True)
class Fault:
    """A file that must not be trained on, and what has to be said of it."""

    name: str
    content: bytes
    says: str
    file: str = "rows.jsonl"
    held_out: bytes | None = None


FAULTS = [
    Fault("empty file", b"", r"rows\.jsonl: has no rows"),
    Fault(
        "broken line", lines(rows()[:3]) + b'{"prompt": "x\n' + lines(rows()[3:]), r"rows\.jsonl:4: .*JSON"
    ),
    Fault(
        "chosen is missing",
        lines(changed(chosen=...)),
        r"2 rows are unusable: .*rows\.jsonl:3: chosen: is missing.*; .*rows\.jsonl:5: .*--fix",
    ),
    Fault("a number as text", lines(changed(rejected=7)), r"rows\.jsonl:3: rejected: is the number 7"),
    Fault(
        "chosen is rejected",
        lines(changed(chosen="Same.", rejected="Same.")),
        r"2 pairs have the same text as chosen and rejected \(.*rows\.jsonl:3, .*rows\.jsonl:5\)\.",
    ),
    Fault("empty answers", lines(changed(chosen="")), r"texts are empty \(chosen in 2\) \(.*:3 \(chosen\)"),
    Fault("empty prompts", lines(changed(prompt="")), r"texts are empty \(prompt in 2\)"),
    Fault(
        "every pair both ways",
        lines([each for row in rows() for each in (row, exchanged(row))]),
        r"40 pairs say the opposite of another pair \(50%\) \(.*rows\.jsonl:2 \(against .*rows\.jsonl:1\)",
    ),
    Fault("copies", lines(rows() * 2), r"40 pairs are a copy of another one \(50%\) \(.*rows\.jsonl:41"),
    Fault(
        "reference is rejected",
        lines([row | {"reference": row["rejected"]} for row in rows()]),
        r"reference is the rejected text in 100% of the pairs: are chosen and rejected exchanged\?",
    ),
    Fault("too few prompts", lines(rows(7)), r"7 prompts, and at least 20 are needed .*: add rows"),
    Fault("nothing but ties", lines(list(map(tied, rows()))), r"every row ranks all its answers the same"),
    Fault(
        "held-out prompts",
        lines(rows()),
        r"3 rows have a prompt of the held-out data.*rows\.jsonl:1",
        held_out=lines(rows(3)),
    ),
    Fault(
        "one answer each",
        lines([{"instruction": row["prompt"], "output": row["chosen"]} for row in rows()]),
        r"no known format has these rows \(their fields: instruction, output\)",
    ),
    Fault(
        "unknown names",
        lines([{"q": row["prompt"], "yes": "a", "no": "b"} for row in rows()]),
        r"no known format has these rows .*--map prompt=",
    ),
    Fault(
        "Latin-1", lines(changed(chosen="café")).decode().encode("latin-1"), r"rows\.jsonl:3.*not valid UTF-8"
    ),
    Fault("CSV under another name", b"prompt,chosen,rejected\n2 + 2?,4,5\n", r"looks like CSV"),
    Fault("a web page", b"<!DOCTYPE html><html></html>", r"is a web page"),
    Fault("Git LFS", b"version https://git-lfs.github.com/spec/v1\n", r"is a Git LFS pointer.*git lfs pull"),
    Fault("damaged gzip", gzip.compress(lines(rows()))[:-40], r"rows\.jsonl\.gz", file="rows.jsonl.gz"),
]


def prepared(
    source: Path, folder: Path, *, held_out: Path | None = None, fix: bool = False
) -> dict[str, Any]:
    """Reads and checks as a fit does."""
    of = Source(str(source))
    tell: Callable[..., None] = lambda *_: None  # noqa: E731
    done = read(of, folder / "converted.jsonl", tell, fix=fix)
    other = str(held_out) if held_out else None
    path = str(source if done["format"] == OURS else folder / "converted.jsonl")
    return look(of, path, other, folder / "good.jsonl", tell, fix=fix)[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_spoils_training_is_said(tmp_path: Path, fault: Fault) -> None:
    source = tmp_path / fault.file
    source.write_bytes(fault.content)
    held_out = None
    if fault.held_out is not None:
        held_out = tmp_path / "held.jsonl"
        held_out.write_bytes(fault.held_out)
    with pytest.raises(PolarError) as error:
        prepared(source, tmp_path, held_out=held_out)
    text = str(error.value)
    assert re.search(fault.says, text, re.DOTALL), text
    assert len(text.splitlines()) <= 6


def test_good_rows_pass_and_a_few_oddities_are_notes(tmp_path: Path) -> None:
    made = rows(60)
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines([*made, made[0], exchanged(made[1])]))
    found = prepared(source, tmp_path)
    assert found["prompts"] == 60
    assert found["notes"][-2:] == ["1 pair is a copy of another one", "1 pair is the opposite of another one"]


def test_fix_leaves_bad_rows_out_and_counts_them(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines(changed(chosen="Same.", rejected="Same.")) + b"{\n")
    found = prepared(source, tmp_path, fix=True)
    assert len((tmp_path / "good.jsonl").read_bytes().splitlines()) == 38
    assert "3 rows left out by --fix" in found["said"]


def test_fix_does_not_help_where_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines(rows(7)))
    with pytest.raises(PolarError, match="at least 20 are needed"):
        prepared(source, tmp_path, fix=True)


def test_fix_counts_what_is_left(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    same = [row | {"chosen": "Same.", "rejected": "Same."} for row in rows(40)[3:]]
    source.write_bytes(lines([*rows(3), *same]))
    with pytest.raises(
        PolarError, match=r"Without the 37 rows that --fix leaves out: 3 prompts, and at least"
    ):
        prepared(source, tmp_path, fix=True)
    source.write_bytes(lines(same))
    with pytest.raises(PolarError, match="not one row is good"):
        prepared(source, tmp_path, fix=True)
    source.write_bytes(lines([*rows(30), *same[-10:]]))
    found = prepared(source, tmp_path, fix=True)
    assert (found["pairs"], found["prompts"]) == (30, 30)


def test_each_side_has_a_pair(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines([*rows(20)[:6], *map(tied, rows(20)[6:])]))
    sides = split(str(source), "train", tmp_path, 20, None)
    assert all(sides[name]["pairs"] for name in ("train", "val", "held_out"))
    source.write_bytes(lines([*rows(20)[:1], *map(tied, rows(20)[1:])]))
    with pytest.raises(PolarError, match="too few of the rows give a pair"):
        split(str(source), "train", tmp_path, 20, None)


def test_held_out_data_without_a_pair_is_refused_before_training(tmp_path: Path) -> None:
    source, held_out = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    source.write_bytes(lines(rows(40)))
    held_out.write_bytes(lines(list(map(tied, rows(50)[40:]))))
    with pytest.raises(PolarError, match=r"held\.jsonl: the held-out data holds no pair"):
        split(str(source), "train", tmp_path, 40, str(held_out))


def test_held_out_rows_of_ours_need_no_map(tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    source = Source("raw.jsonl", mapping={"prompt": "question"})
    held_out.write_bytes(lines(rows(5)))
    assert held_out_source(source, str(held_out)).mapping is None
    held_out.write_bytes(lines([{"question": "q", "chosen": "a", "rejected": "b"}]))
    assert held_out_source(source, str(held_out)).mapping == {"prompt": "question"}


def test_the_command_says_it_in_one_error_without_torch(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(changed(chosen=...)))
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "xtuner"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.argv = ["polar-ft", "fit", "rows.jsonl", "--out", "out"]
from polar_ft.cli import main
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "training on this would be spoilt" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_prompt_is_on_two_sides(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines(rows(300)))
    sides = split(str(source), "train", tmp_path, 300, None)
    prompts = {}
    for name in ("train", "val", "held_out"):
        read_back = [json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").open()]
        assert len(read_back) == sides[name]["rows"]
        prompts[name] = set(read_back)
    assert not prompts["train"] & prompts["val"]
    assert not (prompts["train"] | prompts["val"]) & prompts["held_out"]
    assert sum(map(len, prompts.values())) == 300
    assert 15 <= len(prompts["held_out"]) <= 50


def test_parts_of_the_data_are_nested(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines(rows(200)))
    found = []
    for share in (0.25, 0.5):
        part_of(source, tmp_path / "part.jsonl", share)
        found.append(set((tmp_path / "part.jsonl").read_text().splitlines()))
    assert found[0] < found[1]
    assert 30 <= len(found[0]) <= 70


def test_other_formats_are_converted(tmp_path: Path) -> None:
    source = tmp_path / "trl.jsonl"
    source.write_bytes(lines([{k: v for k, v in row.items() if k != "reference"} for row in rows()]))
    found = prepared(source, tmp_path)
    assert found["pairs"] == 40
    assert "no row has a reference: the model learns to score without one" in found["notes"]


def test_faults_of_good_data_are_none(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines(rows()))
    assert faults(check([DataSource(path=str(source))])) == []
