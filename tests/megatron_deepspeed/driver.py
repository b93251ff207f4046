"""Run pretrain_gpt.py of a Megatron-DeepSpeed tree many times: imports once, then one fork for each rank of each job.

    python driver.py TREE JOBS.json

JOBS.json is a list of {"script", "argv", "ranks", "out", "fault", "words_of_ranks"}; the last {rank: {old word: new one}}; every rank writes OUT/rankR.json (what it saw) and
OUT/rankR.log (what it printed). The driver looks over the host's shoulder only: it changes no number.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import types
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import counting
import half_precision_kernel

LIMIT = float(os.environ.get("DRIVER_LIMIT", "240"))  # seconds for one job


def main(tree, jobs):
    preload(tree)
    for job in json.loads(Path(jobs).read_text()):
        begun = time.monotonic()
        codes = launch(tree, job)
        spent = time.monotonic() - begun
        Path(job["out"], "codes.json").write_text(json.dumps(codes))
        print(f"{job['out']}: exit codes {codes}, {spent:.0f} s", flush=True)


def preload(tree):
    """What every run imports, without starting a thread."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(tree))
    for name, attribute in (("transformers", "AutoTokenizer"), ("regex", "compile")):
        try:
            __import__(name)
        except ImportError:  # its tokenizers want them on import, NullTokenizer does not
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], attribute, None)
    import deepspeed.env_report
    import megatron.training  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    deepspeed.env_report.main = lambda: None  # seconds of compiler tests, a screen of versions


def launch(tree, job):
    """Fork the ranks of one job and wait; their exit codes, 'late' for those that had to be killed."""
    Path(job["out"]).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            child(tree, job, rank, port)
        pids.append(pid)
    codes, end = [None] * len(pids), time.monotonic() + LIMIT
    while None in codes and time.monotonic() < end:
        for i, pid in enumerate(pids):
            if codes[i] is None and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[i] = os.waitstatus_to_exitcode(done[1])
                if codes[i]:
                    end = min(
                        end, time.monotonic() + 15.0
                    )  # the peers of a failed rank fail as well, or hang
        time.sleep(0.05)
    for i, pid in enumerate(pids):
        if codes[i] is None:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            codes[i] = "late"
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink()  # DeepSpeed leaves 69 MB of memory for each rank behind
    return codes


