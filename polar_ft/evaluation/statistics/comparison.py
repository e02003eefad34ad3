"""Which of two runs is better on the same pairs, and by how much for sure?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from polar_ft.errors import PolarError
from polar_ft.evaluation.pairs import Bools, Floats, Ints, PairTable
from polar_ft.evaluation.statistics.accuracy import wilson_interval
from polar_ft.evaluation.statistics.resampling import SEED, Interval, bootstrap_ratio, prompt_numbers

Texts = NDArray[np.uint64]

# More than for an interval alone, as p-values are corrected for the number of subsets.
COMPARISON_SAMPLES = 10_000


class PairedDifference(BaseModel):
    """Accuracy of run B against run A on the pairs that both have scored.

    Attributes:
        n_pairs: Pairs with finite scores in both runs.
        n_prompts: Prompts that they belong to: what the bootstrap draws. None where prompts are not known;
            it then draws pairs.
        accuracy_a: Share of pairs that A has right; a tie is not right. None without pairs, as all below.
        accuracy_b: The same of B.
        difference: `accuracy_b` − `accuracy_a`.
        difference_ci95: 95 % interval of the difference, by the paired bootstrap.
        p_value: Two-sided, of no difference, by the same bootstrap.
        p_holm: `p_value` corrected for the number of subsets (Holm 1979); None for a row of its own.
        n_only_a: Pairs that A alone has right.
        n_only_b: Pairs that B alone has right.
        p_mcnemar: Exact McNemar test of `n_only_a` against `n_only_b`: a check that knows nothing of prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_pairs: int
    n_prompts: int | None
    accuracy_a: float | None
    accuracy_b: float | None
    difference: float | None
    difference_ci95: Interval | None
    p_value: float | None
    p_holm: float | None = None
    n_only_a: int
    n_only_b: int
    p_mcnemar: float | None


class DifferingPair(BaseModel):
    """A pair that the runs see differently: its id, its row in A and in B, and both margins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    row_a: int
    row_b: int
    margin_a: float
    margin_b: float


class Comparison(BaseModel):
    """Run B against run A.

    Attributes:
        n_shared: Pairs that both runs have.
        n_only_in_a: Pairs of A that B does not have; left out, as `n_only_in_b`.
        n_only_in_b: Pairs of B that A does not have.
        matched_by: "texts", or "ids" where the runs' scores do not both say what their texts are.
        n_other_texts: Pairs of A whose id B has with other texts: not the same pair, left out.
        n_nonfinite: Shared pairs without finite scores in both runs; left out.
        overall: All shared pairs.
        subsets: Field → value → the pairs of that subset.
        most_different: The pairs on which the runs differ most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_shared: int
    n_only_in_a: int
    n_only_in_b: int
    matched_by: Literal["texts", "ids"]
    n_other_texts: int
    n_nonfinite: int
    overall: PairedDifference
    subsets: dict[str, dict[str, PairedDifference]]
    most_different: list[DifferingPair]


