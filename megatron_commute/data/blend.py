"""The host's own data flag: what its blend says, and whether the mixture file says the same."""

import pathlib

from megatron_commute.config import ConfigError


def check(config, plan, paths, flag="--train-data-path"):
    """In mode shadow the host feeds training: the mixture file must say what its blend says.
    Raises ConfigError.
    """
    prefixes, shares = read(paths, flag)
    weights = [share / sum(shares) for share in shares]
    wanted = [path for domain in config.domains for path in domain.path]
    if [str(pathlib.Path(p).resolve()) for p in prefixes] != [str(pathlib.Path(p).resolve()) for p in wanted]:
        raise config.error(
            "domains",
            f"names {wanted}, the data flag names {prefixes}",
            "write the same files in the same order",
        )
    if len(wanted) != len(config.domains):
        raise config.error(
            "domains", "a domain of several files has no place in the host's blend", "write one path a domain"
        )
    if max(abs(a - b) for a, b in zip(weights, plan.weights, strict=True)) > 1e-9:
        told = [round(float(w), 6) for w in plan.weights]
        raise config.error(
            "domains", f"weights {told}, the data flag says {weights}", "write the same weights in both"
        )


def read(paths, flag="--train-data-path"):
    """(prefixes, weights as written) of Megatron's data flag; ConfigError where weights are
    missing or impossible.
    """
    if len(paths) == 1:
        return list(paths), [1.0]
    try:
        weights = [float(word) for word in paths[::2]]
    except ValueError:
        weights = []
    if len(paths) % 2 or not all(0 <= w < float("inf") for w in weights) or not sum(weights) > 0:
        raise ConfigError(
            f"{flag}: {' '.join(paths)}: write WEIGHT PREFIX pairs, one for each domain, weights not negative"
        )
    return list(paths[1::2]), weights
