"""How far two ways to the same rewards lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from pydantic import BaseModel

from polar_ft.groups import TokenGroup
from polar_ft.parity.inputs import ParityInput

Rewards = list[list[float]]

# Upper ends of the length classes, in tokens; what is longer is the last class.
LENGTHS = (64, 256, 1024, 4096, 16384)


class LengthClass(BaseModel):
    """Differences over the texts of about one length.

    Attributes:
        up_to: Tokens of the longest text that belongs to the class; None where there is no limit.
        n: Texts.
        max_abs_diff: Largest difference of two rewards of a text; None where one is not finite.
        n_order_changes: Pairs of candidates of an input, both of this class, whose order is the other way.
        n_pairs: Such pairs.
    """

    up_to: int | None
    n: int
    max_abs_diff: float | None
    n_order_changes: int
    n_pairs: int


class Worst(BaseModel):
    """The text with the largest difference.

    Attributes:
        input: Index of the input, from 0.
        candidate: Index of the candidate, from 0.
        kind: What the input tests.
        tokens: Of the whole text.
        expected: Its reward by the scorer.
        found: Its reward by the other way.
    """

    input: int
    candidate: int
    kind: str
    tokens: int
    expected: float
    found: float


class Deviation(BaseModel):
    """One way to the rewards, against the scorer in this process.

    Attributes:
        name: Of the way.
        tolerance: Largest difference that is not an error; None where the way is shown for information.
        max_abs_diff: Largest difference of two rewards; None where one is not finite, or nothing was scored.
        n_order_changes: Pairs of candidates of an input whose order is the other way round.
        n_pairs: Pairs of candidates.
        lengths: The same by length.
        worst: The text with the largest difference.
        error: Why there are no rewards.
        note: What a reader should know.
    """

    name: str
    tolerance: float | None
    max_abs_diff: float | None = None
    n_order_changes: int = 0
    n_pairs: int = 0
    lengths: list[LengthClass] = []
    worst: Worst | None = None
    error: str | None = None
    note: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it agrees, or was not to be judged."""
        if self.tolerance is None:
            return True
        return self.error is None and self.max_abs_diff is not None and self.max_abs_diff <= self.tolerance


class ParityReport(BaseModel):
    """What ``polar-ft parity --json`` prints.

    Attributes:
        model: As the user named it.
        dtype: In which the scorer, the training code and transformers computed.
        device: Where.
        max_length: Limit of a text in tokens.
        max_response_length: Limit of a response in tokens.
        n_inputs: (prompt, reference).
        n_texts: Their candidates.
        min_reward: Of the scorer.
        max_reward: Of the scorer.
        rms_reward: Root mean square of the scorer's rewards, which default tolerances are relative to.
        comparisons: Each other way against the scorer.
        warnings: What is known to differ, whether or not it was seen.
        ok: Nothing is beyond its tolerance.
    """

    model: str
    dtype: str
    device: str
    max_length: int
    max_response_length: int
    n_inputs: int
    n_texts: int
    min_reward: float
    max_reward: float
    rms_reward: float
    comparisons: list[Deviation]
    warnings: list[str]
    ok: bool


def compare(
    name: str,
    inputs: Sequence[ParityInput],
    encoded: Sequence[TokenGroup],
    expected: Rewards,
    found: Rewards,
    tolerance: float | None,
) -> Deviation:
    """Compares the rewards of all candidates of all inputs.

    Args:
        name: Of the way that ``found`` came.
        inputs: What was scored.
        encoded: The same as tokens, for lengths.
        expected: By the scorer, ``[inputs][candidates]``.
        found: By the other way, likewise.
        tolerance: Of the comparison.
    """
    texts = [
        (i, j, len(encoded[i].sequences[j]), expected[i][j], found[i][j])
        for i in range(len(inputs))
        for j in range(len(inputs[i].candidates))
    ]
    i, j, tokens, should, was = max(texts, key=lambda text: _difference(text[3], text[4]))
    classes: list[LengthClass] = []
    lower = 0
    for upper in (*LENGTHS, None):
        members = {(a, b): (e, f) for a, b, n, e, f in texts if lower < n and (upper is None or n <= upper)}
        if members:
            changed, pairs = _order_changes(members)
            classes.append(
                LengthClass(
                    up_to=upper,
                    n=len(members),
                    max_abs_diff=_largest(members.values()),
                    n_order_changes=changed,
                    n_pairs=pairs,
                )
            )
        lower = upper or lower
    changed, pairs = _order_changes({(a, b): (e, f) for a, b, _, e, f in texts})
    return Deviation(
        name=name,
        tolerance=tolerance,
        max_abs_diff=_largest((e, f) for _, _, _, e, f in texts),
        n_order_changes=changed,
        n_pairs=pairs,
        lengths=classes,
        worst=Worst(input=i, candidate=j, kind=inputs[i].kind, tokens=tokens, expected=should, found=was),
    )


def _difference(expected: float, found: float) -> float:
    difference = abs(expected - found)
    return difference if math.isfinite(difference) else math.inf


def _largest(rewards: Iterable[tuple[float, float]]) -> float | None:
    largest = max(_difference(expected, found) for expected, found in rewards)
    return None if math.isinf(largest) else largest


def _order_changes(rewards: Mapping[tuple[int, int], tuple[float, float]]) -> tuple[int, int]:
    """Pairs of one input that the two ways order differently, and all pairs; equal rewards have no order."""
    by_input: dict[int, list[tuple[float, float]]] = {}
    for (i, _), pair in rewards.items():
        by_input.setdefault(i, []).append(pair)
    pairs = [pair for texts in by_input.values() for pair in combinations(texts, 2)]
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs), len(pairs)