def child(tree, job, rank, port):
    """One rank: the script as the launcher would start it; ends the process."""
    code = 1
    try:
        log = os.open(f"{job['out']}/rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(0.8 * LIMIT)  # where a rank that will be killed as late is waiting
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_WORLD_SIZE=str(job["ranks"]),
            LOCAL_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        os.chdir(tree)
        own = job.get("words_of_ranks", {}).get(str(rank), {})
        sys.argv = [job["script"], f"--local_rank={rank}", *(own.get(word, word) for word in job["argv"])]
        seen = {"losses": [], "grad_norms": [], "delivered": [], "valid": []}
        watch(seen, f"{job['out']}/delivered{rank}" if job.get("told") else None)
        if job.get("seeded"):
            seed_models()
        if job.get("unrefused"):
            from megatron_commute.adapters.megatron_deepspeed import refusals

            refusals._FLAGS = tuple(row for row in refusals._FLAGS if row[0] not in job["unrefused"])
        if job.get("counted"):
            count_collectives(seen)
        if "--fp16" in job["argv"]:
            half_precision_kernel.let_cpu_train_in_fp16()
        if "--use-flash-attn-v2" in job["argv"]:
            half_precision_kernel.install()
        with inject(job.get("fault"), rank):
            runpy.run_path(job["script"], run_name="__main__")
        Path(job["out"], f"rank{rank}.json").write_text(json.dumps(seen))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        Path(job["out"], f"rank{rank}.json").write_text(json.dumps(seen))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(seen, told):
    """Note losses and gradient norms (as hexadecimal floats), delivered samples, and a fingerprint of the final model. told:
    a file into which delivered samples are written as they come, for processes that will be killed, or None."""
    from megatron import training
    from megatron.data.blendable_dataset import BlendableDataset

    log, train, evaluate, item = (
        training.training_log,
        training.train,
        training.evaluate,
        BlendableDataset.__getitem__,
    )

    def noted(loss_dict, *rest, **named):
        seen["losses"].append({key: float(value).hex() for key, value in loss_dict.items()})
        return log(loss_dict, *rest, **named)

    def trained(forward_step, model, optimizer, scheduler, batches, *rest):
        batches = None if batches is None else Noting(batches, seen["delivered"], told)
        done = train(forward_step, model, optimizer, scheduler, batches, *rest)
        digest = hashlib.sha256()
        for name, p in model[0].module.named_parameters():
            digest.update(name.encode())
            data = getattr(p, "ds_tensor", p).detach().float().contiguous()
            digest.update(data.numpy().tobytes())
        seen["model"] = digest.hexdigest()
        return done

    def evaluated(*args, **named):
        found = evaluate(*args, **named)
        seen["valid"].append({key: float(value).hex() for key, value in found[0].items()})
        return found

    training.training_log, training.train, training.evaluate = noted, trained, evaluated
    BlendableDataset.__getitem__ = lambda self, i: {**item(self, i), "position": self.dataset_sample_index[i]}


def count_collectives(seen):
    """Note after every step, before the host's log, how many collectives this rank has made since the first."""
    from megatron import training

    log, counted, seen["collectives"] = training.training_log, counting.collectives(), []
    found = counted.__enter__()

    def noted(*args, until_the_process_ends=counted, **named):
        seen["collectives"].append(len(found))
        return log(*args, **named)

    training.training_log = noted


def seed_models():
    """Give every parameter values that depend on its name and place in the whole model alone, not on the layout."""
    from megatron import training

    build = training.get_model

    def built(*args, **named):
        models = build(*args, **named)
        for name, p in models[0].named_parameters():
            if hasattr(p, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                    fill(name, p)
            else:
                fill(name, p)
        return models

    training.get_model = built


def fill(name, param):
    """param: the whole parameter `name` of this rank, perhaps a tensor-parallel shard."""
    import torch
    from megatron import get_args
    from megatron.core import parallel_state as mpu

    name, shape = of_whole_model(name, get_args().num_layers), list(param.shape)
    split = getattr(param, "tensor_model_parallel", False)
    if split:
        shape[param.partition_dim] *= mpu.get_tensor_model_parallel_world_size()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if split:
        ranks, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        # this Megatron splits queries, keys and values into thirds of what a rank holds
        parts = noise.chunk(3 if "query_key_value" in name else 1, dim=param.partition_dim)
        noise = torch.cat(
            [part.chunk(ranks, dim=param.partition_dim)[rank] for part in parts], param.partition_dim
        )
    with torch.no_grad():
        param.copy_((1.0 if "layernorm.weight" in name else 0.0) + 0.15 * noise)


def of_whole_model(name, layers):
    """The name in GPTModel of a parameter of GPTModel or GPTModelPipe."""
    head, _, rest = name.partition(".")
    if head == "tied_modules":
        return rest.replace("embed.", "embedding.", 1)
    if head.isdigit():
        place = f"layers.{int(head) - 2}" if int(head) - 2 < layers else "final_layernorm"
        return f"encoder.{place}.{rest}"
    return rest


class Noting:
    """An iterator that notes (domain, position) of every sample that passes."""

    def __init__(self, batches, delivered, told):
        self.batches, self.delivered, self.told = batches, delivered, told

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        domain = batch["domain"] if "domain" in batch else batch["dataset_idx"]
        keys = list(zip(domain.tolist(), batch["position"].tolist(), strict=True))
        self.delivered.extend(keys)
        if self.told:
            from megatron import get_args

            with open(self.told, "a") as file:
                file.write(json.dumps([get_args().curr_iteration, keys]) + "\n")
        return batch


@contextlib.contextmanager
def inject(fault, rank):
    """A fault in the probe of one rank: {"rank", "kind": "exception" | "nan" | "kill", "probe": which draw}, or on all ranks
    in what the plug-in writes and sees: {"kind": "ours"}. {"rank", "kind": "killed", "step", "seconds"}: SIGKILL so long after
    that step began."""
    if fault is not None and fault["kind"] == "ours":
        with in_our_own():
            yield
        return
    if fault is None or fault["rank"] != rank:
        yield
        return
    if fault["kind"] == "killed":
        kill_in_step(fault["step"], fault.get("seconds", 0.0))
        yield
        return
    from megatron_commute import hook

    measure, calls = hook.probe.measure, []

    def faulty(model, groups, team, draw, *rest):
        calls.append(1)
        if len(calls) != fault["probe"]:
            return measure(model, groups, team, draw, *rest)

        def drawn(part, domain, numbers):
            if part == "gradient" and fault["kind"] == "exception":
                raise OSError("a disk went away (injected)")
            if part == "gradient" and fault["kind"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(part, domain, numbers)

        if fault["kind"] == "nan":
            import dataclasses

            loss, gradient, nan = model.loss, model.gradient, float("nan")
            model = dataclasses.replace(
                model,
                loss=lambda *at: loss(*at) * nan,
                gradient=gradient and (lambda *at: [v * nan for v in gradient(*at)]),
            )
        return measure(model, groups, team, drawn, *rest)

    hook.probe.measure = faulty
    try:
        yield
    finally:
        hook.probe.measure = measure


def kill_in_step(step, seconds):
    """SIGKILL for this process `seconds` after step `step` (0-based) began, wherever it is by then."""
    from megatron import get_args, training

    train_step = training.train_step

    def stepped(*args):
        if get_args().curr_iteration == step:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return train_step(*args)

    training.train_step = stepped


@contextlib.contextmanager
def in_our_own():
    """Everything of the plug-in that no other rank waits for fails: record, report, curves, sight, state for checkpoints."""
    import unittest.mock as mock

    from megatron_commute import hook
    from megatron_commute.adapters.megatron_deepspeed import sight as sight
    from megatron_commute.record import log as record
    from megatron_commute.report import curves, plots

    full, broken = OSError(28, "No space left on device (injected)"), KeyError("injected")
    with contextlib.ExitStack() as faults:
        for place, name, fault in (
            (record.Record, "append", full), (plots, "report", full), (curves, "of", broken), (sight, "_mask", broken),
            (sight.Sight, "delivered", broken), (hook.Hook, "state_dict", broken),
        ):  # fmt: skip
            faults.enter_context(mock.patch.object(place, name, side_effect=fault))
        yield


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
