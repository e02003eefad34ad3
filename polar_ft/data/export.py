"""Writes rows of polar_ft as TRL, OpenRLHF, LLaMA-Factory, Label Studio and Argilla read them.

The first three read lists of messages and apply the chat template of their model, so all texts become
messages, and every row has the same fields (`datasets` refuses a column of texts and lists). Read in their
loaders on 2026-11-24: ``trl/trainer/reward_trainer.py``, ``openrlhf/datasets/reward_dataset.py``, and
``src/llamafactory/data/converter.py``.

In the last two people compare answers: the two are put in an order that depends on their texts alone, and
which of them is chosen is not written. The layouts are those of `polar_ft.data.converters.annotation`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polar_ft.data.converters.ranked import ranked
from polar_ft.data.problems import RowProblem, raise_problems
from polar_ft.data.reading import MAX_LINE_MB, OnBytes, expand, read_rows
from polar_ft.data.records import Message, Pairing, PairRow, RowError, parse_row, text_of
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError

Turns = list[dict[str, str]]
_WRITTEN = {"id", "prompt", "chosen", "rejected", "margin", "reference", "references", "weight", "wrapper"}


@dataclass
class Export:
    """Counts of an export.

    Attributes:
        rows_in: Rows that were read.
        pairs: Pairs that were written.
        ties: Pairs of ranked rows that were left out because both responses are ranked the same.
        left_out: Number of pairs that the other framework cannot read, by reason.
        lost: Number of written pairs that had something for which the other framework has no place.
        problems: Rows that cannot be used.
    """

    rows_in: int = 0
    pairs: int = 0
    ties: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    problems: list[RowProblem] = field(default_factory=list)


class _UnreadableError(Exception):
    """A pair that the other framework cannot read; the message says why."""


@dataclass(frozen=True)
class _Pair:
    """A pair as messages.

    Attributes:
        id: Its id.
        prompt: The messages of the prompt.
        chosen: The messages of the better answer.
        rejected: The messages of the worse answer.
        reference: The text of the (first) reference.
    """

    id: str
    prompt: Turns
    chosen: Turns
    rejected: Turns
    reference: str


def _trl(pair: _Pair) -> dict[str, Any]:
    return {"id": pair.id, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _openrlhf(pair: _Pair) -> dict[str, Any]:
    return {"id": pair.id, "chosen": pair.prompt + pair.chosen, "rejected": pair.prompt + pair.rejected}


_TAGS = {"user": "human", "assistant": "gpt", "tool": "observation"}


def _llama_factory(pair: _Pair) -> dict[str, Any]:
    """A row of the sharegpt layout; what its loader would skip with a warning cannot be written."""
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if len(chosen) > 1 or len(rejected) > 1:
        raise _UnreadableError("whose answer is several messages, where LLaMA-Factory has one")
    system, turns = (prompt[:1], prompt[1:]) if prompt[0]["role"] == "system" else ([], prompt)
    for at, turn in enumerate([*turns, chosen[0]]):
        if turn["role"] not in (("user", "tool"), ("assistant",))[at % 2]:
            raise _UnreadableError("whose turns do not alternate between user and assistant")
    spoken = [{"from": "system", "value": turn["content"]} for turn in system]
    spoken += [_spoken(turn) for turn in turns]
    sides = {"chosen": _spoken(chosen[0]), "rejected": _spoken(rejected[0])}
    return {"id": pair.id, "conversations": spoken, **sides}


def _spoken(turn: Mapping[str, str]) -> dict[str, str]:
    return {"from": _TAGS[turn["role"]], "value": turn["content"]}


def _label_studio(pair: _Pair) -> dict[str, Any]:
    first, second = _in_any_order(pair)
    data = {"prompt": _as_text(pair.prompt), "answer1": first, "answer2": second, "source_id": pair.id}
    return {"data": data | ({"reference": pair.reference} if pair.reference else {})}


def _argilla(pair: _Pair) -> dict[str, Any]:
    first, second = _in_any_order(pair)
    fields = {"instruction": _as_text(pair.prompt), "response1": first, "response2": second}
    return {"id": pair.id, "fields": fields | ({"reference": pair.reference} if pair.reference else {})}


def _in_any_order(pair: _Pair) -> list[str]:
    """The answers in an order that says nothing of which is better, and is the same in every export."""
    texts = ["\n".join(turn["content"] for turn in turns) for turns in (pair.chosen, pair.rejected)]
    return sorted(texts, key=lambda text: hashlib.sha256(f"{pair.prompt} {text}".encode()).digest())


def _as_text(turns: Turns) -> str:
    r"""A prompt as one text; several turns with their roles.

    >>> _as_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'user: Hi\n\nassistant: Hello'
    """
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


@dataclass(frozen=True)
class Target:
    """A framework: how a pair of it is made, and how it is told to read the file.

    Attributes:
        make: Makes a row of a pair.
        usage: How the framework is told to read the file, with {path}, {file} and {name} for the file, its
            name, and its name without the suffix.
        has_margin: Whether its rows may have a margin.
        is_for_people: Whether people are to compare the answers: it shows the reference and texts instead of
            messages, and reads one list of all rows.
    """

    make: Callable[[_Pair], dict[str, Any]]
    usage: str
    has_margin: bool = True
    is_for_people: bool = False

    @property
    def suffix(self) -> str:
        """How the name of its file ends."""
        return ".json" if self.is_for_people else ".jsonl"


TARGETS = {
    "trl": Target(
        _trl, 'read it with load_dataset("json", data_files="{path}", split="train"), for RewardTrainer'
    ),
    "openrlhf": Target(
        _openrlhf,
        "read it with --data.dataset {path} --data.chosen_key chosen --data.rejected_key rejected "
        "--data.apply_chat_template",
    ),
    "llama-factory": Target(
        _llama_factory,
        'add to the dataset_info.json of its folder: "{name}": {{"file_name": "{file}", "formatting": '
        '"sharegpt", "ranking": true, "columns": {{"messages": "conversations", "chosen": "chosen", '
        '"rejected": "rejected"}}}}',
        has_margin=False,
    ),
    "label-studio": Target(
        _label_studio,
        "import it into a project with the template Human Preference collection for RLHF (for references add "
        '<Text name="reference" value="$reference"/>); export as JSON, and read that with '
        "polar-ft data convert label-studio",
        has_margin=False,
        is_for_people=True,
    ),
    "argilla": Target(
        _argilla,
        "make a dataset with rg.Settings.for_ranking() (for references: settings.fields.add(rg.TextField("
        'name="reference", required=False))), and load it: dataset.records.from_json("{path}"); read what '
        "dataset.records.to_json() writes with polar-ft data convert argilla",
        has_margin=False,
        is_for_people=True,
    ),
}


def export_rows(
    name: str,
    sources: Sequence[str],
    path: Path,
    *,
    pairing: Pairing = "adjacent",
    reference: Literal["best", "none"] = "best",
    margins: bool = False,
    split: str = "train",
    max_line_mb: float = MAX_LINE_MB,
    on_bytes: OnBytes | None = None,
) -> Export:
    """Writes pairs as another framework reads them.

    A ranked row becomes the pairs that polar_ft trains on. What has no place there is counted.

    Args:
        name: A key of `TARGETS`.
        sources: See `polar_ft.data.reading.DataSource.path`.
        path: The file to write, .jsonl or as `Target.suffix` says; replaced if it exists.
        pairing: "adjacent" or "all", for ranked rows.
        reference: For ranked rows without a reference: "best" leaves the best response out, as in training,
            where it becomes the reference; "none" pairs all responses.
        margins: Write the margins, which every pair must then have; TRL and OpenRLHF subtract them in the
            loss.
        split: Split of a HuggingFace data set.
        max_line_mb: Longest line that is read, in 2**20 bytes.
        on_bytes: See `read_rows`.

    Raises:
        DataError: A row cannot be used; nothing is written.
        PolarError: There is no such framework or file, or nothing can be written.
    """
    target = TARGETS.get(name)
    if target is None:
        raise PolarError(f"{name}: no such framework; there are {', '.join(TARGETS)}")
    if margins and not target.has_margin:
        raise PolarError(f"--margins: the rows of {name} have no place for a margin; leave it out")
    if not path.name.endswith(target.suffix):
        raise PolarError(
            f"{path}: the other frameworks know a file by its suffix; let it end in {target.suffix}"
        )
    done = Export()
    for source in sources:
        expand(source)
    with open_rows(path) as out:
        for source in sources:
            for place, row in read_rows(source, split, max_line_mb=max_line_mb, on_bytes=on_bytes):
                done.rows_in += 1
                if isinstance(row, RowProblem):
                    done.problems.append(row)
                    continue
                try:
                    converted = ranked(row, pairing=pairing, reference=reference)
                    at, several = Path(place).name, len(converted.rows) > 1
                    made = [
                        _made(target, pair, f"{at}-{number}" if several else at, margins, done)
                        for number, pair in enumerate(converted.rows, start=1)
                    ]
                except RowError as error:
                    done.problems.append(RowProblem.at(place, error))
                    continue
                done.ties += sum(converted.left_out.values())
                for pair in made:
                    if pair is not None:
                        out.write(pair)
                        done.pairs += 1
        raise_problems(done.problems)
        if not out.count:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in done.left_out.items())
            raise PolarError(
                f"no pair of {', '.join(sources)} can be written for {name} ({reasons or 'no pair'})"
            )
    return done


def _made(
    target: Target, row: Mapping[str, Any], place: str, margins: bool, done: Export
) -> dict[str, Any] | None:
    """The row of a pair; None if the framework cannot read it, which is counted."""
    pair = parse_row(row)
    assert isinstance(pair, PairRow)
    if margins and pair.margin is None:
        raise RowError("margin", "is missing, but --margins writes the margin of every pair")
    prompt, chosen = _turns(pair.prompt, "user"), _turns(pair.chosen, "assistant")
    rejected = _turns(pair.rejected, "assistant")
    try:
        if not prompt or not chosen or not rejected:
            raise _UnreadableError("whose prompt or answer has no message")
        references = pair.references or [pair.reference]
        made = target.make(
            _Pair(str(row.get("id") or place), prompt, chosen, rejected, text_of(references[0]))
        )
    except _UnreadableError as error:
        done.left_out[str(error)] += 1
        return None
    has = {
        "a reference": (pair.references or pair.reference) and not target.is_for_people,
        "several references, of which the first was written": target.is_for_people
        and len(pair.references or ()) > 1,
        "a prompt of several turns, which became one text": target.is_for_people and len(prompt) > 1,
        "a margin": pair.margin is not None and not margins,
        "a weight other than 1": pair.weight != 1,
        'the wrapper "pretrain", which is no dialogue': pair.wrapper != "sft",
        "other fields": {key for key, value in row.items() if value is not None} - _WRITTEN,
    }
    done.lost.update(what for what, value in has.items() if value)
    return made | ({"margin": pair.margin} if margins else {})


def _turns(text: str | Sequence[Message], role: str) -> Turns:
    """The messages of a field; a text is one message of a role.

    >>> _turns("Hi", "user")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return [{"role": message.role, "content": message.content} for message in text]
