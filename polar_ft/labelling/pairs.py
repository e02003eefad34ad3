"""From rows to the pairs that are labelled, and their order.

What is read of a row: ``prompt``, ``reference`` (which may be missing) and answers, in one of three forms::

    {"prompt", "chosen", "rejected"}      two answers; which of them is called chosen has no meaning
    {"prompt", "responses": [...]}        texts, or objects with "content" or "messages"
    {"prompt", "candidates": [...]}       texts, or lists of messages
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from typing import Any

from polar_ft.data.problems import RowProblem
from polar_ft.data.reading import DataSource
from polar_ft.data.records import RowError, parse_row
from polar_ft.data.score_rows import parse_score_row
from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup, windows
from polar_ft.template import EncodeError

# Characters of the rows that are scored together.
CHARACTERS_AT_ONCE = 2**20

# Fields of a row that its labelled pairs keep; others (a margin, a policy) may be about the old order.
_KEPT = ("wrapper", "subset", "weight")

# Scores all candidates of each group.
Scorer = Callable[[Sequence[TextGroup]], list[list[float]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        text: Its text.
        value: As the row has it: a text or a list of messages.
        source: Its field, as ``candidates[2]``.
        policy: Who wrote it, if the row says.
        reward: The model's; None without a model.
    """

    text: str
    value: Any
    source: str
    policy: str | None = None
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two different answers to one prompt.

    Attributes:
        key: See `pair_key`.
        prompt: As the row has it: a text or a list of messages.
        reference: The text that is shown; may be empty.
        answers: The two, in the order of their texts, so that 0 and 1 mean the same whatever the order of the
            row.
        fields: Fields of the row that a labelled row keeps: its id, its reference, and the like.
    """

    key: str
    prompt: Any
    reference: str
    answers: tuple[Answer, Answer]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def margin(self) -> float | None:
        """Reward of the first answer minus that of the second; None without a model."""
        first, second = (answer.reward for answer in self.answers)
        return None if first is None or second is None else first - second


@dataclass(frozen=True, slots=True)
class Task:
    """A row: its group, and for each candidate of the group what the row says of it."""

    group: TextGroup
    prompt: Any
    answers: tuple[Answer, ...]
    fields: Mapping[str, Any]

    def pairs(self, most: int, rewards: Sequence[float] | None = None) -> list[Pair]:
        """The pairs of the row: the least certain ones, or without rewards any, but always the same.

        Args:
            most: Most pairs.
            rewards: The model's rewards of the answers, `[answers]`.
        """
        answers = self.answers
        if rewards is not None:
            answers = tuple(replace(one, reward=reward) for one, reward in zip(answers, rewards, strict=True))
        made = (self._pair(first, second) for first, second in combinations(answers, 2))
        return heapq.nsmallest(most, made, key=lambda pair: (abs(pair.margin or 0.0), pair.key))

    def _pair(self, first: Answer, second: Answer) -> Pair:
        if second.text < first.text:
            first, second = second, first
        key = pair_key(self.group, (first.text, second.text))
        return Pair(key, self.prompt, self.group.reference, (first, second), self.fields)


def pair_key(group: TextGroup, answers: Sequence[str]) -> str:
    """A name for a pair that depends only on its texts: rows may move, and their answers change places.

    >>> group = TextGroup("2 + 2?", ("",), ())
    >>> pair_key(group, ("4", "5")) == pair_key(group, ("5", "4")), len(pair_key(group, ("4", "5")))
    (True, 16)
    """
    return digest(group.wrapper, group.prompt, group.reference, *sorted(answers))[:16]


def digest(*texts: str) -> str:
    """The SHA-256 of texts, which no text can imitate by holding a separator."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_tasks(source: DataSource) -> tuple[list[Task], list[RowProblem]]:
    """Reads the rows of a source; what cannot be labelled is returned as problems.

    Raises:
        PolarError: There is no such file.
    """
    tasks: list[Task] = []
    problems: list[RowProblem] = []
    for place, row in source.rows():
        try:
            if isinstance(row, RowProblem):
                problems.append(row)
            else:
                tasks.append(parse_task(row, place))
        except RowError as error:
            problems.append(RowProblem.at(place, error))
    return tasks, problems


