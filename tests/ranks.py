"""Run a function on N gloo ranks: results in rank order, the traceback of the first rank that failed, no
hang."""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path


def run(function, world_size, *args, timeout=60.0):
    """function(rank, *args) on world_size gloo ranks; the list of what each returned.

    function: defined at module level (it is pickled). args and results: anything picklable. timeout in
    seconds for all ranks together. Raises RuntimeError with the rank's traceback, or with every rank's stack
    when time has run out.
    """
    context = multiprocessing.get_context(
        "forkserver"
    )  # one import of torch serves every test; forks a clean process
    context.set_forkserver_preload(["torch", "torch.distributed"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        port = free_port()
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            task = pickle.dumps((function, args))
            process = context.Process(
                target=_rank, args=(sender, rank, world_size, port, folder, timeout, task)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, folder, timeout)
        finally:
            for process in processes:
                process.terminate()
                process.join()
                process.close()
            for pipe in pipes:
                pipe.close()


def free_port():
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _collect(pipes, folder, timeout):
    results, waiting, end = {}, dict(enumerate(pipes)), time.monotonic() + timeout
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), max(0.0, end - time.monotonic()))
        if not ready:
            stacks = "".join(f"\nrank {r}:\n{Path(folder, f'stack{r}').read_text()}" for r in sorted(waiting))
            raise RuntimeError(f"ranks {sorted(waiting)} had not finished after {timeout} s{stacks}")
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            pipe = waiting.pop(rank)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died without a word (killed?)") from None
            if not ok:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = value
    return [results[r] for r in range(len(pipes))]


def _rank(sender, rank, world_size, port, folder, timeout, task):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    # the peers of a rank that fails see broken connections: only the first failure is worth a traceback
    stack = open(Path(folder, f"stack{rank}"), "w")  # noqa: SIM115  the handler below writes to it until the end
    faulthandler.dump_traceback_later(max(0.1, timeout - 2.0), file=stack)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        function, args = pickle.loads(task)
        answer = (True, function(rank, *args))
        torch.distributed.barrier()
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # a rank that failed must not wait for its peers in a destructor
