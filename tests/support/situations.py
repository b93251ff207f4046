"""Situations of a decision by their defaults: what a law looks at, two or three domains and nothing special."""

import numpy as np

from megatron_commute.decide.situation import Situation


def situation(weights=(0.5, 0.3, 0.2), remaining=None, samples_left=1000, score=(1.0, -1.0, 0.5), **more):
    K = len(weights)
    remaining = (
        np.array(weights) * samples_left if remaining is None else np.array(remaining, dtype=np.float64)
    )
    fields = {
        "initial": np.array(weights), "window": 100, "score_se": np.full(K, 0.01), "dof": 3, "minimum": np.zeros(K),
        "maximum": np.ones(K), "floors": np.zeros(K), "caps": np.ones(K), "rate": 0.05, "confidence": 0.95,
        "strength": 1.0,
    }  # fmt: skip
    fields |= {name: np.array(value) if isinstance(value, tuple) else value for name, value in more.items()}
    return Situation(
        weights=np.array(weights),
        remaining=remaining,
        samples_left=samples_left,
        score=np.array(score),
        **fields,
    )
