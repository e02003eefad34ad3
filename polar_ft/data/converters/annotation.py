"""Comparisons made in Label Studio and Argilla: one row for each decision of a labeller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from polar_ft.data.converters.format import TIED, Converted, Layout, described, with_extras
from polar_ft.data.records import RowError

SKIPPED = "that a labeller skipped"
UNDECIDED = "without a decision"
_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = (("answer1", "answer2"), ("text1", "text2"), ("response1", "response2"))
# What Label Studio says of a task next to its data.
_BOOKKEEPING = (
    "file_upload drafts predictions meta created_at updated_at inner_id total_annotations "
    "cancelled_annotations total_predictions comment_count unresolved_comment_count "
    "last_comment_updated_at project updated_by comment_authors"
).split()


class LabelStudioTask(Layout):
    """A task of Label Studio's export JSON, labelled with the tag Pairwise."""

    LAYOUT = "label-studio"
    READ = (
        "docs/source/guide/export.md, the template human-feedback-collection and Pairwise.js of Label "
        "Studio, 2026-11-24"
    )

    data: dict[str, Any] = described("an object with the prompt and two answers")
    annotations: list[dict[str, Any]] = described("a list of what labellers did")
    id: int | str | None = described("a number", default=None)


def label_studio(row: Mapping[str, Any]) -> Converted:
    """Converts a task of Label Studio: a pair for each annotation.

    The prompt is the task's ``prompt``, ``instruction`` or ``question``, or without them the field that
    ``--map prompt=data.NAME`` names. The answers are those that the annotation names in ``to_name`` if the
    tags are called like the data, else ``answer1`` and ``answer2``, ``text1`` and ``text2``, or ``response1``
    and ``response2``. The reference is the task's ``reference``, or empty. An annotation without a decision
    cannot be told from a tie: the tag knows only left and right.

    Raises:
        RowError: The row has another layout.

    >>> result = [{"type": "pairwise", "from_name": "comparison", "value": {"selected": "right"}}]
    >>> task = {"id": 7, "data": {"prompt": "2 + 2?", "answer1": "5", "answer2": "4"},
    ...         "annotations": [{"completed_by": 3, "lead_time": 4.5, "result": result}]}
    >>> pair = label_studio(task).rows[0]
    >>> [pair[name] for name in ("id", "prompt", "chosen", "rejected", "labeller", "seconds")]
    [7, '2 + 2?', '4', '5', '3', 4.5]
    """
    task = LabelStudioTask.of(row)
    left_out: Counter[str] = Counter()
    rows = []
    for annotation in task.annotations:
        result = _pairwise(annotation)
        side = result.get("value", {}).get("selected")
        if annotation.get("was_cancelled"):
            left_out[SKIPPED] += 1
        elif side not in ("left", "right"):
            left_out[UNDECIDED] += 1
        else:
            rows.append(_of_annotation(task, annotation, result, side))
    if not task.annotations:
        left_out[UNDECIDED] += 1
    return Converted(rows, left_out)


def _pairwise(annotation: Mapping[str, Any]) -> Mapping[str, Any]:
    results = annotation.get("result")
    found = (one for one in results if isinstance(one, dict)) if isinstance(results, list) else iter(())
    return next((one for one in found if one.get("type") == "pairwise"), {})


def _of_annotation(
    task: LabelStudioTask, annotation: Mapping[str, Any], result: Mapping[str, Any], side: str
) -> dict[str, Any]:
    data = task.data
    named = tuple(str(result.get("to_name", "")).split(","))
    answers = next(
        (names for names in (named, *_ANSWERS) if len(names) == 2 and {*names} <= data.keys()), None
    )
    if answers is None:
        raise RowError("data", f"has no answers — expected {_either(_ANSWERS)}, found {', '.join(data)}")
    prompt_name = next((name for name in _PROMPTS if name in data), None)
    given = (task.model_extra or {}).get("prompt") if prompt_name is None else None  # of --map
    if given is None and prompt_name is None:
        raise RowError("data", f"has no prompt — name it: --map prompt=data.NAME (found {', '.join(data)})")
    chosen, rejected = answers if side == "left" else answers[::-1]
    common = {"id": data.get("source_id", task.id)} if data.get("source_id", task.id) is not None else {}
    common["prompt"] = given if prompt_name is None else data[prompt_name]
    pair = _decided(common, data, data[chosen], data[rejected], _labeller(annotation.get("completed_by")))
    if annotation.get("lead_time") is not None:
        pair["seconds"] = annotation["lead_time"]
    used = {*answers, prompt_name, "reference", "source_id"}
    rest = {key: value for key, value in data.items() if key not in used and value is not None}
    mapped = ("prompt",) if given is not None else ()
    return with_extras(with_extras(pair, rest), task.rest(*_BOOKKEEPING, *mapped))


def _decided(
    common: Mapping[str, Any], texts: Mapping[str, Any], chosen: Any, rejected: Any, labeller: str | None
) -> dict[str, Any]:
    reference = texts.get("reference")
    pair = {**common, "reference": "" if reference is None else reference}
    pair |= {"chosen": chosen, "rejected": rejected}
    return pair if labeller is None else pair | {"labeller": labeller}


def _labeller(who: Any) -> str | None:
    """Who made an annotation: a number, or in some exports an object."""
    if isinstance(who, Mapping):
        who = who.get("email") or who.get("id")
    return None if who is None else str(who)


def _either(names: tuple[tuple[str, str], ...]) -> str:
    return ", or ".join(" and ".join(pair) for pair in names)


