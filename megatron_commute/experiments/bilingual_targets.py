"""What memory another target has (part `targets` of study `design`).

The memory that fits the influences on the loss of every domain, where it has a tenth, three tenths
and six tenths of the samples, and where related text is trained beside it; then law flow with
several memories towards code and English, scarce and not. Seeds and sequences that choose are not
those that report.
"""

import dataclasses

from megatron_commute.design import cells
from megatron_commute.design import run as work
from megatron_commute.experiments import bilingual_criterion as criterion
from megatron_commute.experiments.bilingual_flow_variants import VARIANTS, Variant
from megatron_commute.experiments.bilingual_tables import write_csv

MIXTURES = ("base", "low-resource code", "low-resource English", "K = 5")  # of VARIANTS
TARGETS = {name: Variant(target={name: 1.0}) for name in ("code", "english")}
SCARCE = {"scarce code": "low-resource code", "scarce English": "low-resource English"}
TARGETS |= {name: VARIANTS[key] for name, key in SCARCE.items()}
MEMORIES = (2.5, 5.0, 7.5, 10.0)
FITTED, CHOOSING = (101, 102), (101, 102, 103)  # seeds


def part(designed, designed_flow, judged, styles, folder, seeds, processes, tell):
    """Rows of law flow as it is and with the memory that chooses best, on `seeds` that report.
    designed: style and keywords of bilingual_design.designed -> Design; judged: that of
    bilingual_design.
    """
    write_csv(folder / "targets_fitted.csv", fitted(designed, styles, folder, processes, tell))
    tried, rows = [], []
    for target, setting in TARGETS.items():
        for style in styles:
            design, place = designed(style, setting=setting), folder / f"{style}-target-{target}"
            roads = {f"memory {c:g}": designed_flow(design, memory=c) for c in MEMORIES}
            about = {"x": target, "style": style}
            tried += judged(design, place, roads, CHOOSING, about, processes, tell, choosing=True)
            own = [row for row in tried if about.items() <= row.items() and row["name"] == "target"]
            best = min(own, key=lambda row: row["percent"])["schedule"]
            schedules = {"flow": designed_flow(design), best: roads[best]}
            rows += judged(design, place, schedules, seeds, about, processes, tell)
    write_csv(folder / "targets_choosing.csv", tried)
    return rows


def fitted(designed, styles, folder, processes, tell):
    """Rows: the memory that fits the influences on the loss of every domain, in every mixture."""
    rows = []
    for mixture in MIXTURES:
        for style in styles:
            design = designed(style, untrained=False, setting=VARIANTS[mixture])
            jobs = [(f"recorded/{seed}", work.recorded, {"seed": seed}) for seed in FITTED]
            found = cells.fill(folder / f"{style}-targets-{mixture}", design, jobs, processes, tell)
            for seed in FITTED:
                for k, name in enumerate(design.names):
                    alone = tuple(float(j == k) for j in range(len(design.names)))
                    one = dataclasses.replace(design, target=alone)
                    memory, explained = criterion.fitted_memory(one, found[f"recorded/{seed}"])
                    row = {"mixture": mixture, "style": style, "seed": seed, "target": name}
                    row["share"] = round(design.proxy.shares[k], 3)
                    rows.append(row | {"memory": memory, "explained": explained})
    return rows
