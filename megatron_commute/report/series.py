"""Series of numbers out of the lines of a decision log, of a run or of an analysis of checkpoints:
what report, tables and CSV files are made of.

Shapes: K domains, T targets (1, or K where the target is `each`), n samples at which something was
recorded. What a line lacks is NaN. Nothing here draws, reads a file or knows HTML.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_commute.decide.laws import LAWS, significant

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The lines of one record by event, in order."""

    start: dict
    # the first line
    probes: list
    # measurements with their decisions
    skips: list
    # probes that were given up
    losses: list
    # of training
    readings: list
    # every line with a validation loss: `valid` events and `loss` lines at evaluation steps
    end: dict | None
    # the last line of a complete run
    samples: int
    # largest sample any line speaks of
    interventions: list = dataclasses.field(default_factory=list)
    # versions of the control file
    notes: list = dataclasses.field(default_factory=list)
    # what happened to the record itself
    totals: dict = dataclasses.field(default_factory=dict)
    # lines of each event in the record, where only some are kept here
    torn: bool = False
    # whether the last line could not be read

    def count(self, event, kept):
        """Lines of `event` in the record, of which `kept` are here."""
        return self.totals.get(event, len(kept))

    @property
    def analysis(self):
        """Whether checkpoints were analysed: its probes decided nothing, and there are no losses of
        training.
        """
        return self.start.get("analysis") is not None

    @property
    def span(self):
        """Last sample of the axis: of the whole run where its checkpoints were analysed."""
        return max(1, self.samples, (self.start.get("samples") or 0) if self.analysis else 0)

    @property
    def names(self):
        return tuple(self.start["names"])

    @property
    def budgets(self):
        return self.start.get("budgets") or [None] * len(self.names)

    @property
    def splits(self):
        """Splits of a probe's samples that its standard errors come from."""
        return (self.start.get("probe") or {}).get("splits") or 4

    @property
    def confidence(self):
        """Confidence of the two-sided interval outside which the law lets a score count."""
        return (self.start.get("controller") or {}).get("confidence") or 0.95

    @property
    def flow(self):
        """The plan of law flow, as the start line has it, or None."""
        return self.start.get("flow")

    @property
    def targets(self):
        """Name of each of the T targets: the domains where the target is `each`, else the one
        mixture.
        """
        if self.probes and np.ndim(self.probes[-1]["s"]) == 2:
            return self.names
        return ("the mixture",)


def by_event(records, source="the record"):
    """Sort the dicts of `record.read` into a Run. source: what an error calls them.

    ValueError where there is no start line: nothing else says which domains the numbers belong to.
    """
    groups = {"start": [], "probe": [], "skip": [], "loss": [], "valid": [], "end": []}
    for line in records:
        groups.setdefault(line["event"], []).append(line)
    if not groups["start"]:
        raise ValueError(
            f"{source}: no start line in it; name the record of a run that began with --commute FILE"
        )
    return Run(
        start=groups["start"][0],
        probes=groups["probe"],
        skips=groups["skip"],
        losses=groups["loss"],
        readings=[r for r in records if r["event"] in ("loss", "valid") and _any_number(r.get("valid"))],
        end=groups["end"][-1] if groups["end"] else None,
        samples=max([0, *(line["sample"] for line in records if line.get("sample") is not None)]),
        interventions=groups.get("control", []),
        notes=groups.get("note", []),
    )


def _any_number(by_name):
    return any(value is not None for value in (by_name or {}).values())


def _numbers(value):
    """float64 array of nested lists in which null stands for NaN."""
    return np.array(value, dtype=np.float64)


def _by_domain(run, lines, key):
    """Samples i64[n] and values f64[n, K] of the {name: number} objects under `key`."""
    rows = [[(line.get(key) or {}).get(name) for name in run.names] for line in lines]
    return _samples_of(lines), _numbers(rows).reshape(len(lines), len(run.names))


def _samples_of(lines):
    return np.array([line["sample"] for line in lines], dtype=np.int64)


