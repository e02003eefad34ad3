"""hh-rlhf, ranked rows and the conversion of files: rows worked by hand, and the full files of real data."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from polar_ft.data.converters import convert_file
from polar_ft.data.converters.dialogues import hh_rlhf
from polar_ft.data.converters.format import TIED
from polar_ft.data.converters.ranked import ranked
from polar_ft.data.reading import read_examples, read_rows
from polar_ft.data.records import RowError
from polar_ft.errors import DataError, PolarError
from tests.data import rows
from tests.data.rows import WriteRows
from tests.shared_data import shared_file

HI = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Help?\n\nAssistant:"


def test_hh_rlhf_dialogue_by_hand() -> None:
    converted = hh_rlhf({"chosen": f"{HI} Yes.\n\nGladly. ", "rejected": f"{HI} No.", "split": "x"})
    assert converted.rows == [
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Help?"},
            ],
            "reference": "",
            "chosen": [{"role": "assistant", "content": "Yes.\n\nGladly."}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "split": "x",
        }
    ]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"chosen": f"{HI} a"}, "rejected", "is missing or not a string"),
        ({"chosen": 1, "rejected": f"{HI} a"}, "chosen", "is missing or not a string"),
        ({"chosen": "Hello", "rejected": f"{HI} a"}, "chosen", "does not begin with"),
        ({"chosen": "\n\nHuman: Hi", "rejected": f"{HI} a"}, "chosen", "does not end with a turn of"),
        ({"chosen": "\n\nAssistant: Hi", "rejected": f"{HI} a"}, "chosen", "does not end with a turn of"),
        (
            {"chosen": f"{HI} a", "rejected": f"\n\nHuman: Ho{HI} b"},
            "rejected",
            "another prompt than chosen from",
        ),
        (
            {"chosen": f"{HI} a", "rejected": f"{HI} b\n\nHuman: c\n\nAssistant: d"},
            "rejected",
            "from turn 4 on",
        ),
    ],
)
def test_hh_rlhf_rows_that_do_not_parse(row: dict, field: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason) as caught:
        hh_rlhf(row)
    assert caught.value.field == field


def test_ranked_keeps_the_form_of_the_prompt_and_what_is_known_of_the_texts() -> None:
    row = rows.ranked(1, 3, 2, id="q", subset="s", source="web")
    row["prompt"] = [{"role": "user", "content": "Which?"}]
    row["responses"][0]["policy"] = "small"
    row["responses"][1]["policy"] = "large"
    assert ranked(row).rows == [
        {
            "id": "q-1",
            "prompt": [{"role": "user", "content": "Which?"}],
            "reference": [{"role": "assistant", "content": "text 1"}],
            "chosen": [{"role": "assistant", "content": "text 2"}],
            "rejected": [{"role": "assistant", "content": "text 0"}],
            "margin": 1.0,
            "reference_score": 3.0,
            "reference_policy": "large",
            "chosen_score": 2.0,
            "rejected_score": 1.0,
            "rejected_policy": "small",
            "subset": "s",
            "source": "web",
        }
    ]


def test_ranked_without_reference_pairs_all_responses() -> None:
    converted = ranked(rows.ranked(1, 3, 3), pairing="all", reference="none")
    assert [(row["chosen"], row["rejected"]) for row in converted.rows] == [
        ("text 1", "text 0"),
        ("text 2", "text 0"),
    ]
    assert {row["reference"] for row in converted.rows} == {""}
    assert converted.left_out == {TIED: 1}


def test_ranked_keeps_a_field_of_the_row_under_another_name() -> None:
    (row,) = ranked(rows.ranked(3, 2, 1, margin=9, chosen_score="high")).rows
    assert (row["margin"], row["source_margin"]) == (1.0, 9)
    assert (row["chosen_score"], row["source_chosen_score"]) == (2.0, "high")


@pytest.mark.parametrize("own", [{"reference": "own"}, {"references": ["one", "two"]}])
def test_ranked_keeps_references_of_its_own(own: dict) -> None:
    for reference in ("best", "none"):
        (row,) = ranked(rows.ranked(1, 2) | own, reference=reference).rows
        assert {key: value for key, value in row.items() if key.startswith("reference")} == own
        assert (row["chosen"], row["rejected"]) == ("text 1", "text 0")


def test_converted_pairs_are_the_pairs_of_the_ranked_rows(write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows("in.jsonl", [rows.ranked(1, 4, 3, 3, 2), rows.pair(), rows.ranked(5, 5, 5)])
    target = tmp_path / "out.jsonl"
    done = convert_file("ranked", str(source), target, options={"pairing": "all"})
    # Of the first row a tie, of the third all three pairs.
    assert (done.rows_in, done.pairs, dict(done.left_out), done.without_pairs) == (3, 6, {TIED: 2}, 1)

    def pairs(path: Path) -> list[tuple[str, ...]]:
        return [
            (e.prompt, e.reference, e.candidates[chosen], e.candidates[rejected])
            for e in read_examples(path, pairing="all")
            for chosen, rejected in e.pairs
        ]

    assert pairs(target) == pairs(source)
    assert [row["id"] for _, row in read_rows(target)] == [  # type: ignore[index]
        *(f"in.jsonl:1-{number}" for number in range(1, 6)),
        "in.jsonl:2",
    ]


def test_bad_rows_are_named_and_the_rest_converted(write_rows: WriteRows, tmp_path: Path) -> None:
    good = {"chosen": f"{HI} a", "rejected": f"{HI} b"}
    source = write_rows("hh.jsonl", [good, {"chosen": "x"}, good])
    done = convert_file("hh-rlhf", str(source), tmp_path / "out.jsonl.gz")
    assert [str(problem) for problem in done.problems] == [
        f'{source}:2: chosen: does not begin with "\\n\\nHuman:" — is this an hh-rlhf dialogue?'
    ]
    assert len(gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()) == 2
    with pytest.raises(DataError, match="1 row cannot be used"):
        convert_file("hh-rlhf", str(source), tmp_path / "strict.jsonl", strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hh.jsonl", "out.jsonl.gz"]


def test_nothing_is_written_where_no_row_converts(write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows("in.jsonl", [rows.pair()] * 3)
    with pytest.raises(
        PolarError, match=r"none of its 3 rows gives a pair as hh-rlhf .* the first: .*in.jsonl:1"
    ):
        convert_file("hh-rlhf", str(source), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_unknown_formats_and_options_are_refused(write_rows: WriteRows, tmp_path: Path) -> None:
    source = str(write_rows("in.jsonl", [rows.pair()]))
    with pytest.raises(
        PolarError, match=r"alpaca: no such format; there are auto, arena, .*, ultrafeedback-binarized"
    ):
        convert_file("alpaca", source, tmp_path / "out.jsonl")
    with pytest.raises(PolarError, match="--pairing is no option of the format hh-rlhf; leave"):
        convert_file("hh-rlhf", source, tmp_path / "out.jsonl", options={"pairing": "all"})
    with pytest.raises(PolarError, match="format ultrafeedback; it has --reference, --score; leave"):
        convert_file("ultrafeedback", source, tmp_path / "out.jsonl", options={"pairing": "all"})


def test_rows_get_the_place_as_id_where_they_have_none(write_rows: WriteRows, tmp_path: Path) -> None:
    good = {"chosen": f"{HI} a", "rejected": f"{HI} b"}
    source = write_rows("hh.jsonl", [good | {"id": "mine"}, good, good | {"id": None}])
    convert_file("hh-rlhf", str(source), tmp_path / "out.jsonl")
    ids = [row["id"] for _, row in read_rows(tmp_path / "out.jsonl")]  # type: ignore[index]
    assert ids == ["mine", "hh.jsonl:2", "hh.jsonl:3"]


def test_rows_that_could_not_be_read_back_are_not_written(write_rows: WriteRows, tmp_path: Path) -> None:
    good = {"chosen": f"{HI} a", "rejected": f"{HI} b"}
    source = write_rows("hh.jsonl", [good, good | {"weight": "heavy"}])
    done = convert_file("hh-rlhf", str(source), tmp_path / "out.jsonl")
    assert (done.pairs, [str(problem) for problem in done.problems]) == (
        1,
        [f"{source}:2: weight: is the string 'heavy' — must be a number"],
    )


def test_a_full_disk_leaves_nothing_half_written(write_rows: WriteRows, tmp_path: Path) -> None:
    # A limit on the size of files fails writes as a full disk does, for one process only.
    source = write_rows("in.jsonl", [rows.pair(prompt="x" * 1000)] * 200)
    target = tmp_path / "out" / "pairs.jsonl"
    target.parent.mkdir()
    target.write_text("before\n")
    code = "import sys; from polar_ft.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "convert", "ranked", str(source), str(target), "--force"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 1
    assert f"{target}: cannot be written (File too large); no incomplete file was left behind" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in target.parent.iterdir()] == ["pairs.jsonl"]
    assert target.read_text() == "before\n"


def test_hh_rlhf_full_file(tmp_path: Path) -> None:
    source = shared_file("hh_rlhf_harmless_test.jsonl.gz")
    done = convert_file("hh-rlhf", str(source), tmp_path / "hh.jsonl")
    assert (done.rows_in, done.pairs, len(done.problems)) == (2312, 2307, 5)
    assert all("another prompt than chosen" in problem.reason for problem in done.problems)
    # Each dialogue can be put together again from its row: no text was lost but white space.
    with gzip.open(source, "rt", encoding="utf-8") as file:
        originals = [json.loads(line) for line in file]
    names = {"user": "Human", "assistant": "Assistant"}
    for _, row in read_rows(tmp_path / "hh.jsonl"):
        assert isinstance(row, dict)
        original = originals[int(row["id"].rpartition(":")[2]) - 1]
        for key in ("chosen", "rejected"):
            turns = [*row["prompt"], *row[key]]
            again = "".join(f"{names[turn['role']]}: {turn['content']}" for turn in turns)
            assert "".join(again.split()) == "".join(original[key].split())


@pytest.mark.parametrize("pairing", ["adjacent", "all"])
def test_alpaca_eval_full_file(tmp_path: Path, pairing: str) -> None:
    source = shared_file("alpaca_eval_ranked.jsonl.gz")
    done = convert_file("ranked", str(source), tmp_path / "pairs.jsonl", options={"pairing": pairing})
    assert (done.rows_in, done.problems) == (805, [])
    # 13 candidates besides the reference: 12 neighbours or 13 * 12 / 2 pairs a row, ties among them.
    assert done.pairs + done.left_out[TIED] == 805 * (12 if pairing == "adjacent" else 78)
    assert all(example.margins[0] > 0 for example in read_examples(tmp_path / "pairs.jsonl"))  # type: ignore[operator]
