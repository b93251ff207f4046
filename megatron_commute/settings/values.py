"""What a mixture file says, key by key, as `mixture_file.load` hands it on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_commute.settings.yaml_checks import ConfigError, complaint


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a domain the run uses, exactly."""

    amount: int
    # in `unit`
    unit: str = "sequences"
    # or "tokens"

    def sequences(self, seq_length: int) -> int:
        """Whole sequences of `seq_length` tokens; the tokens that fill none are left out."""
        return self.amount if self.unit == "sequences" else self.amount // seq_length

    def remainder(self, seq_length: int) -> int:
        """Tokens of the budget that fill no sequence."""
        return 0 if self.unit == "sequences" else self.amount % seq_length


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One domain as written."""

    name: str
    # its key in the file
    path: tuple[str, ...]
    # prefixes of .bin/.idx pairs
    weight: float | None = None
    # share at the beginning; None: by budget or schedule
    budget: Budget | None = None
    # None: as much as its weight takes
    minimum: float = 0.0
    # share that it never falls below
    maximum: float = 1.0
    # share that it never passes
    holdout: int | str | None = None
    # a count of its last sequences, a prefix of its own, or None: the default count


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How the criterion is measured."""

    samples: int = 64
    # sequences per domain in all splits together
    splits: int = 4
    # independent replicates, whose spread is the standard error
    method: str = "difference"
    # of the Hessian-vector products, one of METHODS
    metric: str = "adam"
    # of inner products, one of METRICS
    memory: str = "auto"
    # way of working, one of MEMORIES
    offload: bool = False
    # whether vectors are kept in the memory of the host
    time_limit: float | None = None
    # seconds (soft), or None


LARGEST_MEMORY = 10.0  # of law flow that was ever measured: there a cosine is harmed


@dataclass(frozen=True, kw_only=True)
class Controller:
    """What makes new weights of a measurement, and its guardrails."""

    law: str = "tilt"
    # its name in decide.laws; of a file that names none in mode act: "flow"
    strength: float = 1.0
    # of the law's answer to a score
    memory: float = 2.5
    # of law flow: how much of a sample is forgotten over the run's flow, as a power of e
    rate: float = 0.05
    # largest change of a weight in one decision; of a file that gives none under law flow: 1
    confidence: float = 0.95
    # with which a score must be told from zero
    floors: tuple[float, ...] = ()
    # least shares, one per domain
    caps: tuple[float, ...] = ()
    # largest shares, one per domain
    cooldown: int = 1
    # decisions to rest after a change
    freeze: float = 1.0
    # part of the run at whose end the law stops
    compare: tuple[str, ...] = ()
    # laws whose decisions are logged and never act


@dataclass(frozen=True, kw_only=True)
class Config:
    """A mixture file."""

    domains: tuple[Domain, ...]
    # in the order of the file
    target: Mapping[str, float] | str | None = None
    # shares by name, "each", or None: the run's own mixture
    mode: str = "shadow"
    # one of MODES
    every: int = 1000
    # training steps between two probes
    lead: int | None = None
    # samples between a decision and its effect; None: four global batches
    seed: int = 1234
    # of the order of sequences within domains
    probe: Probe = field(default_factory=Probe)
    # how the criterion is measured
    controller: Controller = field(default_factory=Controller)
    # what is made of it
    schedule: str | None = None
    # path of a CSV file that mode fixed follows
    measure_budget: float = 0.005
    # share of the training compute that probes may take before a warning
    file: str = "mixture.yaml"
    # where it was read
    digest: str = ""
    # sha256 of the content, not of comments, layout and place
    lines: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    # line of each dotted key

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    def error(self, key: str, problem: str, cure: str) -> ConfigError:
        """The complaint about a dotted `key`, with file and line."""
        return complaint(self.file, self.lines, key, problem, cure)
