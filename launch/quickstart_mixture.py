#!/usr/bin/env python3
"""The quickstart's mixture file: quickstart.yaml fitted to the prepared domains and the length of
the run.

A file that is there already stays as it is. Prints a line `NAME WEIGHT PREFIX` for each of its
domains.
"""

import argparse
import io
import json
import os
import sys
from pathlib import Path

from ruamel.yaml import YAML

TEMPLATE = Path(__file__).with_name("quickstart.yaml")


def uneven(count: int) -> list[float]:
    """Weights of `count` domains, each a third of the one before: 0.75, 0.25 for two. They sum to
    1.
    """
    parts = [3.0**-k for k in range(count)]
    rest = [round(part / sum(parts), 6) for part in parts[1:]]
    return [round(1 - sum(rest), 6), *rest]


def budgets(weights: list[float], samples: int) -> list[int]:
    """Sequences of each domain by its weight, at least one, `samples` in all; the first takes the
    rest.
    """
    counts = [max(1, round(weight * samples)) for weight in weights]
    return [samples - sum(counts[1:]), *counts[1:]]


def fitted(
    names: list[str], data: str, iterations: int, samples: int, law: str = "flow", seed: int = 1234
) -> str:
    """Text of the mixture file for these domains; the template's own keep their order and weights.

    The rarest domain is the target. A run too short for four probes at the template's interval
    probes more often; one under law hold, which is there to compare with, not at all.
    """
    yaml = YAML()
    yaml.width = 110
    content = yaml.load(TEMPLATE.read_text(encoding="utf-8"))
    domains = content["domains"]
    if sorted(domains) != sorted(names):
        content["domains"] = domains = {
            name: {"path": f"data/{name}_train", "weight": weight}
            for name, weight in zip(names, uneven(len(names)), strict=True)
        }
        content["target"] = {names[-1]: 1}
    content["controller"]["law"], content["seed"] = law, seed
    counts = budgets([domain["weight"] for domain in domains.values()], samples)
    for (name, domain), count in zip(domains.items(), counts, strict=True):
        domain["path"], domain["budget"] = f"{data}/{name}_train", count
    content["every"] = max(1, min(content["every"], iterations // 5)) if law == "flow" else iterations
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def main(argv: list[str] | None = None) -> int:
    from megatron_commute.config import ConfigError, load

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="mixture file to write")
    parser.add_argument("--train-iters", type=int, required=True, help="steps of the run")
    parser.add_argument("--global-batch-size", type=int, required=True, help="sequences in a step")
    parser.add_argument(
        "--law", default="flow", help="law of the file: flow, or hold for the constant mixture"
    )
    parser.add_argument("--seed", type=int, default=1234, help="order of the sequences inside every domain")
    arguments = parser.parse_args(argv)
    if not arguments.out.exists():
        names = list(json.loads((arguments.data / "data.json").read_text(encoding="utf-8"))["domains"])
        data = os.path.relpath(arguments.data, arguments.out.parent)
        iterations = arguments.train_iters
        samples = iterations * arguments.global_batch_size
        part = arguments.out.with_name(arguments.out.name + ".part")
        part.write_text(
            fitted(names, data, iterations, samples, arguments.law, arguments.seed), encoding="utf-8"
        )
        part.replace(arguments.out)
    try:
        config = load(arguments.out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = sum(domain.weight or 0.0 for domain in config.domains) or 1.0
    for domain in config.domains:
        print(domain.name, f"{(domain.weight or 0.0) / total:.6f}", domain.path[0], sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main())
