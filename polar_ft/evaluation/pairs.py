"""What the figures are computed from: scored pairs by column, and ranked rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# What a ranked row may say in `benchmark`, and so which published summary it counts to.
REWARDBENCH_2 = "rewardbench-2"
RM_BENCH = "rm-bench"
RMB = "rmb"


@dataclass(frozen=True)
class Categories:
    """The value of one field for each pair: what pairs are grouped by.

    Attributes:
        names: The distinct values in the order in which they are shown.
        codes: Index into `names` for each pair, int32 `[pairs]`.
    """

    names: list[str]
    codes: NDArray[np.int32]

    @classmethod
    def from_values(cls, values: Sequence[str]) -> Categories:
        """Categories in alphabetical order.

        >>> categories = Categories.from_values(["code", "chat", "code"])
        >>> categories.names, categories.codes.tolist()
        (['chat', 'code'], [1, 0, 1])
        """
        names = sorted(set(values))
        code = {name: number for number, name in enumerate(names)}
        return cls(names, np.fromiter((code[value] for value in values), np.int32, len(values)))

    def rows(self) -> dict[str, NDArray[np.intp]]:
        """Row numbers of each category that has a row, in the order of `names`.

        >>> Categories(["a", "none", "b"], np.array([2, 0, 2], np.int32)).rows()
        {'a': array([1]), 'b': array([0, 2])}
        """
        order = np.argsort(self.codes, kind="stable")
        counts = np.bincount(self.codes, minlength=len(self.names))
        ends = np.cumsum(counts)
        return {
            name: order[end - count : end]
            for name, count, end in zip(self.names, counts, ends, strict=True)
            if count
        }


@dataclass(frozen=True)
class PairTable:
    """Scored pairs by column, `[pairs]` each; None where a column is not known.

    Attributes:
        chosen_score: Rewards of the chosen candidates; may hold NaN and infinities.
        rejected_score: Rewards of the rejected candidates.
        ids: Name of each pair.
        contents: Hash of the texts of each pair, by which runs are compared.
        contents_of: What was hashed; hashes of different things are not comparable.
        subsets: Field name → the pairs' values of that field; "subset" stands first where there is one.
        prompts: Number of the prompt of each pair: pairs of one prompt are not independent.
        chosen_chars: Characters of the chosen candidate before anything was cut; likewise rejected.
        chosen_tokens: Tokens of the chosen candidate before anything was cut; likewise rejected.
        cut: Whether any field of the pair was cut.
        reference_is_chosen: Whether the reference has the text of the chosen candidate.
        chosen_rouge: ROUGE-L F1 of the chosen candidate against the reference; likewise rejected. NaN where
            the reference is empty.
        shuffled_chosen: Reward of the chosen candidate with another row's reference; likewise rejected.
        empty_chosen: Reward of the chosen candidate with an empty reference; likewise rejected.

    Raises:
        ValueError: The columns are not of one length.
    """

    chosen_score: Floats
    rejected_score: Floats
    ids: list[str] | None = None
    contents: NDArray[np.uint64] | None = None
    contents_of: str = ""
    subsets: dict[str, Categories] = field(default_factory=dict)
    prompts: Ints | None = None
    chosen_chars: Ints | None = None
    rejected_chars: Ints | None = None
    chosen_tokens: Ints | None = None
    rejected_tokens: Ints | None = None
    cut: Bools | None = None
    reference_is_chosen: Bools | None = None
    chosen_rouge: Floats | None = None
    rejected_rouge: Floats | None = None
    shuffled_chosen: Floats | None = None
    shuffled_rejected: Floats | None = None
    empty_chosen: Floats | None = None
    empty_rejected: Floats | None = None

    def __post_init__(self) -> None:
        lengths = {
            column.name: len(getattr(self, column.name))
            for column in fields(self)
            if column.name not in ("subsets", "contents_of") and getattr(self, column.name) is not None
        }
        lengths |= {f"subsets[{name!r}]": len(values.codes) for name, values in self.subsets.items()}
        wrong = {name: length for name, length in lengths.items() if length != len(self.chosen_score)}
        if wrong:
            raise ValueError(f"columns of {len(self.chosen_score)} pairs with other lengths: {wrong}")

    def __len__(self) -> int:
        return len(self.chosen_score)

    @cached_property
    def margins(self) -> Floats:
        """Chosen minus rejected score; not finite where a score is not."""
        return margins(self.chosen_score, self.rejected_score)

    @cached_property
    def scored(self) -> Bools:
        """Which pairs have two finite scores."""
        return np.isfinite(self.margins)


@dataclass(frozen=True)
class Ranking:
    """One ranked row with the model's scores.

    Attributes:
        id: Name of the row.
        subset: The row's subset, None where it has none.
        prompt: Number of the prompt, the same numbering as in `PairTable.prompts`.
        model_scores: The model's reward of each candidate, `[candidates]`; may hold NaN and infinities.
        given: How good the data says each candidate is, `[candidates]`, higher is better.
        info: What the data says of each candidate in addition to its text, `[candidates]`.
        benchmark: Which benchmark the row is of (its field `benchmark`): `REWARDBENCH_2`, `RM_BENCH` or `RMB`
            make it count to that benchmark's own summary; see `polar_ft.evaluation.statistics.benchmarks`.
    """

    id: str
    subset: str | None
    prompt: int
    model_scores: Floats
    given: Floats
    info: list[dict[str, Any]]
    benchmark: str | None = None


def margins(chosen: ArrayLike, rejected: ArrayLike) -> Floats:
    """Chosen minus rejected score, `[pairs]`, in float64; not finite where a score is not.

    >>> margins([2.0, 1.0, float("inf")], [0.5, 1.0, float("inf")])
    array([1.5, 0. , nan])
    """
    chosen_scores = np.asarray(chosen, dtype=np.float64)
    rejected_scores = np.asarray(rejected, dtype=np.float64)
    if chosen_scores.ndim != 1 or chosen_scores.shape != rejected_scores.shape:
        raise ValueError(
            f"chosen and rejected must be of one shape [pairs], got {chosen_scores.shape} and "
            f"{rejected_scores.shape}"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        return chosen_scores - rejected_scores
