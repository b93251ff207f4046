"""The runs whose checkpoints are analysed: trained once for all files of this folder."""

import jobs
import pytest
import ranks
from checkpoint_runs import RICH, flags, prepare


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Checkpoints at steps 4, 8 and 10 of the same runs on one rank and on two: ZeRO 1 and 3, tensor-parallel."""
    path, two = tmp_path_factory.mktemp("checkpoints"), ("--tensor-model-parallel-size", 2)
    prepare(path)
    argvs = [flags(path, "zero1", 1), flags(path, "zero3", 3, plugin=False), flags(path, "tensor", 1, *two)]
    ranks.run(jobs.train, 2, [*argvs, flags(path, "tensor-rich", 1, *two, *RICH)], timeout=300)
    argvs = [
        flags(path, "run", 1),
        flags(path, "run-stock", 0, plugin=False),
        flags(path, "run-rich", 1, *RICH),
    ]
    ranks.run(jobs.train, 1, argvs, timeout=300)
    return path
