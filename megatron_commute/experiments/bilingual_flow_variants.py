"""Settings of study `flow`: shares, targets, sizes, repetitions and rates, by name."""

import dataclasses

UNTRAINED_TEXT = ("handbook_english", "handbook_russian")
BASE = {"english": 0.6, "russian": 0.1, "code": 0.3}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A setting of the study."""

    shares: dict = dataclasses.field(default_factory=lambda: BASE)
    # of the samples, by trained domain
    target: dict = dataclasses.field(default_factory=lambda: {"russian": 1.0})
    # the low-resource target
    changes: dict = dataclasses.field(default_factory=dict)
    # of bilingual_trainer.Settings
    rate: float = 1.0
    # factor of the peak learning rate
    limits: dict = dataclasses.field(default_factory=dict)
    # sequences of a domain, as a part of its budget


HALVES = {"english:1/2": 0.2, "english:2/2": 0.2, "russian:1/2": 0.05, "russian:2/2": 0.05}
HALVES |= {"code:1/2": 0.1, "code:2/2": 0.1, "handbook_english": 0.15, "handbook_russian": 0.15}
FIVE = {"english": 0.4, "russian": 0.1, "code": 0.3, "handbook_english": 0.1, "handbook_russian": 0.1}
VARIANTS = {
    "base": Variant(),
    "low-resource code": Variant({"english": 0.3, "russian": 0.6, "code": 0.1}, {"code": 1.0}),
    "low-resource English": Variant({"english": 0.1, "russian": 0.6, "code": 0.3}, {"english": 1.0}),
    "0.5M": Variant(changes={"layers": 4, "hidden": 96, "heads": 4}),
    "2M": Variant(changes={"layers": 4, "hidden": 192, "heads": 4}),
    "1 epoch": Variant(limits={"russian": 1.0}),
    "4 epochs": Variant(limits={"russian": 1 / 4}),
    "16 epochs": Variant(limits={"russian": 1 / 16}),
    "K = 2": Variant({"english": 0.9, "russian": 0.1}),
    "K = 5": Variant(FIVE),
    "K = 8": Variant(HALVES, {"russian:1/2": 0.5, "russian:2/2": 0.5}),
    "a third of the rate": Variant(rate=1 / 3),
}
