"""A decision log made up with a seed, consistent in itself. `python tests/records.py FOLDER` writes one.

Served samples are the sums of the weights in force, budgets are what is served at the end, P = M^T - M,
s = P w, and a decision comes into force where its line says.
"""

import hashlib
import json
import pathlib
import sys

import numpy as np

NAMES = ("english", "russian", "code", "chinese", "hindi", "web", "books", "mathematics")


def lines(
    K=3,
    seed=0,
    steps=400,
    log_every=10,
    probe_every=50,
    names=None,
    mode="act",
    each=False,
    skips=(),
    endless=(),
    finished=True,
):
    """The dicts of a whole record. skips: numbers of probes that fail; endless: domains without a budget."""
    rng = np.random.default_rng(seed)
    names, batch = list(names or NAMES[:K]), 64
    first = np.round(np.sort(rng.dirichlet(4 * np.ones(K)))[::-1], 3)
    first[0] += 1 - first.sum()
    weight, pending = first, None
    served, owed = np.zeros(K, dtype=int), np.zeros(K)
    floor, failures, spent, body = rng.uniform(1.8, 3.0, K), 0, 0.0, []
    for step in range(1, steps + 1):
        sample = step * batch
        if pending and pending[0] < sample:
            weight, pending = pending[1], None
        owed = owed + batch * weight
        take = np.floor(owed + 0.5).astype(int)
        take[0] += batch - take.sum()
        served, owed = served + take, owed - take
        if step % probe_every == 0 and failures < 3:
            seconds = 1.4 + 0.2 * rng.random()
            spent += seconds
            timing = {"probe_seconds": seconds, "step_seconds": 1.1, "overhead": spent / (1.1 * step)}
            failures = failures + 1 if step // probe_every - 1 in skips else 0
            if failures:
                why = {"reason": f"loss of {names[-1]} is not finite on rank 1", "failures": failures}
                body.append(_at("skip", step, sample, **why, off=failures == 3, timing=timing))
            else:
                body.append(_probe(rng, names, step, sample, weight, mode, each, batch, timing))
                if body[-1]["effective_sample"] is not None:
                    pending = body[-1]["effective_sample"], np.array(body[-1]["weights_next"])
        if step % log_every == 0:
            loss = floor + (9.0 - floor) * np.exp(-(6 * served + 200) / (steps * batch) * 4 / K)
            body.append(
                _loss(rng, names, step, sample, loss, step % (5 * log_every) == 0, served, weight, spent)
            )
    start = _start(names, first, served, steps, batch, mode, each, probe_every, endless)
    end = _at("end", steps, steps * batch, served=_named(names, served), timing={"seconds": 1.1 * steps})
    return [{"schema": 1, **line} for line in [start, *body, *([end] if finished else [])]]


def _at(event, step, sample, **fields):
    return {"event": event, "step": step, "sample": sample, **fields}


def _named(names, values):
    return dict(zip(names, np.asarray(values).tolist(), strict=True))


def _start(names, first, served, steps, batch, mode, each, probe_every, endless):
    probe = {"samples": 64, "splits": 4, "method": "difference", "metric": "adam", "direction": "local"}
    return {
        "event": "start",
        "names": names,
        "weights": first.tolist(),
        "budgets": [None if k in endless else int(n) for k, n in enumerate(served)],
        "sizes": [int(1.5 * n) for n in served],
        "holdouts": [256] * len(names),
        "samples": steps * batch,
        "global_batch": batch,
        "seq_length": 256,
        "train_iters": steps,
        "mode": mode,
        "every": probe_every,
        "lead": 4 * batch,
        "seed": 1234,
        "target": "each" if each else (served / served.sum()).tolist(),
        "config": hashlib.sha256(b"mixture").hexdigest(),
        "probe": probe,
        "controller": {"law": "tilt", "strength": 1.0, "rate": 0.05, "confidence": 0.95},
        "warnings": [],
        "parameters": 1_640_000,
    }


def _probe(rng, names, step, sample, weight, mode, each, batch, timing):
    K, T = len(names), len(names) if each else 1
    M = rng.normal(size=(T, K, K)) * 3e-3 + np.linspace(-2e-3, 2e-3, K)[:, None]
    P = M.swapaxes(1, 2) - M
    P_se = np.full((T, K, K), 1.0e-3) * (1 - np.eye(K))
    s, s_se = P @ weight, np.sqrt((P_se * weight) ** 2 @ np.ones(K))
    u_g, h_theta = rng.uniform(0.01, 0.03, (T, K)), rng.normal(size=(T, K)) * 1e-3
    full = s + 0.01 * (u_g - h_theta)
    score = full - (full @ weight)[:, None]
    sure = mode == "act" and not each and (np.abs(score) > 3.2 * s_se).any()
    after = weight * np.exp(-30 * score[0])
    k = int(np.argmax(np.abs(score[0])))
    values = {"P": P, "P_se": P_se, "s": s, "s_se": s_se, "M": M, "u_g": u_g, "h_theta": h_theta}
    values |= {"score": score, "score_se": s_se}
    return _at(
        "probe",
        step,
        sample,
        lr=3e-4,
        decay=0.01,
        windows=[0.015, 0.015],
        **{key: (a if each else a[0]).tolist() for key, a in values.items()},
        weights=weight.tolist(),
        weights_next=(after / after.sum()).tolist() if sure else weight.tolist(),
        effective_sample=sample + 4 * batch if sure else None,
        reason=f"tilt, strongest for {names[k]}"
        if sure
        else "weights stay: every score is inside its error bar",
        target="each" if each else weight.tolist(),
        metric="adam",
        direction="local",
        method="difference",
        samples=64,
        timing=timing,
    )


