"""Data for reinforcement fine-tuning: questions with references, in the files that frameworks read.

A question becomes a prompt of messages and a reference answer, which the adapters of this folder hand to the
reward model. The reference of a row is its own; if that is empty, the answer that it says is best. A row may
ask for a rule in place of the reward model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from polar_ft.data.answers import Thinking
from polar_ft.data.converters.dialogues import hh_rlhf
from polar_ft.data.reading import RowProblem, read_rows
from polar_ft.data.records import Message, RankedRow, RowError, Text, parse_row, text_of
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError, validation_sentences
from polar_ft.rft.rules import MathRule, Rule, final_answer

Source = Literal["polar", "hh-rlhf", "math", "am"]
Framework = Literal["verl", "trl", "openrlhf"]

# What InternLM/POLAR's examples/ppo append to a question of MATH, at commit 80626f3.
BOXED = r"Let's think step by step and output the final answer within \boxed{}."


class RLRow(BaseModel):
    """One question for a policy.

    Attributes:
        prompt: Messages, of which the last is the user's.
        references: Texts of good answers without thoughts, none of them empty.
        ability: A word for what it asks ("math", "general"), for reports.
        source: Name of the data.
        rule: How rewards are found; None by the reward model.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    prompt: list[dict[str, str]]
    references: list[str]
    ability: str
    source: str
    rule: Rule | None = None


@dataclass
class Written:
    """The outcome of `write_rl_data`.

    Attributes:
        rows: Rows that were written.
        problems: Rows that cannot be used.
    """

    rows: int = 0
    problems: list[RowProblem] = field(default_factory=list)


def write_rl_data(
    source: str,
    target: Path,
    framework: Framework,
    *,
    layout: Source = "polar",
    split: str = "train",
    rule: Rule | None = None,
) -> Written:
    """Converts a file, folder or data set; the file appears, complete, at the end.

    Args:
        source: As in `read_rows`.
        target: A .parquet file for verl, a .jsonl file for TRL and OpenRLHF.
        framework: Who reads it.
        layout: "polar" for our own rows, or the layout of a published data set.
        split: Split of a HuggingFace data set; verl's ``extra_info`` holds it.
        rule: Of all rows; None leaves each row its own.

    Raises:
        PolarError: The target's name does not fit, nothing can be used, it cannot be written, or rows ask for
            a rule whose package is not installed.
    """
    suffix = ".parquet" if framework == "verl" else ".jsonl"
    if target.suffix != suffix:
        raise PolarError(f"{target}: {framework} reads {suffix} files; choose such a name")
    done = Written()
    name = Path(source).name.partition(".")[0] if layout == "polar" else layout
    golds = _Golds()

    def rows() -> Iterator[RLRow]:
        for place, row in read_rows(source, split):
            if isinstance(row, RowProblem):
                done.problems.append(row)
                continue
            try:
                made = READERS[layout](row, name)
                if rule:
                    made = made.model_copy(update={"rule": rule})
                golds.check(made)
                yield made
                done.rows += 1
            except RowError as error:
                done.problems.append(RowProblem.at(place, error))
        if not done.rows:  # before the file appears
            first = f"; the first: {done.problems[0]}" if done.problems else ""
            raise PolarError(f"{source}: no row can be used for {framework}{first}")

    try:
        (_write_verl if framework == "verl" else _write_lines)(rows(), target, framework, split)
    finally:
        golds.close()
    return done


class _Golds:
    """Checks that the rule of a row can read its reference."""

    def __init__(self) -> None:
        self._math: MathRule | None = None

    def check(self, row: RLRow) -> None:
        """Raises RowError if it cannot."""
        if row.rule is None:
            return
        if self._math is None:
            self._math = MathRule(processes=1)
        if self._math.check(row.references, "").result() in ("no gold", "failed"):
            shown = final_answer(row.references[0])[-40:]
            raise RowError(
                "reference",
                f'its final answer {shown!r} cannot be read as mathematics, which the rule "math" compares — '
                rf"write it as \boxed{{…}}, or leave the rule out of this row",
            )

    def close(self) -> None:
        if self._math is not None:
            self._math.close()


