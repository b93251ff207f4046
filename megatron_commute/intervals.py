"""Confidence intervals: Student's for a mean, Wilson's for a rate. Pure functions."""

import math

CONFIDENCE = 0.95


def student(dof, confidence=CONFIDENCE):
    """Student's two-sided quantile: standard errors that a value must exceed to differ from zero
    with `confidence`.
    """
    from scipy.special import stdtrit

    return float(stdtrit(dof, 0.5 + confidence / 2))


def wilson(hits, n, confidence=CONFIDENCE):
    """Wilson's score interval (low, high) of a rate seen as `hits` of `n` > 0 (Wilson 1927)."""
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    rate, share = hits / n, z * z / n
    middle = (rate + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(rate * (1 - rate) / n + share / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)
