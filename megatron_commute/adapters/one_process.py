"""megatron-core and DeepSpeed in a process of its own, without a launcher: for models that are
looked at, not trained.
"""

import contextlib
import logging
import os
import tempfile

import torch

from megatron_commute.adapters import megatron_core


@contextlib.contextmanager
def one_process():
    """megatron-core's process groups for a single process, taken down at the end; as it is where
    they stand already. The hosts' warnings about their own defaults are silent meanwhile.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("torch.utils.cpp_extension", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with megatron_core.quiet_import(), contextlib.ExitStack() as started:
        from megatron.core import parallel_state

        if not parallel_state.is_initialized():
            _start(parallel_state, started)
        yield


def _start(parallel_state, started):
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not deepspeed.comm.is_initialized():
        compiled = deepspeed.ops.__compatible_ops__
        before = compiled.get("deepspeed_shm_comm")
        compiled["deepspeed_shm_comm"] = False  # or it is built first, which takes minutes
        folder = started.enter_context(tempfile.TemporaryDirectory())
        where = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, **where)
        compiled["deepspeed_shm_comm"] = before
        started.callback(deepspeed.comm.destroy_process_group)
    megatron_core.initialise(1, 0)
    started.callback(parallel_state.destroy_model_parallel)
