# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tests by betting that a share of bad tokens lies below a limit; documents are independent, tokens are not.

Document i has t_i tokens, at most m, of which l_i are bad. The risk is the ratio R = E[l] / E[t]: the share of
bad tokens over many documents. A gambler who doubts "R >= r" bets a fixed b within [0, 1 / m] on every document;
the wealth is

    K(r) = prod_i (1 + b (r t_i - l_i)).

No factor is negative, as r t - l >= -m. If R >= r, then E[r t - l] <= 0, every factor has a mean of at most 1,
and so has their product, as documents are independent. By Markov's inequality P(K(r) >= 1 / delta) <= delta:
min(1, 1 / K(r)) is a p-value of "R >= r" for any b that was chosen without looking at these documents. K(r) grows
with r, so the r at which it reaches 1 / delta is an upper confidence bound of R.

This is the betting bound of Waudby-Smith and Ramdas (arXiv:2010.09686) with a constant bet, for a ratio of
means. It knows no variance, yet adapts to it: nothing here is an approximation for large numbers.
"""

import math
from collections.abc import Sequence

import numpy as np


def choose_bet(
    losses: np.ndarray, sizes: np.ndarray, risk: float, delta: float, tested: int, largest: int
) -> float:
    """A bet that makes the test strong, from other documents than those to be tested.

    b = sqrt(2 log(1 / delta) / (n v)), with v the variance of r t - l, within [0, 1 / m]: to second order, log K
    reaches log(1 / delta) over n documents from the smallest mean of r t - l from which any bet can.

    Args:
        losses: bad tokens per tuning document, [D], D at least 2.
        sizes: their tokens, [D].
        risk: r.
        delta: level of the test.
        tested: n, documents to be tested.
        largest: m, tokens that a document can have.
    """
    variance = float(np.var(risk * sizes - losses, ddof=1))
    most = 1.0 / largest
    if variance == 0.0:
        return most
    return min(most, math.sqrt(2.0 * math.log(1.0 / delta) / (tested * variance)))


def log_wealth(losses: np.ndarray, sizes: np.ndarray, risk: float, bet: float) -> float:
    """log K(r) of tested documents; -inf after a total loss.

    Args:
        losses: bad tokens per document, [D].
        sizes: tokens per document, [D].
        risk: r within [0, 1].
        bet: b, at most 1 / max(sizes).
    """
    factors = 1.0 + bet * (risk * sizes - losses)
    assert (factors >= -1e-12).all(), "the bet is at most 1 / the largest size"
    with np.errstate(divide="ignore"):
        return float(np.log(np.maximum(factors, 0.0)).sum())


def p_value(losses: np.ndarray, sizes: np.ndarray, risk: float, bet: float) -> float:
    """Of the hypothesis that the risk is `risk` or higher; see `log_wealth` for the arguments."""
    return math.exp(min(0.0, -log_wealth(losses, sizes, risk, bet)))


def upper_bound(losses: np.ndarray, sizes: np.ndarray, delta: float, bet: float) -> float:
    """The risk lies below it with a probability of at least 1 - delta; 1 if nothing can be said.

    It is the least r with `p_value` <= delta, to within 1e-6 from above. See `log_wealth` for the arguments.
    """
    low, high, needed = 0.0, 1.0, math.log(1.0 / delta)
    if log_wealth(losses, sizes, high, bet) < needed:
        return 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2.0
        if log_wealth(losses, sizes, middle, bet) >= needed:
            high = middle
        else:
            low = middle
    return high


def fixed_sequence(p_values: Sequence[float], delta: float) -> int:
    """Fixed-sequence testing: how many hypotheses are rejected, from the first up to one that is not.

    With an order chosen beforehand, the probability that any true hypothesis is among them is at most delta,
    however many there are (Learn then Test, arXiv:2110.01052).
    """
    for count, p in enumerate(p_values):
        if p > delta:
            return count
    return len(p_values)


def documents_needed(sizes: np.ndarray, risk: float, delta: float, largest: int) -> int:
    """The fewest documents of about these sizes [D] with which a test can succeed, were no token bad."""
    growth = float(np.log1p(risk * sizes / largest).mean())
    return math.ceil(math.log(1.0 / delta) / growth)