def losses(run, kind):
    """Samples i64[n], loss f64[n, K] in nats per token; kind is "train" or "valid"."""
    return _by_domain(run, run.losses if kind == "train" else run.readings, kind)


def served(run):
    """Samples i64[n], samples served of each domain f64[n, K], from zero on."""
    lines = [line for line in [*run.losses, *([run.end] if run.end else [])] if line.get("served")]
    sample, values = _by_domain(run, lines, "served")
    return np.insert(sample, 0, 0), np.vstack([np.zeros(len(run.names)), values])


def weights(run):
    """Samples i64[n] at which weights f64[n, K] came into force or were seen in force, in order.

    Planned changes (of law flow, and `effective_sample` of the probes that were reached) fix where
    a step lies; loss lines add what the mixture made of them when a budget ran short. Of an
    analysis: what the checkpoints hold.
    """
    knots = {0: run.start["weights"]}
    if run.analysis:
        knots |= {probe["sample"]: probe["weights"] for probe in run.probes if any(probe["weights"])}
    for probe in moves(run):
        if probe["effective_sample"] <= run.samples:
            knots[probe["effective_sample"]] = probe["weights_next"]
    seen, values = in_force(run)
    knots |= dict(zip(seen.tolist(), values.tolist(), strict=True))
    knots |= {
        at: w for at, w in planned(run) if at <= run.samples
    }  # a loss line has the weights of the step before it
    sample = sorted(knots)
    return np.array(sample, dtype=np.int64), _numbers([knots[n] for n in sample])


def planned(run):
    """(sample, weights) of law flow's plan, up to where people wrote weights of their own; none in
    mode act, whose decisions make it again.
    """
    if run.flow is None or run.start.get("mode") == "act":
        return []
    written = [line["effective_sample"] for line in run.interventions
               if line.get("weights") is not None and line.get("effective_sample") is not None]  # fmt: skip
    until, segments = min(written, default=float("inf")), run.flow["segments"]
    pairs = zip(segments["sample"], segments["weights"], strict=True)
    return [(int(at), weights) for at, weights in pairs if at < until]


def in_force(run):
    """Samples i64[n] of the loss lines and the weights f64[n, K] that the step before each of them
    used.
    """
    # once every budget is used up no weights are in force
    return _by_domain(
        run, [line for line in run.losses if any((line.get("weights") or {}).values())], "weights"
    )


def moves(run):
    """Probes after which the weights were to change."""
    return [probe for probe in run.probes if probe.get("effective_sample") is not None]


def measured(run, key):
    """Samples i64[n], value and standard error f64[n, T, ...] of P, s or score; n = 0 where there
    is none.
    """
    lines = [probe for probe in run.probes if probe.get(key) is not None]
    rank = 2 if key == "P" else 1
    pair = [_numbers([probe.get(name) or np.full(np.shape(probe[key]), np.nan) for probe in lines])
            for name in (key, f"{key}_se")]  # fmt: skip
    if not lines:
        return _samples_of(lines), *(np.zeros((0, 1) + (len(run.names),) * rank) for _ in pair)
    return _samples_of(lines), *(a if a.ndim == rank + 2 else a[:, None] for a in pair)


def mean_with_error(value, error):
    """Mean over axis 0 and its standard error, the probes taken as independent. NaN entries stay
    out.
    """
    known = np.isfinite(value)
    count = np.where(known.any(0), known.sum(0), np.nan)
    mean = np.where(known, value, 0.0).sum(0) / count
    return mean, np.sqrt((np.where(known, error, 0.0) ** 2).sum(0)) / count


def certain(run, value, error, probes=1):
    """Where zero lies outside the interval of a value (mean over `probes`), by the rule of the
    decisions.
    """
    return significant(value, error, max(1, probes * (run.splits - 1)), run.confidence)


def power_of_ten(*arrays):
    """Factor 10^n that brings the largest finite number to 1..10, and its name for a header,
    '10⁻³'.
    """
    largest = max([0.0, *(np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in arrays)])
    power = int(np.floor(np.log10(largest))) if largest else 0
    return 10.0**power, "10" + str(power).translate(SUPERSCRIPTS) if power else ""


