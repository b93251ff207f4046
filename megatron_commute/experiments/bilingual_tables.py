"""From the cells of the studies to numbers and tables."""

import csv
import math

import numpy as np

from megatron_commute.settings import text_files


def loss_of(losses, target, settings, weights):
    """Held-out loss of a target from {name: loss}: a domain, or "mixture", the trained domains by
    the run's weights.
    """
    if target == "mixture":
        return sum(w * losses[name] for w, name in zip(weights, settings.domains, strict=True))
    return losses[target]


def targets(settings):
    return (*settings.domains, *settings.others, "mixture")


def mean_and_error(values):
    """Mean and standard error over paired seeds; the error is NaN for one value."""
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def write_csv(path, rows):
    """Rows (dicts) as CSV, columns in order of first appearance, numbers in full precision."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with text_files.replacing(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def refuse_unknown_parts(asked, known):
    """Raises ValueError for parts of a study that it does not have."""
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise ValueError(f"--set parts={','.join(unknown)}: write some of {','.join(known)}")
