"""What the fields of a record's lines look like: which of them no version can have written."""

MOST = 2**53  # samples, steps and other counts
# finite, null, in nested lists or by name
NUMBERS = {"lr", "decay", "score", "score_se", "gap_se", "s", "s_se", "P", "P_se", "M", "u_g", "h_theta"}
NUMBERS |= {"weights", "weights_next", "numerical", "difference_step", "train", "valid", "served"}
COUNTS = {"step", "sample", "effective_sample", "samples", "global_batch", "seq_length", "train_iters"}
COUNTS |= {"every", "lead", "seed", "parameters", "failures", "splits"}
TEXTS = {"event", "mode", "reason", "config", "method", "metric", "direction", "error", "text", "law"}
OBJECTS = {"timing", "probe", "controller", "memory", "flow", "analysis", "situation", "laws", "left"}
LISTS = {"names", "budgets", "sizes", "holdouts", "warnings", "news", "windows", "rampup_batch_size"}
_NUMBER, _HUGE = {int, float, type(None)}, 1e300


def fault(line, start):
    """What is wrong with a line, in a few words; "" where nothing is. names: of the start line."""
    event = line.get("event")
    if not isinstance(event, str):
        return "it names no event"
    if event == "start" and (wrong := _start(line)):
        return wrong
    start = start or (line if event == "start" else None)
    for key, value in line.items():
        if value is not None and not _fits(key, value):
            return f"{key} is not what a record holds there"
    if event in ("probe", "skip", "loss", "end") and not {"step", "sample"} <= line.keys():
        return "it lacks step or sample"
    if event == "probe" and any(line.get(key) is None for key in ("s", "weights", "weights_next")):
        return "it lacks s, weights or weights_next"
    if event in ("start", "probe") and None in [*line["weights"], *(line.get("weights_next") or [])]:
        return "it lacks a weight"
    return _of_domains(line, start) if start else ""


def _start(line):
    names, weights = line.get("names"), line.get("weights")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return "names is no list of domains"
    if len(set(names)) < len(names) or not isinstance(weights, list) or len(weights) != len(names):
        return "names and weights do not fit each other"
    return ""


def _fits(key, value):
    if key in COUNTS:
        return type(value) is int and abs(value) <= MOST
    if key in TEXTS:
        return isinstance(value, str)
    if key in OBJECTS:
        return isinstance(value, dict) and _finite(value)
    if key in LISTS:
        return isinstance(value, list) and _finite(value)
    if key in NUMBERS:
        return _numbers(value)
    return True


def _numbers(value):
    """Whether a value is a finite number or null, or lists or objects of them."""
    if isinstance(value, dict):
        return all(type(one) in _NUMBER and _numbers(one) for one in value.values())
    if not isinstance(value, list):
        return type(value) in _NUMBER and (value is None or abs(value) < _HUGE)  # NaN is not
    if {*map(type, value)} <= _NUMBER:
        known = [abs(one) for one in value if one is not None]
        return all(one < _HUGE for one in known)
    return all(isinstance(one, list) and _numbers(one) for one in value)


def _finite(value):
    """Whether all numbers of a value, which may hold other things, are finite."""
    if isinstance(value, list):
        return all(map(_finite, value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return type(value) not in (int, float) or _numbers(value)


def _shape(value):
    """Lengths of nested lists; None where they are no array."""
    if not isinstance(value, list):
        return () if not isinstance(value, dict) else None
    if list not in {*map(type, value)}:
        return (len(value),)
    inner = {_shape(item) for item in value}
    return (len(value), *inner.pop()) if len(inner) == 1 and None not in inner else None


def _by_name(value, names):
    return isinstance(value, dict) and value.keys() <= set(names) and {*map(type, value.values())} <= _NUMBER


def _of_domains(line, start):
    """What is wrong with the numbers of each domain."""
    names, K = start["names"], len(start["names"])
    for key in ("train", "valid", "served"):
        if line.get(key) is not None and not _by_name(line[key], names):
            return f"{key} is not by domain"
    if (left := line.get("left")) is not None and not (
        type(left.get("samples")) is int
        and _by_name(left.get("budgets"), names)
        and {*map(type, left["budgets"].values())} <= {int}
    ):
        return "left is not by domain"
    for key in ("s", "s_se", "score", "score_se", "P", "P_se"):
        shape = (K,) * (1 + key.startswith("P") + (start.get("target") == "each"))
        if line.get(key) is not None and _shape(line[key]) != shape:
            return f"{key} has not a number for each domain"
    for key in ("weights", "weights_next", "budgets", "sizes", "holdouts"):
        value = line.get(key)
        if value is not None and not _by_name(value, names) and _shape(value) != (K,):
            return f"{key} has not a number for each domain"
    return ""
