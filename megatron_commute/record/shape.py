"""What the fields of a record's lines look like: which of them no version can have written."""

MOST = 2**53  # samples, steps and other counts
NUMBERS = {  # finite, null, in nested lists or by name
    *("lr", "decay", "score", "score_se", "gap_se", "s", "s_se", "P", "P_se", "M", "u_g", "h_theta"),
    *("weights", "weights_next", "numerical", "difference_step", "train", "valid", "served"),
}
COUNTS = {
    *("step", "sample", "effective_sample", "samples", "global_batch", "seq_length", "train_iters"),
    *("every", "lead", "seed", "parameters", "failures", "splits"),
}
TEXTS = {"event", "mode", "reason", "config", "method", "metric", "direction", "error", "text", "law"}
OBJECTS = {"timing", "probe", "controller", "memory", "flow", "analysis", "situation", "laws"}
LISTS = {"names", "budgets", "sizes", "holdouts", "warnings", "news", "windows"}
_NUMBER, _HUGE = {int, float, type(None)}, 1e300


def fault(line, names):
    """What is wrong with a line, in a few words; "" where nothing is. names: of the start line."""
    event = line.get("event")
    if not isinstance(event, str):
        return "it names no event"
    if event == "start" and (wrong := _start(line)):
        return wrong
    names = names or line.get("names")
    if event in ("probe", "skip", "loss", "valid", "control", "end") and names is None:
        return "it comes before the start line"
    for key, value in line.items():
        if value is not None and not _fits(key, value):
            return f"{key} is not what a record holds there"
    if event in ("probe", "skip", "loss", "end") and not {"step", "sample"} <= line.keys():
        return "it lacks step or sample"
    return _of_domains(line, len(names), names) if names else ""


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
        value = list(value.values())
    if not isinstance(value, list):
        return type(value) in _NUMBER and (value is None or abs(value) < _HUGE)  # NaN is not
    if {*map(type, value)} <= _NUMBER:
        known = [abs(one) for one in value if one is not None]
        return all(one < _HUGE for one in known)
    return all(map(_numbers, value))


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


def _of_domains(line, K, names):
    """What is wrong with the numbers of each domain."""
    for key in ("train", "valid", "served"):
        value = line.get(key)
        if value is not None and not (isinstance(value, dict) and value.keys() <= set(names)):
            return f"{key} is not by domain"
    for key in ("s", "s_se", "score", "score_se", "P", "P_se", "weights_next", "weights"):
        value, rank = line.get(key), 1 + key.startswith("P")
        if isinstance(value, dict) and key == "weights":
            if not value.keys() <= set(names):
                return "weights is not by domain"
        elif value is not None and _shape(value) not in ((K,) * rank, (K,) * (rank + 1)):
            return f"{key} has not a number for each domain"
    for key in ("budgets", "sizes", "holdouts"):
        if line.get(key) is not None and _shape(line[key]) != (K,):
            return f"{key} has not a number for each domain"
    return ""
