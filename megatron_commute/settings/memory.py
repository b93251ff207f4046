"""Memory of a probe: vectors of model size that each way of working holds, and which way fits.

full     every g_k and h_k on every rank: M and P, no traffic while splits >= data-parallel ranks
sharded  every g_k and h_k once among the R data-parallel ranks, which share each replicate
scores   two vectors whatever K, twice the gradients: s and the full score, but neither M nor P
"""

from typing import NamedTuple

MODES = ("full", "sharded", "scores")  # from the most lavish to the most frugal
GPU, SPARE = 80e9, 40e9  # bytes of a large GPU, and half of it, which auto may take where all is free
VERIFYING = 12  # vectors that the first probe of method exact holds while it verifies itself


class Memory(NamedTuple):
    """How a run's probes work: mode, one of MODES; bytes: of vectors on a rank; words: their number
    as a formula.
    """

    mode: str
    bytes: int
    words: str

    @property
    def sentence(self):
        return (
            f"probe memory: {self.mode}, {self.words} vectors, {in_units(self.bytes)} per rank beside the "
            "activations of one micro-batch"
        )


def vectors(memory, domains, method, metric, ranks, low_precision):
    """Vectors of model size that a probe holds on a rank at its peak, beside parameters and
    activations; a float.

    memory: of MODES; domains: K; ranks: data-parallel ranks; low_precision: whether the model's
    parameters are bf16 or fp16, which a probe reads as float32 copies. Targets add none: each has
    its direction in turn.
    """
    growing, constant = _parts(memory, domains, method, metric, ranks, low_precision)
    return max(growing + constant, VERIFYING + bool(low_precision) if method == "exact" else 0)


def formula(memory, domains, method, metric, ranks, low_precision):
    """The number of `vectors` in words, such as 2K+4."""
    growing, constant = _parts(memory, domains, method, metric, ranks, low_precision)
    most = vectors(memory, domains, method, metric, ranks, low_precision)
    if most > growing + constant or not growing:
        return f"{most:g}"
    return f"2K+{constant}" if memory == "full" else f"(2K+1)/{ranks}+{constant}"


def _parts(memory, domains, method, metric, ranks, low_precision):
    """Vectors that grow with K, and the others."""
    # direction and metric; then displaced weights and their gradient, or gradient and product
    constant = 3 + (metric == "adam") + bool(low_precision)
    if memory == "scores":
        return 0, constant + 2  # the mixture's g_w and h_w
    if memory == "sharded":
        # what a domain adds up before the ranks share it, and the piece that comes back
        return (2 * domains + 1) / ranks, constant + (1 if method == "difference" else 2)
    return 2 * domains, constant


def choose(wish, load, ranks):
    """The mode of MODES that a run takes: `wish` itself, or for "auto" the first that fits; where
    none does, the leanest, and of equals the one that measures more.

    load: by mode, vectors as a part of the memory that they may take, the most of any rank; one
    that fits is at most 1. ranks: data-parallel ranks; with one there is nothing to share.
    """
    if wish != "auto":
        return "full" if wish == "sharded" and ranks == 1 else wish
    possible = [mode for mode in MODES if mode != "sharded" or ranks > 1]
    fitting = [mode for mode in possible if load[mode] <= 1]
    return fitting[0] if fitting else min(possible, key=lambda mode: load[mode])


def warning(bytes_of):
    """What is wrong with a probe of these bytes a rank, by mode that the run may take; None where
    the leanest fits beside training.
    """
    mode, least = min(bytes_of.items(), key=lambda found: found[1])
    if least <= SPARE:
        return None
    other = "" if len(bytes_of) > 1 else "write memory: auto, "
    return (
        f"probe.memory: {mode} needs {in_units(least)} a rank, and a GPU of {in_units(GPU)} has "
        f"{in_units(SPARE)} for it at most; {other}share the model among more ranks "
        "(--tensor-model-parallel-size), or use ZeRO 3"
    )


def in_units(count):
    """Bytes as people say them: 43 MB, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
