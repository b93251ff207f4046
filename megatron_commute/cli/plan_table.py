"""The table of `plan --table`: what a probe would hold, send and take on large models, by layout.

Everything is counted from the mixture file and a dense GPT of each size; the seconds are a
prediction for hardware that is named, never a measurement.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_commute.config import Config, Run
from megatron_commute.settings import memory, probe_cost

PARAMETERS = (1e9, 7e9, 13e9, 70e9)
DATA, TENSOR, PIPELINE = (8, 64), (1, 8), (1, 4)
STAGES = {1: (0, 1, 2, 3), 4: (0, 1)}  # of ZeRO, by pipeline stages: DeepSpeed's pipelines take no more


class Hardware(NamedTuple):
    """A rank's share of a machine by its data sheet, and the part of its arithmetic attained."""

    name: str = "H100 SXM, 80 GB, one 400 Gb/s InfiniBand port a GPU"
    memory: float = 80e9
    flops: float = 67e12  # float32 outside tensor cores, in which probes work
    attained: float = 0.5  # assumed
    wire: float = 50e9  # bytes a second


class Layout(NamedTuple):
    """Ranks by kind of parallelism, and the stage of ZeRO."""

    dp: int
    tp: int
    pp: int
    zero: int


def layouts() -> Iterator[Layout]:
    for dp, tp, pp in itertools.product(DATA, TENSOR, PIPELINE):
        yield from (Layout(dp, tp, pp, zero) for zero in STAGES[pp])


def training_bytes(parameters: float, layout: Layout) -> float:
    """Bytes of weights and gradients (2 each, bf16) and of Adam's states (12) on a rank:
    Rajbhandari et al. 2020, figure 1.
    """
    whole = (0, 12, 14, 16)[layout.zero]  # bytes a parameter that are shared out
    return parameters * (16 - whole + whole / layout.dp)


def rows(config: Config, run: Run, targets: int) -> Iterator[dict[str, Any]]:
    """One row for each size and layout that training itself has room for on Hardware(). run: sizes
    of sequence and micro-batch; targets: T of the plan.
    """
    machine = Hardware()
    for parameters, layout in itertools.product(PARAMETERS, layouts()):
        _, largest = memory.dense_gpt(parameters)
        words, ranks = largest / layout.tp, layout.tp * layout.pp
        own = (parameters - largest) / ranks + words  # the fullest stage holds the words too
        training = training_bytes(own, layout)
        if training > machine.memory:
            continue
        possible = memory.possible(
            config.probe.method, layout.dp, only_shards=layout.zero == 3, any_shards=True
        )
        demand = memory.Demand(
            domains=len(config.domains),
            method=config.probe.method,
            metric=config.probe.metric,
            ranks=layout.dp,
            low_precision=True,
            offload=config.probe.offload,
        )
        held = {mode: memory.size(mode, demand, whole=4 * own, largest=4 * words) for mode in possible}
        room = (machine.memory - training) / 2
        mode = memory.choose(config.probe.memory, {mode: held[mode] / room for mode in possible})
        sequences, vectors = work(
            config=config,
            micro_batch=run.micro_batch,
            layout=layout,
            targets=targets,
            mode=mode,
            shared=memory.layers(mode, demand) > 0,
        )
        wire = vectors * 4 * own
        flops = 6 * own * run.seq_length * sequences
        yield {
            "parameters": parameters,
            **layout._asdict(),
            "training_bytes": round(training),
            "memory": mode,
            "bytes": round(held[mode]),
            "host_bytes": round(memory.host_size(mode, demand, 4 * own)),
            "fits": held[mode] <= machine.memory - training,
            "wire_bytes": round(wire),
            "predicted_seconds": flops / (machine.flops * machine.attained) + wire / machine.wire,
        }


def work(
    *, config: Config, micro_batch: int, layout: Layout, targets: int, mode: str, shared: bool
) -> tuple[float, float]:
    """What one rank does in a probe: how many sequences' gradients it takes, the idle ones of a
    pipeline included, and how many vectors of its size it sends. shared: whether vectors lie in
    shards.
    """
    probe, domains = config.probe, len(config.domains)
    team = layout.dp if shared else max(1, layout.dp // probe.splits)
    rounds = probe.splits if shared else -(-probe.splits // layout.dp)
    drawn = probe_cost.sequences_drawn(probe)
    each = probe_cost.GRADIENTS_PER_SAMPLE[probe.method] * (2 if mode == "scores" else 1)
    kinds = [  # how many sequences of a domain a split takes, and how often
        (drawn["direction"] // probe.splits, rounds * domains),
        (drawn["gradient"] // probe.splits, rounds * domains * each),
    ]
    if probe.method == "difference":
        kinds.append((1, domains * probe_cost.CHECK_GRADIENTS))
    micro = [(-(-count // (team * micro_batch)), times) for count, times in kinds]
    sequences = targets * sum(
        min(micro_batch, -(-count // team)) * (batches + layout.pp - 1) * times
        for (count, _), (batches, times) in zip(kinds, micro, strict=True)
    )
    others = (team - 1) / team
    if shared:  # gathered, gathered again, scattered
        return sequences, targets * 3 * others * sum(batches * times for batches, times in micro)
    # sums over a team, twice its size on the wire
    return sequences, targets * rounds * 2 * others * (1 + (2 if mode == "scores" else domains))


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table in words."""
    held = memory.in_units(row["bytes"]) + ("" if row["fits"] else ", no room")
    return [
        f"{row['parameters'] / 1e9:g} billion",
        *(str(row[name]) for name in Layout._fields),
        memory.in_units(row["training_bytes"]),
        row["memory"],
        held,
        memory.in_units(row["wire_bytes"]),
        f"{row['predicted_seconds']:.3g}",
    ]


HEADERS = ["parameters", "DP", "TP", "PP", "ZeRO", "training a rank", "probe.memory", "probe a rank"]
HEADERS += ["wire a rank", "seconds, predicted"]


def notes(config: Config, run: Run) -> list[str]:
    """What the table counts and what it leaves out."""
    machine = Hardware()
    return [
        f"One probe of {len(config.domains)} domains, {config.probe.samples} sequences each, of "
        f"{run.seq_length} tokens in micro-batches of {run.micro_batch}; bf16 training with Adam.",
        f"The seconds are a PREDICTION, nothing was measured: {machine.name}; {machine.flops / 1e12:g} "
        f"TFLOP/s of float32, {machine.attained:.0%} attained, {machine.wire / 1e9:g} GB/s; nothing "
        "overlaps. Activations, and what tensor and pipeline parallelism send, are left out, as are "
        f"layouts whose training alone passes {memory.in_units(machine.memory)}.",
    ]
