"""RMB (arXiv 2410.09893): pairs and best-of-N lists of real prompts without references.

The pairwise files have several pairs per prompt, so the best answer of a prompt can become the reference of
its other pairs, where it is known: from the answers' scores, which only commit 94c5976 of the repository has,
or from the pairs themselves, where they decide the order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polar_ft.data.converters.format import (
    TIED,
    Converted,
    Layout,
    Turn,
    described,
    messages,
    with_extras,
)
from polar_ft.data.records import RowError

HOLDS_REFERENCE = "with the answer that became the reference"
NO_THIRD = "of prompts with fewer than three answers"
TWO_SCORES = "with an answer that has two scores"
UNDECIDED = "of prompts whose pairs do not decide the order"
NO_SCORES = (
    "is missing: RMB's files have scores in one early commit only (git checkout 94c5976 in a clone); without "
    "them, --reference pairs takes the order from the pairs where they decide it, and --reference none (rmb) "
    "keeps all pairs without a reference"
)


class Answer(BaseModel):
    """An answer and the model that wrote it."""

    model_config = ConfigDict(strict=True)

    llm_name: str
    answer: str


class ScoredAnswer(Answer):
    """An answer of the pairwise files; its score, if the file has it, is at most 5."""

    score: float | None = None


class RMBPair(Layout):
    """A row of the Pairwise_set of RMB."""

    LAYOUT = "rmb"
    READ = "Pairwise_set of github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark at 2be3180, 2026-11-24"

    pair_uid: str = described("a string")
    conversation_input: list[Turn] = described("a list of messages", min_length=1)
    chosen: ScoredAnswer = described('an object with "llm_name", "answer" and perhaps "score"')
    reject: ScoredAnswer = described('an object with "llm_name", "answer" and perhaps "score"')
    category_path: str = described("a string")


class RMBBestOfN(Layout):
    """A row of the BoN_set of RMB."""

    LAYOUT = "rmb-bon"
    READ = "BoN_set of github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark at 2be3180, 2026-11-24"

    bon_uid: str = described("a string")
    conversation_input: list[Turn] = described("a list of messages", min_length=1)
    bon_best: Answer = described('an object with "llm_name" and "answer"')
    loser_list: list[Answer] = described('a list of objects with "llm_name" and "answer"', min_length=1)
    category_path: str = described("a string")


def same_prompt(row: Mapping[str, Any]) -> Hashable:
    """Key that is equal for the pairs of one prompt.

    Raises:
        RowError: The row has another layout.
    """
    return tuple((turn.role, turn.content) for turn in RMBPair.of(row).conversation_input)


def rmb(
    rows: Sequence[Mapping[str, Any]], *, reference: Literal["best", "pairs", "none"] = "best"
) -> Converted:
    """Converts the published pairs of one prompt.

    Reads the folder RMB_dataset/Pairwise_set of the repository, or files of it.

    Args:
        rows: All rows of the prompt.
        reference: "best" makes the answer with the highest score the reference (of several, the first one in
            the file) and drops the pairs that contain it; the pairs of an answer with two scores are dropped.
            "pairs" needs no scores: the reference is the answer that the pairs put above every other one,
            directly or through others; a prompt without such an answer gives no pair. "none" keeps all
            pairs, with an empty reference.

    Raises:
        RowError: "best" is asked for, and an answer has no score.

    >>> scores = {"A": 5.0, "B": 4.5, "C": 2.0}
    >>> def pair(uid, chosen, rejected):
    ...     answer = lambda text: {"llm_name": "m", "answer": text, "score": scores[text]}
    ...     return {"pair_uid": uid, "conversation_input": [{"role": "user", "content": "Hi"}],
    ...             "chosen": answer(chosen), "reject": answer(rejected),
    ...             "category_path": "Pairwise_set/Helpfulness/Chat/Discussion"}
    >>> done = rmb([pair("1", "A", "C"), pair("2", "B", "C")])
    >>> [(row["id"], row["reference"][0]["content"], row["subset"]) for row in done.rows]
    [('2', 'A', 'Helpfulness/Chat')]
    >>> done.left_out
    {'with the answer that became the reference': 1}
    >>> rmb([pair("1", "A", "C"), pair("2", "B", "C")], reference="pairs").left_out  # is A or B the best one?
    {'of prompts whose pairs do not decide the order': 2}
    """
    pairs = [RMBPair.of(row) for row in rows]
    if reference == "none":
        return Converted([_pair_row(p, None, _Scored.of(p.chosen), _Scored.of(p.reject)) for p in pairs])
    doubtful = _texts_with_two_scores(pairs) if reference == "best" else set()
    order = _by_score(pairs, doubtful) if reference == "best" else _by_pairs(pairs)
    done, left_out = [], Counter[str]()
    for pair in pairs:
        texts = {pair.chosen.answer, pair.reject.answer}
        if texts & doubtful:
            left_out[TWO_SCORES] += 1
        elif not order:
            left_out[UNDECIDED] += 1
        elif order[0].text in texts:
            left_out[HOLDS_REFERENCE] += 1
        else:
            done.append(_pair_row(pair, order[0], _Scored.of(pair.chosen), _Scored.of(pair.reject)))
    return Converted(done, dict(left_out))


def rmb_polar(
    rows: Sequence[Mapping[str, Any]], *, reference: Literal["best", "pairs"] = "best"
) -> Converted:
    """Converts a prompt by the POLAR paper's protocol: the best answer is the reference of the next two.

    One pair per prompt: is the second answer scored above the third (arXiv 2507.05197, section on
    evaluation)? Answers are ordered by score; of several with the same score the first in the file comes
    first, which matters if the best two are tied. A prompt gives no pair if its second and third answers are
    tied, if it has fewer than three answers, or if an answer with two scores may be among the first three.
    The paper does not say how it breaks ties, and its twelve categories are not in the files.

    Args:
        rows: All rows of the prompt.
        reference: "best" is the protocol, and needs scores. "pairs" needs none: only prompts whose pairs
            decide which three answers come first, and in which order, give a pair.

    Raises:
        RowError: "best" is asked for, and an answer has no score.
    """
    pairs = [RMBPair.of(row) for row in rows]
    order = _by_score(pairs) if reference == "best" else _by_pairs(pairs)
    if len({answer.answer for pair in pairs for answer in (pair.chosen, pair.reject)}) < 3:
        return Converted([], {NO_THIRD: 1})
    if len(order) < 3:
        return Converted([], {UNDECIDED: 1})
    best, second, third = order[:3]
    if reference == "pairs":
        return Converted([_pair_row(pairs[0], best, second, third)])
    doubtful = _texts_with_two_scores(pairs)
    if any(answer.text in doubtful and answer.level >= third.level for answer in order):
        return Converted([], {TWO_SCORES: 1})
    if second.score == third.score:
        return Converted([], {TIED: 1})
    return Converted([_pair_row(pairs[0], best, second, third)])


def rmb_bon(row: Mapping[str, Any]) -> Converted:
    """Converts a row of RMB's best-of-N set: the best answer has score 1, the others 0; no reference.

    Reads the folder RMB_dataset/BoN_set of the repository, or files of it.

    Raises:
        RowError: The row has another layout.

    >>> answer = lambda text: {"llm_name": "m", "answer": text}
    >>> row = {"bon_uid": "1", "conversation_input": [{"role": "user", "content": "Hi"}],
    ...        "bon_best": answer("A"), "loser_list": [answer("B"), answer("C")],
    ...        "category_path": "BoN_set/Harmlessness/S1"}
    >>> done = rmb_bon(row).rows[0]
    >>> done["subset"], [(r["content"], r["score"]) for r in done["responses"]]
    ('Harmlessness/S1', [('A', 1), ('B', 0), ('C', 0)])
    """
    ranked = RMBBestOfN.of(row)
    answers = [(ranked.bon_best, True), *((loser, False) for loser in ranked.loser_list)]
    result = {
        "id": ranked.bon_uid,
        **_category(ranked.category_path),
        "prompt": messages(ranked.conversation_input),
        "reference": "",
        "responses": [
            {"content": answer.answer, "score": int(correct), "correct": correct, "policy": answer.llm_name}
            for answer, correct in answers
        ],
    }
    return Converted([with_extras(result, ranked.rest())])


@dataclass(frozen=True)
class _Scored:
    text: str
    policy: str
    score: float | None

    @classmethod
    def of(cls, answer: ScoredAnswer) -> _Scored:
        return cls(answer.answer, answer.llm_name, answer.score)

    @property
    def level(self) -> float:
        """The score.

        Raises:
            RowError: There is none.
        """
        if self.score is None:
            raise RowError("score", NO_SCORES)
        return self.score


def _by_score(pairs: Sequence[RMBPair], without: Collection[str] = ()) -> list[_Scored]:
    """The distinct answers of a prompt, best first; equally good ones in the order of the file.

    A text that two models wrote (such as a short refusal) counts once, with the higher of its scores.
    """
    answers: dict[str, _Scored] = {}
    for pair in pairs:
        for answer in (_Scored.of(pair.chosen), _Scored.of(pair.reject)):
            if answer.text in without:
                continue
            if answer.text not in answers or answers[answer.text].level < answer.level:
                answers[answer.text] = answer
    return sorted(answers.values(), key=lambda answer: -answer.level)


def _texts_with_two_scores(pairs: Sequence[RMBPair]) -> set[str]:
    """Texts to which the rows give different scores as an answer of one model."""
    scores: dict[tuple[str, str], float | None] = {}
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.reject)]
    return {
        answer.answer
        for answer in answers
        if scores.setdefault((answer.llm_name, answer.answer), answer.score) != answer.score
    }


def _by_pairs(pairs: Sequence[RMBPair]) -> list[_Scored]:
    """The best answers of a prompt as far as its pairs decide: each is above all that are not before it.

    One answer is above another if it was chosen over it, or over an answer that is above it.
    """
    answers = {a.answer: _Scored.of(a) for pair in pairs for a in (pair.reject, pair.chosen)}
    over: dict[str, set[str]] = {text: set() for text in answers}
    for pair in pairs:
        if pair.chosen.answer != pair.reject.answer:
            over[pair.chosen.answer].add(pair.reject.answer)
    below = {text: _reached(text, over) for text in over}
    order, left = [], set(over)
    while left:
        # More than one where pairs contradict each other: a over b, b over c, c over a.
        above_all = [text for text in left if left - {text} <= below[text]]
        if len(above_all) != 1:
            break
        order.append(answers[above_all[0]])
        left.discard(above_all[0])
    return order


def _reached(text: str, over: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    todo = [text]
    while todo:
        new = over[todo.pop()] - reached
        reached |= new
        todo += new
    return reached


def _pair_row(pair: RMBPair, best: _Scored | None, chosen: _Scored, rejected: _Scored) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": pair.pair_uid,
        **_category(pair.category_path),
        "prompt": messages(pair.conversation_input),
        "reference": "" if best is None else _message(best),
        "chosen": _message(chosen),
        "rejected": _message(rejected),
    }
    for side, answer in (("reference", best), ("chosen", chosen), ("rejected", rejected)):
        if answer is not None:
            row |= {} if answer.score is None else {f"{side}_score": answer.score}
            row[f"{side}_policy"] = answer.policy
    return with_extras(row, pair.rest())


def _message(answer: _Scored) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer.text}]


def _category(path: str) -> dict[str, str]:
    """The subset of a row (goal and category), and its scenario if the category has several.

    >>> _category("Pairwise_set/Helpfulness/Chat/Discussion")
    {'subset': 'Helpfulness/Chat', 'scenario': 'Discussion', 'benchmark': 'rmb'}
    """
    _, *parts = path.split("/")
    names = {"subset": "/".join(parts[:2]) or path}
    if len(parts) > 2:
        names["scenario"] = "/".join(parts[2:])
    return names | {"benchmark": "rmb"}