class _Question(BaseModel):
    """A row without answers to compare."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: Text
    reference: Text | None = None
    references: list[Text] | None = None
    ability: str | None = None


def polar_row(row: Mapping[str, Any], source: str) -> RLRow:
    """A pair row, a ranked row, or ``{"prompt": …, "reference": …}``; ``ability`` and ``rule`` are optional.

    >>> polar_row({"prompt": "2+2?", "reference": "4", "chosen": "four", "rejected": "5"}, "mine").references
    ['4']
    >>> answers = [{"content": text, "score": score} for text, score in (("5", 0), ("4", 1), ("four", 0.5))]
    >>> polar_row({"prompt": "2+2?", "responses": answers}, "mine").references
    ['4']
    >>> polar_row({"prompt": "2+2?", "reference": "", "chosen": "four", "rejected": "5"}, "mine").references
    ['four']
    """
    options = {name: row.get(name) for name in ("ability", "rule")}
    if {"chosen", "rejected", "responses"} & row.keys():
        parsed = parse_row(row)
        given = parsed.references or ([] if parsed.reference is None else [parsed.reference])
        references = [text for text in map(_reference_text, given) if text.strip()]
        if not references:
            if isinstance(parsed, RankedRow):
                references = [max(parsed.responses, key=lambda response: response.goodness).text]
            else:
                references = [_reference_text(parsed.chosen)]
        return _rl_row(parsed.prompt, references, source, **options)
    try:
        question = _Question.model_validate(dict(row))
    except ValidationError as error:
        raise _row_error(error) from None
    given = question.references or ([] if question.reference is None else [question.reference])
    return _rl_row(question.prompt, [*map(_reference_text, given)], source, **options)


def _reference_text(value: str | Sequence[Message]) -> str:
    if not isinstance(value, str) and value and value[-1].role != "assistant":
        raise RowError("reference", f"is a turn of the {value[-1].role}, not an answer of the assistant")
    return text_of(value)


def _row_error(error: ValidationError) -> RowError:
    where, _, what = validation_sentences(error, leave_out=("string", "messages"))[0].partition(": ")
    return RowError(where, what)


def hh_row(row: Mapping[str, Any], source: str) -> RLRow:
    """hh-rlhf: the prompt and the last answer of the chosen dialogue."""
    (pair,) = hh_rlhf(row).rows
    prompt = [Message.model_validate(turn) for turn in pair["prompt"]]
    answer = [Message.model_validate(turn) for turn in pair["chosen"]]
    return _rl_row(prompt, [_reference_text(answer)], source, ability="alignment")


def math_row(row: Mapping[str, Any], source: str) -> RLRow:
    """MATH (arXiv 2103.03874): the problem with an instruction; the solution is the reference.

    >>> math_row({"problem": "2+2?", "solution": "It is 4."}, "math").prompt[0]["content"][:20]
    "2+2? Let's think ste"
    """
    problem, solution = _texts(row, "problem", "solution")
    return _rl_row(f"{problem} {BOXED}", [solution], source, ability="math")


def am_row(row: Mapping[str, Any], source: str) -> RLRow:
    """AM-DeepSeek-R1-Distilled: ``conversations``; the answer without its thoughts is the reference.

    >>> turns = [{"from": "human", "value": "2+2?"},
    ...          {"from": "assistant", "value": "<think>4</think><answer>Four.</answer>"}]
    >>> am_row({"conversations": turns}, "am").references
    ['Four.']
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError("conversations", "is missing or no list of turns — is this AM-DeepSeek data?")
    roles = {
        "human": "user",
        "user": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "system": "system",
    }
    if any(turn.get("from") not in roles or not isinstance(turn.get("value"), str) for turn in turns):
        raise RowError("conversations", 'must have turns with "from" (human, assistant, system) and "value"')
    *before, last = turns
    if roles[last["from"]] != "assistant":
        raise RowError("conversations", "does not end with the assistant's answer — there is no reference")
    info = last.get("info")
    answer = info.get("answer_content") if isinstance(info, Mapping) else None
    if not answer:
        found = re.search(r"<answer>(.*?)</answer>", last["value"], re.DOTALL)
        answer = found[1] if found else last["value"].rpartition("</think>")[2]
    prompt = [Message(role=roles[turn["from"]], content=turn["value"]) for turn in before]
    if row.get("system"):
        prompt = [Message(role="system", content=row["system"]), *prompt]
    return _rl_row(prompt, [answer.strip()], source)