def compare(
    table_a: PairTable,
    table_b: PairTable,
    *,
    samples: int = COMPARISON_SAMPLES,
    seed: int = SEED,
    n_different: int = 20,
) -> Comparison:
    """Compares run B with run A on the pairs that both have.

    Pairs are matched by their texts, or by their ids where a run's texts are not known; see `match`. Subsets
    and prompts are those of A.

    Args:
        table_a: Run A.
        table_b: Run B.
        samples: Samples of each bootstrap; a p-value cannot be less than about 2 / samples.
        seed: Of the bootstraps.
        n_different: Length of `most_different`.

    Raises:
        PolarError: The runs' pairs cannot be matched.

    >>> a = PairTable(np.array([1.0, 1, 0]), np.array([0.0, 0, 3]), ids=["x", "y", "z"])
    >>> b = PairTable(np.array([5.0, 1, 7]), np.array([0.0, 2, 7]), ids=["z", "y", "w"])
    >>> result = compare(a, b, n_different=1)
    >>> result.n_shared, result.overall.accuracy_a, result.overall.accuracy_b
    (2, 0.5, 0.5)
    >>> result.most_different
    [DifferingPair(id='z', row_a=2, row_b=0, margin_a=-3.0, margin_b=5.0)]
    """
    matched = match(table_a, table_b)
    rows_a, rows_b = matched.rows_a, matched.rows_b
    margin_a, margin_b = table_a.margins[rows_a], table_b.margins[rows_b]
    prompts = None if table_a.prompts is None else table_a.prompts[rows_a]

    def difference(at: Ints | slice) -> PairedDifference:
        return paired_difference(
            margin_a[at],
            margin_b[at],
            None if prompts is None else prompts[at],
            samples=samples,
            seed=seed,
        )

    subsets = {}
    for field, categories in table_a.subsets.items():
        codes = categories.codes[rows_a]
        groups = type(categories)(categories.names, codes).rows()
        subsets[field] = holm({name: difference(at) for name, at in groups.items()})
    return Comparison(
        n_shared=len(rows_a),
        n_only_in_a=len(table_a) - len(rows_a),
        n_only_in_b=len(table_b) - len(rows_b),
        matched_by=matched.by,
        n_other_texts=matched.n_other_texts,
        n_nonfinite=int(np.count_nonzero(~np.isfinite(margin_a) | ~np.isfinite(margin_b))),
        overall=difference(slice(None)),
        subsets=subsets,
        most_different=_most_different(table_a, table_b, rows_a, rows_b, n_different),
    )


def paired_difference(
    margin_a: Floats,
    margin_b: Floats,
    prompts: Ints | None = None,
    *,
    samples: int = COMPARISON_SAMPLES,
    seed: int = SEED,
) -> PairedDifference:
    """Accuracy of B against A on the same pairs, those with finite margins in both.

    Each sample of the bootstrap draws prompts with all their pairs, and both runs' results on them, so what
    makes a prompt easy or hard for both cancels. Where the difference is the same for every prompt, as for
    two runs that are right on the same pairs, there is nothing to vary: the interval then reaches as far as
    the upper Wilson limit of a thing not seen in so many prompts, and p is that of a sign test over prompts.

    Args:
        margin_a: Chosen − rejected score of A, `[pairs]`.
        margin_b: The same of B, `[pairs]`.
        prompts: Number of the prompt of each pair, `[pairs]`; None for a prompt a pair.
        samples: Samples of the bootstrap.
        seed: Of the bootstrap.

    Of four pairs A has two right, B the same and one more, which is no evidence: one pair in which they
    differ falls to either side by chance, p = 1:

    >>> result = paired_difference(np.array([1.0, 1, -1, -1]), np.array([1.0, 1, 1, -1]))
    >>> result.accuracy_a, result.accuracy_b, result.difference, result.n_only_b, result.p_mcnemar
    (0.5, 0.75, 0.25, 1, 1.0)
    """
    both = np.isfinite(margin_a) & np.isfinite(margin_b)
    right_a, right_b = margin_a[both] > 0, margin_b[both] > 0
    numbers = None if prompts is None else prompt_numbers(prompts[both])
    n_pairs = len(right_a)
    n_only_a, n_only_b = _count(right_a & ~right_b), _count(right_b & ~right_a)
    if not n_pairs:
        return PairedDifference(
            n_pairs=0,
            n_prompts=None if prompts is None else 0,
            accuracy_a=None,
            accuracy_b=None,
            difference=None,
            difference_ci95=None,
            p_value=None,
            n_only_a=0,
            n_only_b=0,
            p_mcnemar=None,
        )
    gain = right_b.astype(np.float64) - right_a
    boot = bootstrap_ratio(gain, np.ones(n_pairs), numbers, samples=samples, seed=seed)
    if boot.has_spread:
        interval, p_value = boot.interval(), boot.p_value()
    else:
        unseen = wilson_interval(0, boot.n_prompts)[1]
        interval = max(-1.0, boot.estimate - unseen), min(1.0, boot.estimate + unseen)
        p_value = 1.0 if boot.estimate == 0 else min(1.0, 2 * 0.5**boot.n_prompts)
    discordant = n_only_a + n_only_b
    return PairedDifference(
        n_pairs=n_pairs,
        n_prompts=None if prompts is None else boot.n_prompts,
        accuracy_a=float(right_a.mean()),
        accuracy_b=float(right_b.mean()),
        difference=boot.estimate,
        difference_ci95=interval,
        p_value=p_value,
        n_only_a=n_only_a,
        n_only_b=n_only_b,
        p_mcnemar=float(scipy.stats.binomtest(n_only_a, discordant).pvalue) if discordant else 1.0,
    )


