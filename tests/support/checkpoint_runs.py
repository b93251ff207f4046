"""Runs with checkpoints for tests of `analyze`: their data and flags, the command, and what it leaves."""

import hashlib
import json
from pathlib import Path

import jobs
from click.testing import CliRunner

from megatron_commute.cli.main import main
from megatron_commute.record import log as record

ITERS, EVERY = 10, 4

RICH = [
    *(
        "--num-attention-heads",
        "4",
        "--swiglu",
        "--normalization",
        "RMSNorm",
        "--position-embedding-type",
        "rope",
    ),
    *("--group-query-attention", "--num-query-groups", "2", "--untie-embeddings-and-output-weights"),
    "--disable-bias-linear",
]


def flags(folder, name, stage, *more, plugin=True):
    hooked = ["--commute", folder / "mixture.yaml"] if plugin else []
    fixed = [
        "--save",
        folder / name,
        "--save-interval",
        EVERY,
        "--deepspeed_config",
        folder / f"zero{stage}.json",
    ]
    still = ["--hidden-dropout", 0, "--attention-dropout", 0]
    return jobs.flags(folder, *hooked, *fixed, *still, *more, iters=ITERS)


def prepare(folder):
    """Data, mixture file and DeepSpeed configurations in `folder`."""
    jobs.write_data(folder)
    extra = "probe: {samples: 8, splits: 2, method: difference, metric: adam}"
    path = Path(jobs.write_mixture(folder, mode="fixed", iters=ITERS, extra=extra))
    path.write_text(path.read_text().replace("every: 8", f"every: {EVERY}"))
    for stage in (0, 1, 3):
        config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
        if stage == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        Path(folder, f"zero{stage}.json").write_text(json.dumps(config))


def call(*words):
    found = CliRunner().invoke(main, ["analyze", *map(str, words)])
    assert found.exit_code in (0, 2), found.output
    return found


def probes(run):
    return {line["step"]: line for line in record.read(run) if line["event"] == "probe"}


def digests(run):
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }
