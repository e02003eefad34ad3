"""Which of two runs is better on the same pairs, and by how much for sure?"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from polar_ft.errors import PolarError
from polar_ft.evaluation.pairs import Bools, Floats, Ints, PairTable
from polar_ft.evaluation.statistics.accuracy import wilson_interval
from polar_ft.evaluation.statistics.resampling import SEED, Interval, bootstrap_ratio, prompt_numbers

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
        n_nonfinite: Shared pairs without finite scores in both runs; left out.
        overall: All shared pairs.
        subsets: Field → value → the pairs of that subset.
        most_different: The pairs on which the runs differ most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_shared: int
    n_only_in_a: int
    n_only_in_b: int
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

    Pairs are matched by `ids`. Where one id stands for several pairs of a run, or a run has no ids, the two
    runs must hold the same pairs in the same order. Subsets and prompts are those of A.

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
    rows_a, rows_b = match(table_a.ids, table_b.ids, len(table_a), len(table_b))
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
        p_mcnemar=float(stats.binomtest(n_only_a, discordant).pvalue) if discordant else 1.0,
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


def match(ids_a: list[str] | None, ids_b: list[str] | None, n_a: int, n_b: int) -> tuple[Ints, Ints]:
    """Row numbers of the shared pairs in A and in B, in the order of A.

    Raises:
        PolarError: The pairs cannot be matched.

    >>> match(["x", "y", "z"], ["z", "w", "x"], 3, 3)
    (array([0, 2]), array([2, 0]))
    """
    if ids_a is None or ids_b is None:
        if n_a != n_b:
            which = "run A" if ids_a is None else "run B"
            raise PolarError(
                f"{which} has no ids and the runs have {n_a} and {n_b} pairs — add an id to each row, or "
                f"compare runs over the same rows"
            )
        return np.arange(n_a), np.arange(n_b)
    if ids_a == ids_b:
        return np.arange(n_a), np.arange(n_b)
    row_b = {name: row for row, name in enumerate(ids_b)}
    for run, ids, distinct in (("A", ids_a, len(set(ids_a))), ("B", ids_b, len(row_b))):
        if distinct < len(ids):
            raise PolarError(
                f"run {run} has the id {_first_repeated(ids)!r} more than once, and the runs are not over "
                f"the same rows in the same order — give each pair an id of its own"
            )
    shared = [(row, row_b[name]) for row, name in enumerate(ids_a) if name in row_b]
    if not shared:
        raise PolarError(
            f"the runs share no pair: ids of A begin with {ids_a[:2]}, those of B with {ids_b[:2]} — compare "
            f"runs over the same data"
        )
    rows = np.array(shared, dtype=np.int64)
    return rows[:, 0], rows[:, 1]


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