def parse_task(row: Mapping[str, Any], place: str) -> Task:
    """Checks a row whose answers are to be compared; equal ones count once.

    Args:
        row: The row.
        place: Its "file:line", which is its id if it has none.

    Raises:
        RowError: The row has no prompt, or fewer than two different answers, or a field has a wrong type.

    >>> task = parse_task({"prompt": "2 + 2?", "candidates": ["4", "5", "4"]}, "in.jsonl:1")
    >>> [(answer.source, answer.text) for answer in task.answers], task.fields
    ([('candidates[0]', '4'), ('candidates[1]', '5')], {'id': 'in.jsonl:1', 'reference': ''})
    """
    if "prompt" not in row:
        raise RowError("prompt", "is missing — add it, or name the field: polar-ft data convert --map")
    several = row.get("references")
    shown = several[0] if isinstance(several, list) and several else row.get("reference")
    common = {"prompt": row["prompt"], "reference": "" if shown is None else shown}
    if row.get("wrapper") is not None:
        common["wrapper"] = row["wrapper"]
    groups: dict[str, TextGroup] = {}
    answers = []
    for source, value, policy in _answers(row):
        try:
            group = parse_score_row(common | {"output": value})
        except RowError as error:
            raise RowError(error.field.replace("output", source, 1), error.reason) from None
        text = group.candidates[0]
        if text not in groups:
            groups[text] = group
            answers.append(Answer(text, value, source, policy))
    if len(answers) < 2:
        raise RowError("", f"has {len(answers)} different answers, and a comparison needs two")
    fields = {"id": str(row["id"]) if row.get("id") is not None else place}
    fields |= {"references": several} if several else {"reference": common["reference"]}
    fields |= {name: row[name] for name in _KEPT if row.get(name) is not None}
    # A decision that cannot be read again would close the folder of decisions to the next start.
    parse_row({"prompt": row["prompt"], "chosen": answers[0].value, "rejected": answers[1].value} | fields)
    first = groups[answers[0].text]
    group = TextGroup(first.prompt, first.references, tuple(groups), first.wrapper)
    return Task(group, row["prompt"], tuple(answers), fields)


def _answers(row: Mapping[str, Any]) -> Iterator[tuple[str, Any, str | None]]:
    """Field, value and policy of each answer."""
    for name in ("candidates", "responses"):
        entries = row.get(name)
        if entries is None:
            continue
        if not isinstance(entries, list):
            raise RowError(name, "must be a list of answers")
        for number, entry in enumerate(entries):
            policy = None
            if isinstance(entry, Mapping):
                policy, entry = entry.get("policy"), entry.get("content", entry.get("messages"))
            yield f"{name}[{number}]", entry, policy
        return
    if "chosen" not in row or "rejected" not in row:
        raise RowError("", "has no answers — it needs candidates, responses, or chosen and rejected")
    for name in ("chosen", "rejected"):
        yield name, row[name], row.get(f"{name}_policy")


def ordered_pairs(
    tasks: Sequence[Task],
    *,
    most: int = 1,
    score: Scorer | None = None,
    on_scored: Callable[[int], None] = lambda count: None,
) -> list[Pair]:
    """The pairs to label, each once: in the order of the rows, or the least certain ones first.

    The certainty of a model is |margin|, the difference of the rewards of the two answers.

    Args:
        tasks: The rows.
        most: Most pairs of a row.
        score: The model; None keeps the order of the rows.
        on_scored: Called with the number of rows scored since the last call.

    Raises:
        PolarError: The model cannot score a row.

    >>> answers = {"a?": ["yes", "no", "perhaps"], "b?": ["x", "y"]}
    >>> tasks = [parse_task({"prompt": prompt, "candidates": answers[prompt]}, "in:1") for prompt in answers]
    >>> def score(groups):  # the length of the answer is the reward
    ...     return [[float(len(text)) for text in group.candidates] for group in groups]
    >>> [[one.text for one in pair.answers] for pair in ordered_pairs(tasks, score=score)]
    [['x', 'y'], ['no', 'yes']]
    """
    found: dict[str, Pair] = {}
    if score is None:
        for task in tasks:
            found |= {pair.key: pair for pair in task.pairs(most) if pair.key not in found}
        return list(found.values())
    left = iter(tasks)
    for window in windows((task.group for task in tasks), CHARACTERS_AT_ONCE):
        try:
            scored = score(window)
        except EncodeError as error:
            task = next(islice(left, error.index, None))
            raise PolarError(f"row {task.fields['id']}: the model cannot read it: {error}") from error
        for rewards in scored:
            pairs = next(left).pairs(most, rewards)
            found |= {pair.key: pair for pair in pairs if pair.key not in found}
        on_scored(len(window))
    return sorted(found.values(), key=lambda pair: abs(pair.margin or 0.0))


def model_scorer(folder: str, **settings: Any) -> Scorer:
    """Loads the reward model of a folder; see `polar_ft.scoring.scorer.RewardScorer.from_pretrained`."""
    from polar_ft.scoring.scorer import RewardScorer

    return RewardScorer.from_pretrained(folder, **settings).score_examples


def server_scorer(address: str, model: str | None) -> Scorer:
    """Scores with a running server; its key is in POLAR_API_KEY.

    Args:
        address: ``host:port`` or a URL.
        model: Folder of the model, for its tokenizer; None asks the server where it is.
    """
    from polar_ft.client.client import RewardModelClient
    from polar_ft.client.commands import served_model

    client = RewardModelClient(model or served_model(address), server_address=address)

    def score(groups: Sequence[TextGroup]) -> list[list[float]]:
        rows = [
            {"prompt": group.prompt, "reference": group.reference, "wrapper": group.wrapper, "output": text}
            for group in groups
            for text in group.candidates
        ]
        rewards = iter(client(rows))
        return [[next(rewards) for _ in group.candidates] for group in groups]

    return score