def _loss(rng, names, step, sample, loss, valid, served, weight, spent):
    noise = 0.03 * rng.normal(size=(2, len(names)))
    return _at(
        "loss",
        step,
        sample,
        lr=3e-4,
        train=_named(names, loss + noise[0]),
        **({"valid": _named(names, loss + 0.05 + 0.3 * noise[1])} if valid else {}),
        served=_named(names, served),
        weights=_named(names, weight),
        fingerprint=hashlib.sha256(served.tobytes()).hexdigest()[:16],
        timing={"step_seconds": 1.1, "probe_seconds": spent, "seconds": 1.1 * step + spent},
    )


def of_0_1_0(lines):
    """The lines as version 0.1.0 wrote them with a wave on the weights: readings, effects and comparisons of signals."""
    K, found = len(lines[0]["names"]), []
    lines[0] |= {"response": {"kind": "lock-in", "delta": 0.2}, "responses": {"kind": "lock-in", "steps": 80}}
    for line in lines:
        if line["event"] == "probe":
            measured = {"effect": [0.01] * K, "effect_se": [2e-3] * K, "effect_dof": 6}
            line |= measured | {"calibration": {"last gains": {"hits": 3, "n": 4, "rate": 0.75}}}
            for event in ("calibration", "response"):
                found.append(_at(event, line["step"], line["sample"], schema=1, kind="lock-in", **measured))
        found.append(line)
    return found


def of_flow(lines, segments=25):
    """The lines of a run in mode fixed whose weights law flow planned: a hump of the last domain."""
    start, found = dict(lines[0]), []
    K, batch, samples, steps = (
        len(start["names"]),
        start["global_batch"],
        start["samples"],
        start["train_iters"],
    )
    at = np.arange(segments) * (steps // segments) * batch
    hump = 0.1 + 0.3 * np.exp(-(((at / samples - 0.6) / 0.2) ** 2))
    others = np.array(start["weights"][:-1]) / sum(start["weights"][:-1])
    weights = np.column_stack([np.outer(1 - hump, others), hump])
    curve = np.linspace(0, samples - batch, 50)
    start["flow"] = {
        "scale": {"peak": 1e-3, "total": 0.2, "low": 0.1, "high": 0.5},
        "memory": 2.5, "kept": 40, "begin": 0, "used": [0] * K, "retired": 0, "strength": 1.0,
        "target": [0.0] * (K - 1) + [1.0], "ranges": [-0.35] * (K - 1) + [3.15], "notes": [],
        "segments": {"sample": at.tolist(), "weights": weights.tolist()},
        "curves": {"sample": curve.tolist(), "rate": (1e-3 * np.cos(curve / samples)).tolist(),
                   "profile": np.sin(3 * curve / samples).tolist()},
    }  # fmt: skip
    start["mode"], start["controller"] = "fixed", {**start["controller"], "law": "flow"}
    for line in lines[1:]:
        line = dict(line)
        if line["event"] == "loss":
            now = weights[np.searchsorted(at, line["sample"] - batch, side="right") - 1]
            line["weights"] = _named(start["names"], now)
        if line["event"] == "probe":
            line |= {"weights_next": line["weights"], "effective_sample": None}
            line["reason"] = "mode fixed: measured, weights not touched"
        found.append(line)
    return [start, *found]


def analysed(lines):
    """The lines of an analysis whose checkpoints are the probes of a run."""
    names = lines[0]["names"]
    start, found = lines[0] | {"analysis": {"notes": ["holdout: seen in training"]}}, []
    for line in lines:
        if line["event"] != "probe":
            continue
        held = dict(zip(names, (3.0 + 0.1 * k for k in range(len(names))), strict=True))
        found.append(_at("valid", line["step"], line["sample"], schema=1, valid=held))
        pairs = [[names[-1], names[0]]] if line["effective_sample"] else []
        more = {
            "weights_next": line["weights"],
            "effective_sample": None,
            "reason": "analysed from a checkpoint",
        }
        more["improvable"] = [pairs] * (len(names) if np.ndim(line["s"]) == 2 else 1)
        folder = f"/somewhere/else/global_step{line['step']}"
        timing = {"probe_seconds": 1.0, "step_seconds": None, "overhead": None}
        found.append(
            line | more | {"checkpoint": {"folder": folder, "ranks": 2, "files": "x"}, "timing": timing}
        )
    return [start, *found]


def write(folder, records, torn=False):
    """commute.jsonl in `folder`; torn: half of one more line, as SIGKILL leaves it. Returns its path."""
    path = pathlib.Path(folder) / "commute.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in records)
    path.write_text(text + ('{"schema": 1, "event": "loss", "ste' if torn else ""), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write(sys.argv[1], lines(skips=(3,))))
