"""The criterion: brackets of domain gradients, what they predict, and what they forbid.

This file alone fixes the sign and the constant; everything else in the package calls it.

K domains have losses L_k with gradients g_k and Hessians H_k. Training under weights w follows the
flow theta' = -D sum_k w_k g_k - c theta, with D a positive diagonal (the identity for plain
gradient descent) and c the decoupled weight decay. A direction lambda (the target's gradient, or
its pull-back through later training) gives u = D lambda, h_k = H_k u and

    M[k, j] = h_k . D g_j                 all that is measured: K products H_k u, K^2 dot products
    P[i, j] = M[j, i] - M[i, j]
    s       = P w

P[i, j] > 0: doing i first and j second ends with a HIGHER target than the mixture. s[k] > 0: delay
domain k. Moving weight delta from j to i in one window of flow time e (learning rate x steps) and
back in the next:

    dL = delta e^2 (s[i] - s[j]) + o(delta e^2)

Sources: Rukhovich et al., arXiv 2501.15556, eq. 6 (its eqs. 7, 8 and section 4.1 print other signs
and constants, which `megatron-commute quadratic` measures); K^2 brackets from K products also in
Sweeney, arXiv 2606.24993.

Arrays are numpy or torch of any leading batch shape "..."; they are taken to float64 where they
live.
"""

from __future__ import annotations

import numpy as np


def pairwise(M):
    """Brackets P[..., K, K] = M^T - M of M[..., K, K], where M[k, j] = h_k . D g_j.

    Antisymmetric to the last bit; units of loss per flow time squared. Quote errors of P against
    max|M|: P is a difference and may honestly vanish. ValueError if M is not square.
    """
    M = _float64(M)
    if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"M has shape {tuple(M.shape)}: pass M[..., K, K], row k for h_k, column j for g_j")
    return M.swapaxes(-1, -2) - M


def scores(P, w):
    """Scores s[..., K] = P w of brackets P[..., K, K] under weights w[..., K]. s[k] > 0: delay
    domain k.

    For a pair, s[i] - s[j] is the paper's P(L_i - L_j, sum_k w_k L_k; L). ValueError if the shapes
    disagree.
    """
    P = _float64(P)
    w = _like(w, P)
    if P.ndim < 2 or P.shape[-1] != P.shape[-2] or w.ndim < 1 or w.shape[-1] != P.shape[-1]:
        shapes = f"brackets {tuple(P.shape)} and weights {tuple(w.shape)}"
        raise ValueError(f"{shapes} disagree: pass P[..., K, K] and w[..., K] with the same K")
    return (P @ w[..., None])[..., 0]


def full_score(s, u_g, h_theta, decay=0.0, times=(1.0, 1.0), u_g_decayed=None):
    """Scores[..., K] with weight decay and a changing learning rate: what a decision uses in place
    of s.

        s_k + c (u.g_k - h_k.theta) - (e1 - e2)/e^2 u.g_k,        e^2 = (e1^2 + e2^2) / 2

    s, u_g, h_theta: [..., K], u_g[k] = u . g_k and h_theta[k] = h_k . theta. decay: c, per unit of
    flow time (AdamW's weight_decay, not times the rate). Where only some parameters decay, h_theta
    runs over those, and u_g_decayed (default u_g) is the dot product over those. times: flow times
    (e1, e2) of the two windows; budgets fix samples, so a falling learning rate makes e1 > e2. The
    direction should be read where the windows meet: one read at their start leaves an error O(delta
    |e1 - e2| e) in the loss. ValueError unless both are positive.
    """
    s = _float64(s)
    u_g, h_theta = _like(u_g, s), _like(h_theta, s)
    decayed = u_g if u_g_decayed is None else _like(u_g_decayed, s)
    return s + decay * (decayed - h_theta) - (times[0] - times[1]) / window_time(*times) ** 2 * u_g


def window_time(first, second):
    """Flow time e that `predicted_excess_loss` takes for windows of e1 and e2: sqrt((e1^2 + e2^2) /
    2).
    """
    if not (first > 0 and second > 0):
        raise ValueError(f"flow times {first} and {second}: give learning rate x steps, both positive")
    return float(np.sqrt((first * first + second * second) / 2))


def predicted_excess_loss(score_gap, delta, time):
    """Predicted dL = delta time^2 (s_i - s_j): delta of weight from j to i in one window, back in
    the next.

    score_gap: s_i - s_j (a float, or an array for an array back). delta: weight moved, 0..1. time:
    flow time of ONE window. Two pure windows from weights (1/2, 1/2), i then j, have delta = 1/2,
    so dL = time^2 P_ij / 2. Leading order in delta and in time: it does not promise the size over
    long windows.
    """
    loss = delta * time**2 * score_gap
    return loss if getattr(loss, "ndim", 0) else float(loss)


def improvable(s, w, error=0.0, minimum=0.0, maximum=1.0):
    """Corollary 3.2(b): pairs whose weights are not locally optimal, bool[..., K, K].

    True at [i, j]: taking j earlier and i later, totals unchanged, lowers the target, since s_i -
    s_j > error and both weights can move both ways (minimum < w < maximum, numbers or [..., K]). A
    locally optimal schedule has no True at any step, so it mixes only domains of equal score. s:
    [..., K] from `scores` or `full_score`; w: [..., K] (leading shape: steps); error: what a gap
    must exceed, a number or [..., K, K].
    """
    s = _float64(s)
    w = _like(w, s)
    inside = (w > _like(minimum, s)) & (w < _like(maximum, s))
    gap = s[..., :, None] - s[..., None, :]
    return (gap > _like(error, s)) & inside[..., :, None] & inside[..., None, :]


def may_switch(P, error=0.0):
    """Where pure training may turn from one domain to another, bool[..., K, K] of brackets P[...,
    K, K].

    True at [i, j]: going from i alone to j alone here can be locally optimal, P_ij <= error. Where
    it is False, trading a little of both sides of the switch lowers the target by delta e^2 P_ij
    (the switching test of section 3.2 for two domains, with the sign of eq. 6). error: a number or
    [..., K, K].
    """
    P = _float64(P)
    return _like(error, P) >= P


def _float64(x):
    return x.double() if hasattr(x, "double") else np.asarray(x, dtype=np.float64)


def _like(x, reference):
    """x as float64 of the reference's kind: numpy, or torch on its device."""
    if not hasattr(reference, "double"):
        return np.asarray(x, dtype=np.float64)
    return x.to(reference) if hasattr(x, "double") else reference.new_tensor(x)
