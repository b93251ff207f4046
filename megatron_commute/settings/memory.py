"""Memory of a probe: vectors of model size that each way of working holds, and which way fits.

full     every g_k and h_k on every rank: M and P, no traffic while splits >= data-parallel ranks
sharded  every vector in shards over the R data-parallel ranks, parameters whole one layer at a time
scores   two vectors whatever K, twice the gradients: s and the full score, but neither M nor P; in
         shards too where there are some

A layer is one parameter tensor here, the unit that is gathered and scattered.
"""

from typing import NamedTuple

MODES = ("full", "sharded", "scores")
GPU, SPARE = 80e9, 40e9  # bytes of a large GPU, and half of it, which auto may take where all is free
VERIFYING = 12  # vectors that the first probe of method exact holds while it verifies itself
WORDS = 50304  # in the vocabulary of a GPT whose size alone is known
LAYERS = 3  # a parameter, its gradient and what is scattered of it, where vectors lie in shards


class Memory(NamedTuple):
    """How a run's probes work: mode, one of MODES; bytes: on a rank; words: number of vectors as a
    formula; layers: largest layers beside them; host: bytes of vectors in the host's memory.
    """

    mode: str
    bytes: int
    words: str
    layers: int
    host: int = 0

    @property
    def sentence(self):
        return (
            f"probe memory: {self.mode}, {self.words} vectors{beside(self.layers)}, {in_units(self.bytes)} "
            f"per rank beside the activations of one micro-batch{offloaded(self.host)}"
        )


class Demand(NamedTuple):
    """What the memory of a probe follows from, beside its mode."""

    domains: int
    # K; targets add none: each has its direction in turn
    method: str
    metric: str
    ranks: int
    # over which vectors in shards are cut, 1: they are whole
    low_precision: bool
    # whether the model's parameters are bf16 or fp16, which a probe reads as float32 copies
    offload: bool = False
    # whether vectors that are kept are in the memory of the host


def offloaded(host):
    """The words for `host` bytes of vectors in the host's memory."""
    return f", and {in_units(host)} per rank in the memory of the host" if host else ""


def beside(layers):
    """The words for `layers` largest layers, which follow those for vectors."""
    return f" and {layers} of the largest layer" if layers else ""


def shares(memory, method):
    """Whether vectors lie in shards in a mode of MODES, where a model has them in shards at all."""
    return memory == "sharded" or (memory == "scores" and method == "difference")


def vectors(memory, demand):
    """Vectors of model size that a probe holds on a rank at its peak, beside parameters,
    activations and, in shards, LAYERS of the largest layer; a float. memory: of MODES.
    """
    growing, constant = _parts(memory, demand)
    if demand.method == "exact":
        return max(growing + constant, VERIFYING + bool(demand.low_precision))
    return (growing + constant) / (demand.ranks if shares(memory, demand.method) else 1)


def formula(memory, demand):
    """The number of `vectors` in words, such as 2K+4."""
    growing, constant = _parts(memory, demand)
    most = vectors(memory, demand._replace(ranks=1))
    count = f"2K+{constant}" if growing and most == growing + constant else f"{most:g}"
    if not layers(memory, demand):
        return count
    return f"({count})/{demand.ranks}" if growing else f"{count}/{demand.ranks}"


def layers(memory, demand):
    """Largest layers that a probe holds beside `vectors`."""
    return LAYERS if demand.ranks > 1 and shares(memory, demand.method) else 0


def size(memory, demand, *, whole, largest):
    """Bytes of `vectors` of `whole` bytes each and of `layers` of `largest` bytes."""
    return vectors(memory, demand) * whole + layers(memory, demand) * largest


def host_size(memory, demand, whole):
    """Bytes of the vectors, of `whole` bytes each, that a probe keeps in the memory of the host."""
    return (vectors(memory, demand._replace(offload=False)) - vectors(memory, demand)) * whole


def dense_gpt(parameters):
    """(hidden size, parameters of the largest layer) of a GPT 128 times as wide as deep: layers of
    12 hidden^2, and the words.
    """
    hidden = 128 * max(1, round((parameters * 128 / 12) ** (1 / 3) / 128))
    return hidden, max(WORDS * hidden, 4 * hidden**2)


def _parts(memory, demand):
    """Vectors that grow with K, and the others: displaced weights, their gradient (or gradient and
    product) and float32 copies; direction and metric.
    """
    working = 2 + bool(demand.low_precision)
    if demand.offload:
        return 0, working
    constant = working + 1 + (demand.metric == "adam")
    if memory == "scores":
        return 0, constant + 2  # the mixture's g_w and h_w
    return 2 * demand.domains, constant


def possible(method, ranks, *, only_shards, any_shards):
    """The modes of MODES that a run may take. ranks: data-parallel ranks; only_shards, any_shards:
    whether its model has nothing but shards (ZeRO 3), or shards as well.
    """
    if only_shards:
        return MODES[1:]
    return MODES if ranks > 1 and any_shards and method == "difference" else (MODES[0], MODES[2])


def choose(wish, load):
    """The mode that a run takes: `wish`, or what comes nearest to it where it is not possible. For
    "auto" full where it is comfortable, else the leanest that measures M and P; scores only where
    they fit and nothing else does.

    load: by possible mode, in the order of MODES, bytes as a part of the memory that a probe may
    take with comfort, half of what is free, the most of any rank; up to 1 is comfortable, up to 2
    fits.
    """
    if wish != "auto":
        return wish if wish in load else next(iter(load))
    leanest = min((mode for mode in load if mode != "scores"), key=load.get)
    if load.get("full", 2) <= 1:
        return "full"
    return leanest if load[leanest] <= 2 or load["scores"] > 2 else "scores"


def warning(bytes_of):
    """What is wrong with a probe of these bytes a rank, by mode that the run may take; None where
    the leanest fits beside training.
    """
    mode, least = min(bytes_of.items(), key=lambda found: found[1])
    if least <= SPARE:
        return None
    other = "" if len(bytes_of) > 1 else "write memory: auto, or "
    return (
        f"probe.memory: {mode} needs {in_units(least)} a rank, and a GPU of {in_units(GPU)} has "
        f"{in_units(SPARE)} for it at most; {other}share it among more "
        "ranks: data-parallel ones with method: difference, or --tensor-model-parallel-size"
    )


def in_units(count):
    """Bytes as people say them: 43 MB, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
