"""The statistics of a study: shares with intervals, and how far annotators agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A binomial share and Wilson's interval (E. B. Wilson, JASA 1927) at 95% confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Fleiss' kappa, and the mean share of agreeing pairs of annotators, which it corrects for chance."""

    kappa: float | None
    """None where chance alone agrees always: every vote went to one category."""
    observed: float


def wilson(wins: int, of: int) -> Share | None:
    """The share ``wins / of``; None of nothing."""
    if of == 0:
        return None
    interval = binomtest(wins, of).proportion_ci(CONFIDENCE, method="wilson")
    return Share(wins / of, float(interval.low), float(interval.high))


def sign_test(wins: int, of: int) -> float | None:
    """Two-sided p-value of ``wins`` of ``of`` if both systems were preferred equally often; None of nothing."""
    return float(binomtest(wins, of).pvalue) if of else None


def fleiss_kappa(counts: NDArray[np.int64]) -> Agreement | None:
    """Agreement of votes (n items, k categories) of interchangeable annotators (J. L. Fleiss, Psych. Bulletin 1971).

    Items may have different numbers of votes: each item's agreement counts once, and chance is taken from all votes,
    which is Fleiss' own figure where the numbers are equal. Items with fewer than two votes say nothing about
    agreement and are left out; None if that leaves none.

    Raises:
        ValueError: ``counts`` is not a table of counts.
    """
    if counts.ndim != 2 or (counts < 0).any():
        raise ValueError(f"votes are counts (items, categories), not {counts.shape}")
    counts = counts[counts.sum(axis=1) >= 2].astype(np.float64)
    if not len(counts):
        return None
    votes = counts.sum(axis=1)
    observed = float((((counts**2).sum(axis=1) - votes) / (votes * (votes - 1))).mean())
    by_chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    # One category took all the votes exactly when chance agrees with certainty.
    certain = np.count_nonzero(counts.sum(axis=0)) == 1
    return Agreement(None if certain else (observed - by_chance) / (1 - by_chance), observed)