def holm(rows: dict[str, PairedDifference]) -> dict[str, PairedDifference]:
    """The rows with `p_holm`: p-values that keep the chance of any false alarm among them at its level.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979): the i-th smallest of m p-values is multiplied by m − i + 1, and none is below the one before it.
    Unlike a bound on false discoveries it needs nothing to hold of how the subsets depend on one another.

    >>> row = paired_difference(np.array([1.0]), np.array([1.0]))
    >>> rows = {name: row.model_copy(update={"p_value": p}) for name, p in [("a", 0.04), ("b", 0.01)]}
    >>> {name: row.p_holm for name, row in holm(rows).items()}
    {'a': 0.04, 'b': 0.02}
    """
    tested = {name: row.p_value for name, row in rows.items() if row.p_value is not None}
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(tested, key=tested.__getitem__)):
        least = max(least, min(1.0, tested[name] * (len(tested) - rank)))
        corrected[name] = least
    return {name: row.model_copy(update={"p_holm": corrected.get(name)}) for name, row in rows.items()}


@dataclass(frozen=True)
class Matched:
    """Which pair of B is which of A.

    Attributes:
        rows_a: Row numbers of the shared pairs in A, ascending, `[shared]`.
        rows_b: Row numbers of the same pairs in B, `[shared]`.
        by: What they were matched by.
        n_other_texts: Pairs of A whose id B has with other texts.
    """

    rows_a: Ints
    rows_b: Ints
    by: Literal["texts", "ids"]
    n_other_texts: int = 0


def match(a: PairTable, b: PairTable) -> Matched:
    """Finds the pairs that both runs have, by their texts where both know these, else by ids that are unique.

    The order of the rows says nothing: a file may have been sorted or filtered in between. Texts that occur
    several times are told apart by their ids; copies that these do not tell apart are matched if a run scores
    all of them the same, so that it does not matter which is which, and are left out otherwise.

    Raises:
        PolarError: The pairs cannot be matched, or none is shared.

    >>> zeros = np.zeros(3)
    >>> a = PairTable(zeros, zeros, ids=["x", "y", "z"], contents=np.array([7, 8, 9], np.uint64))
    >>> b = PairTable(zeros, zeros, ids=["z", "y", "x"], contents=np.array([7, 6, 9], np.uint64))
    >>> match(a, b)
    Matched(rows_a=array([0, 2]), rows_b=array([0, 2]), by='texts', n_other_texts=3)
    """
    if a.contents is not None and b.contents is not None and a.contents_of == b.contents_of:
        pairs = _same_texts(a, b, a.contents, b.contents)
        n_other = _count_other_texts(a, b, a.contents, b.contents)
        if not pairs:
            though = f", though {n_other:,} of the ids are" if n_other else ""
            raise PolarError(
                f"the runs share no pair: none of their texts are the same{though} — compare runs over the "
                f"same data"
            )
        rows = np.array(pairs, dtype=np.int64)
        return Matched(rows[:, 0], rows[:, 1], "texts", n_other)
    if a.ids is None or b.ids is None:
        run = "A" if a.ids is None else "B"
        raise PolarError(
            f"run {run} has no ids, and the texts of the pairs are not known in both runs — pairs are not "
            f"matched by their order: add an id to each row, or the columns prompt, chosen and rejected"
        )
    for run, ids in (("A", a.ids), ("B", b.ids)):
        if len(set(ids)) < len(ids):
            raise PolarError(
                f"run {run} has the id {_first_repeated(ids)!r} more than once, and the texts of the pairs "
                f"are not known in both runs — give each pair an id of its own"
            )
    row_b = {name: row for row, name in enumerate(b.ids)}
    shared = [(row, row_b[name]) for row, name in enumerate(a.ids) if name in row_b]
    if not shared:
        raise PolarError(
            f"the runs share no pair: ids of A begin with {a.ids[:2]}, those of B with {b.ids[:2]} — compare "
            f"runs over the same data"
        )
    rows = np.array(shared, dtype=np.int64)
    return Matched(rows[:, 0], rows[:, 1], "ids")


