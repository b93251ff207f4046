"""Small training jobs for tests: data of three domains, the trainer's flags, and runs of the trainer on gloo ranks."""

import importlib.util
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np

DOMAINS = {"english": 0.6, "russian": 0.1, "code": 0.3}
VOCABULARY, SEQUENCE, HEADS = 256, 32, 2


def write_data(folder, documents=300, names=tuple(DOMAINS)):
    """Indexed data of these domains: Markov chains over 256 tokens, each with transitions of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's own, on import and on numpy 2
        _write_data(folder, documents, names)


def _write_data(folder, documents, names):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for d, name in enumerate(names):
        successor = np.random.default_rng(d).permutation(VOCABULARY)
        for split, count in (("train", documents), ("valid", 40)):
            rng = np.random.default_rng([d, count])
            builder = IndexedDatasetBuilder(f"{folder}/{name}_{split}.bin", dtype=np.uint16)
            for _ in range(count):
                text = rng.integers(VOCABULARY, size=int(rng.integers(60, 240)))
                follows = rng.random(len(text)) < 0.7
                for i in range(1, len(text)):
                    text[i] = successor[text[i - 1]] if follows[i] else text[i]
                builder.add_document(torch.from_numpy(text), [len(text)])
            builder.finalize(f"{folder}/{name}_{split}.idx")


def write_mixture(folder, name="mixture.yaml", *, mode="act", iters=40, batch=8, extra=""):
    """A mixture file over the data of `write_data`: budgets in the shares of DOMAINS, exact for the run. Mode act: law
    tilt, which moves weights whatever the target, unless `extra` names another."""
    samples = iters * batch
    budgets = [round(samples * share) for share in DOMAINS.values()]
    budgets[0] += samples - sum(budgets)
    rows = [
        f"  {domain}: {{path: {folder}/{domain}_train, weight: {share}"
        + (f", budget: {budget}}}" if mode != "shadow" else "}")
        for (domain, share), budget in zip(DOMAINS.items(), budgets, strict=True)
    ]
    law = "" if mode != "act" or "controller:" in extra else "controller: {law: tilt}"
    text = "\n".join(["domains:", *rows, f"mode: {mode}", "every: 8", "measure_budget: 0.99", extra, law])
    path = Path(folder, name)
    path.write_text(text + "\n")
    return str(path)


def flags(folder, *more, iters=40, batch=8):
    """The trainer's command line for a GPT of 36 thousand parameters."""
    blends = {
        split: [part for name, share in DOMAINS.items() for part in (str(share), f"{folder}/{name}_{split}")]
        for split in ("train", "valid")
    }
    fixed = f"""
        --num-layers 2 --hidden-size 32 --num-attention-heads {HEADS} --seq-length {SEQUENCE} --vocab-size {VOCABULARY}
        --micro-batch-size 2 --global-batch-size {batch} --train-iters {iters} --lr 3e-3 --lr-warmup-iters 4
        --log-interval 5 --eval-interval 20 --eval-iters 1 --num-workers 0"""
    data = ["--train-data-path", *blends["train"], "--valid-data-path", *blends["valid"]]
    return [*fixed.split(), *data, *(str(word) for word in more)]


def trainer():
    """launch/pretrain_gpt.py as a module."""
    path = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt.py"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as python does for a script
    spec = importlib.util.spec_from_file_location("pretrain_gpt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(rank, argvs, kill_at=None):
    """Run the trainer once for each command line, on this rank of a gloo job.

    Returns for each run {"losses": [per step, this rank's sequence losses], "probes": [what each probe saw]}. kill_at: the
    step of the last run before which this rank kills itself with SIGKILL.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    module = trainer()
    results = []
    for argv in argvs:
        seen = {"losses": [], "probes": []}
        dying = kill_at if argv is argvs[-1] else None
        with _watched(module, seen, dying):
            module.main(argv)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        results.append(seen)
    return results


def outcomes(rank, runs):
    """Run the trainer for each (command line, step to stop before or None): "stopped", "finished" or the exit status."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    told = []
    for argv, stop in runs:
        module = trainer()
        step_of = module.train_step

        def train_step(engine, batches, args, step, rank, step_of=step_of, stop=stop):
            if step == stop:
                raise KeyboardInterrupt
            return step_of(engine, batches, args, step, rank)

        module.train_step = train_step
        try:
            module.main(argv)
            told.append("finished")
        except KeyboardInterrupt:
            told.append("stopped")
        except SystemExit as end:
            told.append(end.code)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return told


class _watched:
    """Look over the trainer's shoulder: per-step losses, and the weights and metric that every probe saw."""

    def __init__(self, module, seen, kill_at):
        self.module, self.seen, self.kill_at = module, seen, kill_at

    def __enter__(self):
        from megatron_commute.measure import probe

        self.step, self.measure = self.module.train_step, probe.measure
        self.module.train_step, probe.measure = self._train_step, self._measure

    def __exit__(self, *_):
        from megatron_commute.measure import probe

        self.module.train_step, probe.measure = self.step, self.measure

    def _train_step(self, engine, batches, args, step, rank):
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.engine = engine
        result = self.step(engine, batches, args, step, rank)
        self.seen["losses"].append(np.concatenate([loss for _, loss in result]))
        return result

    def _measure(self, model, groups, team, draw, settings, *rest):
        found = self.measure(model, groups, team, draw, settings, *rest)
        metric = model.metric(settings.metric)
        self.seen["probes"].append(
            {
                "state": {
                    n: p.detach().float().numpy().copy() for n, p in self.engine.module.named_parameters()
                },
                "metric": None if metric is None else [d.numpy().copy() for d in metric],
                "M": found.M,
                "draw": {
                    (part, k): draw(part, k, np.arange(settings.samples)).numpy()
                    for part in ("direction", "gradient")
                    for k in range(len(DOMAINS))
                },
            }
        )
        return found


def under_deepspeed(rank, model, stage, place):
    """One AdamW step of a model of transformers under ZeRO `stage`, saved in `place` as Trainer does; second moments and
    weights by DeepSpeed's own accessors."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    config = {"train_batch_size": 2, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=inner, config=config)
        engine.backward(engine.module(tokens, labels=tokens).loss)
        engine.step()
        engine.save_checkpoint(str(place))
    moments = [safe_get_full_optimizer_state(p, "exp_avg_sq") / (1 - 0.999) for p in model.parameters()]
    weights = [safe_get_full_fp32_param(p).clone() for p in model.parameters()]
    (model if stage == 1 else model.config).save_pretrained(place)
    return moments, weights