def with_error(value, error):
    """'+1.23 ± 0.40' with a true minus sign; 'not measured' for NaN."""
    if not np.isfinite(value):
        return "not measured"
    shown = f"{value:+.2f}".replace("-", "−")
    return f"{shown} ± {error:.2f}" if np.isfinite(error) else f"{shown}, error unknown"


def summary_rows(records):
    """Closing table of a run: (headers, rows), one row of strings per domain.

    Losses in nats per token at the first and last reading, weights at start and end, samples used
    of the budget, and of the last probe the score, the bracket sum s, and the largest |P| with its
    partner, each ± standard error. With target `each` a domain's row shows the numbers for itself
    as the target.
    """
    run = records if isinstance(records, Run) else by_event(records)
    train, valid = (_first_last(losses(run, kind)[1], "{:.3f}") for kind in ("train", "valid"))
    used = zip(served(run)[1][-1], run.budgets, strict=True)
    share = [f"{int(n):,} / {'no budget' if budget is None else f'{budget:,}'}" for n, budget in used]
    columns = {
        "domain": run.names,
        "training loss": train,
        "held-out loss" if run.analysis else "validation loss": valid,
        "weight": _first_last(weights(run)[1], "{:.3f}"),
        "samples used / budget": share,
    }
    if run.analysis:  # nothing was trained
        del columns["training loss"], columns["samples used / budget"]
    for word, key in (("score", "score"), ("s", "s"), ("largest P", "P")):
        power, cells = _last_probe(run, key)
        columns[f"{word} ({power})" if power else word] = cells
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _first_last(values, form):
    """'first → last' of each column of values[n, K], unknown entries left out."""
    cells = []
    for column in values.T:
        known = column[np.isfinite(column)]
        cells.append(f"{form} → {form}".format(known[0], known[-1]) if len(known) else "not recorded")
    return cells


def own(array, k):
    """The [K, ...] block of array[T, K, ...] for the mixture, or for domain k where each is a
    target.
    """
    return array[k if len(array) > 1 else 0]


def _last_probe(run, key):
    """Power of ten, and each domain's number at the last probe; for P the largest of its row."""
    _, value, error = measured(run, key)
    K = len(run.names)
    if not len(value) or (key == "P" and K < 2):
        return "", ["not measured"] * K
    factor, power = power_of_ten(value[-1], error[-1])
    cells = []
    for k in range(K):
        number, bar = (own(array[-1], k)[k] / factor for array in (value, error))
        if key == "P":
            others = np.where(np.arange(K) == k, -1.0, np.abs(np.nan_to_num(number)))
            j = int(np.argmax(others))
            cells.append(f"{with_error(number[j], bar[j])} with {run.names[j]}")
        else:
            cells.append(with_error(number, bar))
    return power, cells


def overhead(run):
    """Samples i64[n], probe time as a fraction of training time f64[n], seconds of each probe
    f64[n].
    """
    lines = [probe for probe in run.probes if (probe.get("timing") or {}).get("overhead") is not None]
    pairs = [[probe["timing"]["overhead"], probe["timing"].get("probe_seconds")] for probe in lines]
    return _samples_of(lines), *_numbers(pairs).reshape(len(lines), 2).T


def uncalibrated(run):
    """Whether the weights of the run follow a measured signal: no signal here was ever compared
    with effects at the end.
    """
    law = (run.start.get("controller") or {}).get("law")
    return run.start.get("mode") == "act" and law in LAWS and LAWS[law].measured and not run.analysis


def improvable(run):
    """Corollary 3.2(b) at the checkpoints of an analysis: (probe, target t, pairs [[earlier,
    later], ...]) each.
    """
    return [
        (probe, t, pairs)
        for probe in run.probes
        if probe.get("improvable") is not None
        for t, pairs in enumerate(probe["improvable"])
    ]