def _same_texts(a: PairTable, b: PairTable, texts_a: Texts, texts_b: Texts) -> list[tuple[int, int]]:
    """Rows of A and B with the same texts."""
    rows_of: tuple[dict[int, list[int]], dict[int, list[int]]] = defaultdict(list), defaultdict(list)
    for rows, texts in zip(rows_of, (texts_a, texts_b), strict=True):
        for row, text in enumerate(texts.tolist()):
            rows[text].append(row)
    found = []
    for text, rows_a in rows_of[0].items():
        rows_b = rows_of[1].get(text, [])
        if len(rows_a) == len(rows_b) == 1:
            found.append((rows_a[0], rows_b[0]))
        elif rows_b:
            found += _copies(a, b, rows_a, rows_b)
    return sorted(found)


def _copies(a: PairTable, b: PairTable, rows_a: list[int], rows_b: list[int]) -> list[tuple[int, int]]:
    """Of pairs with the same texts those with the same id, and the others if a run scores them all alike."""
    found = []
    if a.ids is not None and b.ids is not None:
        ids_a, ids_b = [a.ids[row] for row in rows_a], [b.ids[row] for row in rows_b]
        for name in set(ids_a) & set(ids_b):
            if ids_a.count(name) == ids_b.count(name) == 1:
                found.append((rows_a[ids_a.index(name)], rows_b[ids_b.index(name)]))
    done_a, done_b = {row for row, _ in found}, {row for _, row in found}
    rest_a, rest_b = [r for r in rows_a if r not in done_a], [r for r in rows_b if r not in done_b]
    if all(len(np.unique(table.margins[rest])) <= 1 for table, rest in ((a, rest_a), (b, rest_b)) if rest):
        found += zip(rest_a, rest_b, strict=False)
    return found


def _count_other_texts(a: PairTable, b: PairTable, texts_a: Texts, texts_b: Texts) -> int:
    if a.ids is None or b.ids is None:
        return 0
    texts_of: dict[str, set[int]] = {}
    for name, text in zip(b.ids, texts_b.tolist(), strict=True):
        texts_of.setdefault(name, set()).add(text)
    return sum(
        name in texts_of and text not in texts_of[name]
        for name, text in zip(a.ids, texts_a.tolist(), strict=True)
    )


def _most_different(
    table_a: PairTable, table_b: PairTable, rows_a: Ints, rows_b: Ints, n: int
) -> list[DifferingPair]:
    """The pairs whose margins are furthest apart, each run's margins in units of their own spread.

    Runs may score on different scales, so that the difference of raw margins would be the larger scale's.
    """
    margin_a, margin_b = table_a.margins[rows_a], table_b.margins[rows_b]
    apart = np.abs(margin_b / _spread(margin_b) - margin_a / _spread(margin_a))
    apart[~np.isfinite(apart)] = -1.0
    order = np.argsort(-apart, kind="stable")[:n]
    return [
        DifferingPair(
            id=str(rows_a[at] + 1) if table_a.ids is None else table_a.ids[rows_a[at]],
            row_a=int(rows_a[at]),
            row_b=int(rows_b[at]),
            margin_a=float(margin_a[at]),
            margin_b=float(margin_b[at]),
        )
        for at in order.tolist()
        if apart[at] > 0
    ]


def _spread(margin: Floats) -> float:
    """Root mean square of the finite margins; 1 where there is none or all are 0."""
    finite = margin[np.isfinite(margin)]
    return float(np.sqrt(np.mean(finite**2))) or 1.0 if len(finite) else 1.0


def _count(rows: Bools) -> int:
    return int(np.count_nonzero(rows))


def _first_repeated(ids: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
