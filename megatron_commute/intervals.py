"""Confidence intervals: Student's for a mean."""

CONFIDENCE = 0.95


def student(dof, confidence=CONFIDENCE):
    """Student's two-sided quantile: standard errors that a value must exceed to differ from zero
    with `confidence`.
    """
    from scipy.special import stdtrit

    return float(stdtrit(dof, 0.5 + confidence / 2))
