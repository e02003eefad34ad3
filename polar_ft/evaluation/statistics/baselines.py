"""What the same pairs give without a model, with which an accuracy has to be compared."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.pairs import Categories, PairTable


class Baseline(BaseModel):
    """Accuracy of a rule without a model, ties counted as half; None where no pair was scored.

    Attributes:
        overall: Over all scored pairs.
        macro: Mean over the subsets of the field "subset"; None without subsets.
        subsets: Field → value → over the pairs of that subset.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: float | None
    macro: float | None
    subsets: dict[str, dict[str, float | None]]


class Baselines(BaseModel):
    """The rules that every accuracy is compared with, on the pairs that the accuracy is over.

    Attributes:
        longer_wins: The candidate with more characters (Unicode code points of its text, before anything is
            cut) is taken as the better one; equal lengths count as half. None where lengths are not known.
        shorter_wins: The one with fewer: always 1 − `longer_wins`.
        most_like_reference: The one with the higher ROUGE-L F1 against the reference. None where that is not
            known. A pair with an empty reference counts as half.
        chance: A coin: 0.5.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    longer_wins: Baseline | None
    shorter_wins: Baseline | None
    most_like_reference: Baseline | None
    chance: float = 0.5


def baselines(table: PairTable) -> Baselines:
    """The rules, on the pairs with finite scores: a pair without has no part in the accuracy either.

    >>> same = np.zeros(3)
    >>> table = PairTable(same, same, chosen_chars=np.array([9, 4, 1]), rejected_chars=np.array([3, 8, 5]))
    >>> both = baselines(table)
    >>> round(both.longer_wins.overall, 3), round(both.shorter_wins.overall, 3), both.most_like_reference
    (0.333, 0.667, None)
    """
    longer = shorter = like_reference = None
    if table.chosen_chars is not None and table.rejected_chars is not None:
        difference = (table.chosen_chars - table.rejected_chars).astype(np.float64)
        longer, shorter = _baseline(difference, table), _baseline(-difference, table)
    if table.chosen_rouge is not None and table.rejected_rouge is not None:
        # NaN, for an empty reference, says nothing about either candidate.
        difference = np.nan_to_num(table.chosen_rouge - table.rejected_rouge, nan=0.0)
        like_reference = _baseline(difference, table)
    return Baselines(longer_wins=longer, shorter_wins=shorter, most_like_reference=like_reference)


def _baseline(difference: NDArray[np.float64], table: PairTable) -> Baseline:
    """Accuracy of the rule that prefers the chosen candidate where `difference` is above 0."""
    credit = np.where(table.scored, (np.sign(difference) + 1) / 2, np.nan)
    subsets = {field: _means(credit, categories) for field, categories in table.subsets.items()}
    means = [mean for mean in subsets.get("subset", {}).values() if mean is not None]
    return Baseline(overall=_mean(credit), macro=float(np.mean(means)) if means else None, subsets=subsets)


def _means(credit: NDArray[np.float64], categories: Categories) -> dict[str, float | None]:
    return {name: _mean(credit[rows]) for name, rows in categories.rows().items()}


def _mean(credit: NDArray[np.float64]) -> float | None:
    counted = credit[~np.isnan(credit)]
    return float(counted.mean()) if len(counted) else None


# A word of letters and digits, but each ideograph and kana by itself: they are written without blanks.
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 of a candidate against the reference; NaN where the reference has no word.

    C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), equations 2 to 4 with β = 1:
    P = LCS / words of the candidate, R = LCS / words of the reference, F1 = 2PR / (P + R), with LCS the
    length of their longest common subsequence of words. Words are runs of letters and digits, in lower case;
    a Chinese or Japanese character is a word.

    "the cat sat" and "a cat sat down" share "cat sat": 2 · 2 / (3 + 4).

    >>> round(rouge_l("The cat sat.", "a cat sat down"), 4)
    0.5714
    >>> rouge_l("巴黎是首都", "首都是巴黎")  # 巴黎 or 首都: 2 · 2 / (5 + 5)
    0.4
    """
    # Of the extra "eval"; figures from saved scores do not need it.
    from rapidfuzz.distance import Indel

    words = _WORD.findall(reference.lower())
    if not words:
        return float("nan")
    # 1 − (n + m − 2 LCS) / (n + m), which is F1.
    return Indel.normalized_similarity(_WORD.findall(candidate.lower()), words)