READERS: dict[Source, Callable[[Mapping[str, Any], str], RLRow]] = {
    "polar": polar_row,
    "hh-rlhf": hh_row,
    "math": math_row,
    "am": am_row,
}


def _texts(row: Mapping[str, Any], *names: str) -> list[str]:
    for name in names:
        if not isinstance(row.get(name), str):
            raise RowError(name, "is missing or no text — has the layout changed?")
    return [row[name] for name in names]


def _rl_row(
    prompt: str | Sequence[Message],
    references: list[str],
    source: str,
    *,
    ability: Any = None,
    rule: Any = None,
) -> RLRow:
    turns = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else [{"role": turn.role, "content": turn.content} for turn in prompt]
    )
    if not turns or not turns[-1]["content"].strip():
        raise RowError("prompt", "is empty — there is nothing to answer")
    if turns[-1]["role"] != "user":
        raise RowError("prompt", f"ends with a turn of the {turns[-1]['role']}, not with the user's question")
    if not references or not all(text.strip() for text in references):
        raise RowError("reference", "is empty — POLAR compares an answer with a reference: give one")
    try:
        references = [Thinking().reference(text) for text in references]
    except PolarError as error:
        raise RowError("reference", str(error)) from None
    try:
        return RLRow(
            prompt=turns,
            references=references,
            ability=ability or "general",
            source=source,
            rule=rule or None,
        )
    except ValidationError as error:
        raise _row_error(error) from None


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def verl_row(row: RLRow, index: int, split: str) -> dict[str, Any]:
    """The columns that verl 0.5 to 0.9 read; ``ground_truth`` is messages in every row of every file.

    verl loads several files as one table, which fails where a column has different types.
    """
    return {
        "data_source": row.source,
        "prompt": row.prompt,
        "ability": row.ability,
        "reward_model": {"style": "polar", "ground_truth": _message(row.references[0])},
        "extra_info": {
            "split": split,
            "index": index,
            "ability": row.ability,
            "prompt": row.prompt,
            "references": row.references,
            "rule": row.rule or "",
        },
    }


def line_row(row: RLRow, framework: Framework) -> dict[str, Any]:
    """The columns for TRL's data sets, or for OpenRLHF's ``--data.input_key`` and ``--data.label_key``."""
    asked = {"prompt": row.prompt, "references": row.references, "rule": row.rule or ""}
    if framework == "trl":
        return {**asked, "ability": row.ability}
    return {"input": row.prompt, "label": asked}


def _write_lines(rows: Iterator[RLRow], target: Path, framework: Framework, split: str) -> None:
    with open_rows(target) as out:
        for row in rows:
            out.write(line_row(row, framework))


def _write_verl(rows: Iterator[RLRow], target: Path, framework: Framework, split: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from polar_ft.files import unfinished

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", turns),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", turns)])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("split", pa.string()),
                        ("index", pa.int64()),
                        ("ability", pa.string()),
                        ("prompt", turns),
                        ("references", pa.list_(pa.string())),
                        ("rule", pa.string()),
                    ]
                ),
            ),
        ]
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as partial, pq.ParquetWriter(partial, schema) as out:
        batch: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            batch.append(verl_row(row, index, split))
            if len(batch) == 1000:
                out.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
        if batch:
            out.write_batch(pa.RecordBatch.from_pylist(batch, schema))
