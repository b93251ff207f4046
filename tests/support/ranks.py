"""Run a function on N gloo ranks: results in rank order, the traceback of the first rank that failed, no
hang."""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
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
    # one import of torch serves every test, and what is forked is a process without threads
    context = multiprocessing.get_context("forkserver")
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
    for rank, pipe in enumerate(pipes):  # the clock starts when every rank has imported torch
        if not pipe.poll(120.0) or _receive(pipe, rank) != "ready":
            raise RuntimeError(f"rank {rank} has not started")
    results, failures, waiting = {}, [], dict(enumerate(pipes))
    end = time.monotonic() + timeout
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), max(0.0, end - time.monotonic()))
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            ok, moment, value = _receive(waiting.pop(rank), rank)
            if ok:
                results[rank] = value
            else:
                failures.append((moment, rank, value))
                end = min(end, time.monotonic() + 2.0)  # the peers of a failed rank fail as well, or hang
        if not ready:
            break
    if failures:
        _, rank, text = min(failures)
        raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{text}")
    if waiting:
        stacks = "".join(f"\nrank {r}:\n{Path(folder, f'stack{r}').read_text()}" for r in sorted(waiting))
        raise RuntimeError(f"ranks {sorted(waiting)} had not finished after {timeout} s{stacks}")
    return [results[r] for r in range(len(pipes))]


def _receive(pipe, rank):
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, 0.0, f"rank {rank} died without a word (killed?)"  # before its peers noticed


def _rank(sender, rank, world_size, port, folder, timeout, task):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    stack = open(Path(folder, f"stack{rank}"), "w")  # noqa: SIM115  the handler below writes to it until the end
    faulthandler.dump_traceback_later(0.7 * timeout, file=stack)
    sender.send_bytes(pickle.dumps("ready"))
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        function, args = pickle.loads(task)
        answer = pickle.dumps((True, 0.0, function(rank, *args)))
        torch.distributed.barrier()
    except BaseException:
        answer = pickle.dumps((False, time.monotonic(), traceback.format_exc()))
    sender.send_bytes(answer)
    sys.stdout.flush()
    os._exit(0)  # a rank that failed must not wait for its peers in a destructor


def two_nodes(folder, words, surroundings, port, timeout):
    """(exit status, output) of two nodes that launch/multi_node.sh starts here as the lines of folder/hosts; each leads a
    process group of its own, killed as a whole when time (seconds) runs out. words: the script and its flags."""
    script, started = Path(__file__).parents[2] / "launch" / "multi_node.sh", []
    for number in "01":
        command = ["bash", script, "--hostfile", folder / "hosts", "--node-rank", number]
        command += ["--master-addr", "127.0.0.1", "--master-port", port, "--", *words]
        output = open(folder / f"output{number}", "w+")  # noqa: SIM115  the node writes to it until it ends
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**surroundings, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip
        started.append((process, output))
    try:
        for process, _ in started:
            process.wait(timeout=timeout)
        told = []
        for process, output in started:
            output.seek(0)
            told.append((process.returncode, output.read()))
        return told
    finally:
        for process, output in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            output.close()