class ArgillaRecord(Layout):
    """A record of Argilla 2, as ``records.to_json()`` writes it."""

    LAYOUT = "argilla"
    READ = (
        "argilla/src/argilla/records/_resource.py, _io/_generic.py and settings/_templates.py of Argilla, "
        "2026-11-24"
    )

    fields: dict[str, Any] = described("an object with the instruction and the responses")
    responses: dict[str, Any] = described("an object with a list of answers for each question")
    id: int | str | None = described("a text", default=None)
    metadata: dict[str, Any] | None = described("an object", default=None)
    suggestions: dict[str, Any] | None = described("an object", default=None)
    vectors: dict[str, Any] | None = described("an object", default=None)
    server_id: str | None = Field(description="a text", default=None, alias="_server_id")
    status: str | None = described("a text", default=None)


def argilla(row: Mapping[str, Any]) -> Converted:
    """Converts a record of Argilla: a row for each labeller's answer to a question that orders its fields.

    Such are a ranking question whose values are names of fields, as of ``Settings.for_ranking()``, and a
    label question whose labels are the names of two fields, or "tie". Records are read as
    ``records.to_json()`` writes them, or flat, as a data set on the hub. A ranking of three or more becomes a
    ranked row. The prompt is the field ``instruction``, ``prompt`` or ``question``; the reference the field
    ``reference``, or empty. Drafts and discarded answers are left out where the record says so, which only
    flat ones do. A tie in a ranking is lost before: Argilla's client writes only the order.

    Raises:
        RowError: The row has another layout.

    >>> row = {"fields": {"instruction": "2 + 2?", "response1": "5", "response2": "4"},
    ...        "responses": {"ranking": [{"value": ["response2", "response1"], "user_id": "u"}]}}
    >>> argilla(row).rows
    [{'prompt': '2 + 2?', 'reference': '', 'chosen': '4', 'rejected': '5', 'labeller': 'u'}]
    >>> flat = {"instruction": "2 + 2?", "response1": "5", "response2": "4", "status": "completed",
    ...         "ranking.responses": [["response2", "response1"]], "ranking.responses.users": ["u"],
    ...         "ranking.responses.status": ["submitted"]}
    >>> argilla(flat).rows == argilla(row).rows
    True
    """
    record = ArgillaRecord.of(row if "fields" in row else _nested(row))
    left_out: Counter[str] = Counter()
    rows = []
    for answer in _answers_of(record):
        ranks = _ranks(answer.get("value"), record.fields)
        if ranks is None:
            continue
        if answer.get("status") in ("draft", "discarded"):
            left_out[SKIPPED] += 1
        elif len(set(ranks.values())) == 1:
            left_out[TIED] += 1
        else:
            rows.append(_of_record(record, ranks, answer.get("user_id")))
    if not rows and not left_out:
        left_out[UNDECIDED] += 1
    return Converted(rows, left_out)


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    """A flat record in the form of one of ``records.to_json()``."""
    questions = [key.removesuffix(".responses") for key in row if key.endswith(".responses")]
    if not questions:
        return dict(row)
    nested: dict[str, Any] = {"fields": {}, "responses": {}}
    for question in questions:
        columns = (row.get(f"{question}.responses{name}") or [] for name in ("", ".users", ".status"))
        nested["responses"][question] = [
            {"value": value, "user_id": user, "status": status}
            for value, user, status in zip(*columns, strict=True)
        ]
    for key, value in row.items():
        if key in ("id", "status", "_server_id"):
            nested[key] = value
        elif not key.startswith(tuple(f"{question}." for question in questions)) and value is not None:
            nested["fields"][key] = value
    return nested


def _answers_of(record: ArgillaRecord) -> Iterator[Mapping[str, Any]]:
    for answers in record.responses.values():
        yield from (answer for answer in answers or () if isinstance(answer, Mapping))


def _ranks(value: Any, fields: Mapping[str, Any]) -> dict[str, int] | None:
    """The rank of each field that an answer orders, 1 the best; None if it orders no fields."""
    if isinstance(value, str):
        pair = next((names for names in _ANSWERS if {*names} <= fields.keys()), ())
        if value == "tie" and pair:
            return dict.fromkeys(pair, 1)
        return {name: 1 if name == value else 2 for name in pair} if value in pair else None
    if not isinstance(value, list):
        return None
    ranks = {}
    for place, entry in enumerate(value, start=1):
        name = entry.get("value") if isinstance(entry, Mapping) else entry
        rank = entry.get("rank") if isinstance(entry, Mapping) else place
        if not isinstance(name, str) or name not in fields:
            return None
        ranks[name] = rank if isinstance(rank, int) else place
    return ranks if len(ranks) > 1 else None


def _of_record(record: ArgillaRecord, ranks: Mapping[str, int], user: Any) -> dict[str, Any]:
    fields = record.fields
    prompt_name = next((name for name in _PROMPTS if name in fields), None)
    if prompt_name is None:
        raise RowError("fields", f"has no {' or '.join(_PROMPTS)} — rename the field of the prompt")
    common = {} if record.id is None else {"id": record.id}
    common["prompt"] = fields[prompt_name]
    order = sorted(ranks, key=lambda name: ranks[name])
    row = _decided(common, fields, fields[order[0]], fields[order[-1]], _labeller(user))
    if len(order) > 2:
        del row["chosen"], row["rejected"]
        row["responses"] = [
            {"content" if isinstance(fields[name], str) else "messages": fields[name], "rank": ranks[name]}
            for name in order
        ]
    used = {*order, prompt_name, "reference"}
    rest = {key: value for key, value in fields.items() if key not in used and value is not None}
    return with_extras(with_extras(row, (record.metadata or {}) | rest), record.rest())
