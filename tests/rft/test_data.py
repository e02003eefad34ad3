"""Questions with references, in the files that frameworks read."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.errors import PolarError
from polar_ft.rft.data import write_rl_data

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
SOLUTIONS = [r"Half of it is $\frac12$, so \boxed{\frac{1}{2}}.", "No box, no number."]
PAIR = {"prompt": QUESTION, "reference": "4", "chosen": "four", "rejected": "5"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_verl_has_the_same_types_in_every_file(tmp_path):
    messages = {**PAIR, "reference": [{"role": "assistant", "content": "4"}]}
    mine = write(tmp_path / "mine.jsonl", [PAIR, messages, {"prompt": "Hi", "references": ["Hello", "Hey"]}])
    math = write(tmp_path / "math.jsonl", [{"problem": "2+2?", "solution": "It is 4.", "level": "Level 1"}])
    assert write_rl_data(mine, tmp_path / "mine.parquet", "verl").rows == 3
    write_rl_data(math, tmp_path / "math.parquet", "verl", layout="math", split="test")
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("mine", "math")]
    assert tables[0].schema == tables[1].schema
    first, second, third = tables[0].to_pylist()
    assert first["reward_model"] == {
        "style": "polar",
        "ground_truth": [{"role": "assistant", "content": "4"}],
    }
    assert second["reward_model"] == first["reward_model"]
    assert first["prompt"] == first["extra_info"]["prompt"] == QUESTION
    assert third["extra_info"]["references"] == ["Hello", "Hey"]
    assert [row["extra_info"]["index"] for row in (first, second, third)] == [0, 1, 2]
    (row,) = tables[1].to_pylist()
    assert (row["data_source"], row["ability"], row["extra_info"]["split"]) == ("math", "math", "test")


def test_lines_of_trl_and_openrlhf(tmp_path):
    source = write(tmp_path / "a.jsonl", [PAIR])
    write_rl_data(source, tmp_path / "trl.jsonl", "trl")
    write_rl_data(source, tmp_path / "openrlhf.jsonl", "openrlhf")
    assert json.loads((tmp_path / "trl.jsonl").read_text()) == {
        "prompt": QUESTION,
        "references": ["4"],
        "rule": "",
        "ability": "general",
    }
    label = {"prompt": QUESTION, "references": ["4"], "rule": ""}
    assert json.loads((tmp_path / "openrlhf.jsonl").read_text()) == {"input": QUESTION, "label": label}


def test_hh_rlhf(tmp_path):
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."}
    write_rl_data(write(tmp_path / "hh.jsonl", [row]), tmp_path / "o.jsonl", "trl", layout="hh-rlhf")
    written = json.loads((tmp_path / "o.jsonl").read_text())
    assert (written["prompt"], written["references"]) == ([{"role": "user", "content": "Hi"}], ["Hello!"])


def test_am_keeps_the_system_prompt_and_leaves_the_thoughts_out(tmp_path):
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "assistant", "value": "<think>Hm.</think>\n\nIt is 4.", "info": {"answer_content": None}},
    ]
    source = write(tmp_path / "am.jsonl", [{"conversations": turns, "system": "Be brief."}])
    write_rl_data(source, tmp_path / "o.jsonl", "trl", layout="am")
    written = json.loads((tmp_path / "o.jsonl").read_text())
    assert [turn["role"] for turn in written["prompt"]] == ["system", "user"]
    assert written["references"] == ["It is 4."]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "Hi"}, "reference: is empty"),
        ({"prompt": "Hi", "reference": "  "}, "reference: is empty"),
        ({"prompt": "", "reference": "a"}, "prompt: is empty"),
        (
            {"prompt": [{"role": "assistant", "content": "Hi"}], "reference": "a"},
            "ends with a turn of the assistant",
        ),
        ({"prompt": 7, "reference": "a"}, "prompt: "),
        ({"prompt": "Hi", "reference": QUESTION}, "reference: is a turn of the user"),
        ({**PAIR, "reference": QUESTION}, "reference: is a turn of the user"),
        ({"prompt": "Hi", "reference": "<think>Hm."}, "reference: a reference has <think> and no answer"),
        ({"prompt": "Hi", "reference": "a", "ability": 7}, "ability: Input should be a valid string"),
        ({**PAIR, "rule": "maths"}, "rule: Input should be 'math'"),
        (
            {**PAIR, "rule": "math", "reference": "It cannot be said."},
            "'It cannot be said.' cannot be read as",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, named):
    source = write(tmp_path / "a.jsonl", [PAIR, row])
    done = write_rl_data(source, tmp_path / "o.jsonl", "trl")
    (problem,) = done.problems
    assert str(problem).startswith(f"{source}:2: {named}") or named in str(problem)
    assert done.rows == 1


def test_rules_travel_with_their_rows(tmp_path):
    rows = [
        {"prompt": "2 + 2?", "reference": r"So \boxed{4}.", "rule": "math"},
        {"prompt": "Hi", "reference": "a"},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    write_rl_data(source, tmp_path / "verl.parquet", "verl")
    table = pq.read_table(tmp_path / "verl.parquet").to_pylist()
    assert [row["extra_info"]["rule"] for row in table] == ["math", ""]
    write_rl_data(source, tmp_path / "openrlhf.jsonl", "openrlhf")
    lines = [json.loads(line) for line in (tmp_path / "openrlhf.jsonl").read_text().splitlines()]
    assert [line["label"]["rule"] for line in lines] == ["math", ""]


def test_math_as_solutions_with_a_rule(tmp_path):
    rows = [{"problem": f"{i}?", "solution": solution} for i, solution in enumerate(SOLUTIONS)]
    source = write(tmp_path / "math.jsonl", rows)
    done = write_rl_data(source, tmp_path / "o.jsonl", "trl", layout="math", rule="math")
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["references"] for row in written] == [[SOLUTIONS[0]]]
    assert {row["rule"] for row in written} == {"math"}
    (problem,) = done.problems
    assert "math.jsonl:2: reference: its final answer 'No box, no number.' cannot be read" in str(problem)


def test_thoughts_of_references_are_left_out(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "reference": "<think>Hm.</think>Hello"}])
    write_rl_data(source, tmp_path / "o.jsonl", "trl")
    assert json.loads((tmp_path / "o.jsonl").read_text())["references"] == ["Hello"]


def test_nothing_usable_leaves_what_was_there(tmp_path):
    target = tmp_path / "o.parquet"
    target.write_text("mine")
    source = write(tmp_path / "a.jsonl", [{"prompt": "Hi"}])
    with pytest.raises(PolarError, match=r"no row can be used for verl; the first: .*a.jsonl:1: reference"):
        write_rl_data(source, target, "verl")
    assert target.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "o.parquet"]


def test_commands(tmp_path):
    source = write(tmp_path / "a.jsonl", [PAIR])
    target = str(tmp_path / "o.parquet")
    run = CliRunner().invoke
    assert "1 row for verl" in run(app, ["data", "to-verl", source, target]).output
    assert isinstance(run(app, ["data", "to-verl", source, target]).exception, PolarError)  # it exists
    assert run(app, ["data", "to-verl", source, target, "--force"]).exit_code == 0
    assert isinstance(run(app, ["data", "to-trl", source, target]).exception, PolarError)  # no .jsonl
    assert run(app, ["data", "to-openrlhf", source, str(tmp_path / "o.jsonl")]).exit_code == 0
