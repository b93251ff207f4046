"""Law flow against the constant mixture on Megatron-DeepSpeed itself: two data-parallel ranks, ZeRO 1, paired seeds.

    python launch/prepare_data.py --out DATA --by-package --vocab-size 512
    MEGATRON_DEEPSPEED=PATH python tests/megatron_deepspeed/flow_gain.py FOLDER DATA

A GPT of 83,520 parameters, 500 steps of 32 sequences, mode fixed, target russian, equal budgets; losses are the host's own
validation after the last step. On a CPU this host's Adam adds weight decay to the gradient: at 0.1 that keeps so small a
model near the frequencies of single tokens, so 0 is run beside it. Runs lie in FOLDER, and those that are complete are not
run again. Rewrites flow_gain_runs.csv (each run) and flow_gain.csv (changes in percent of the constant mixture's loss, 95 %
intervals); with --table from the runs that are complete.
"""

import csv
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import matrix
import numpy as np

from megatron_commute.experiments.bilingual_flow_tables import change
from megatron_commute.record import log as record

SHARES = {"english": 0.6, "russian": 0.1, "code": 0.3}
STEPS, BATCH, STYLES, LAWS, SEEDS = 500, 32, ("cosine", "constant"), ("hold", "flow"), (1, 2, 3)
DECAYS = (0.0, 0.1)
MODEL = f"""
    --num-layers 2 --hidden-size 48 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 16 --global-batch-size {BATCH} --train-iters {STEPS} --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 25
    --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0 --log-interval 50
    --eval-interval {STEPS} --eval-iters 48 --tokenizer-type NullTokenizer --vocab-size 512 --data-impl mmap
    --make-vocab-size-divisible-by 16 --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --distributed-backend gloo --deepspeed --no-pipeline-parallel --zero-stage 1 --num-workers 0
    --save-interval {STEPS}"""


def job(folder, data, tree, decay, style, law, seed):
    """One run as driver.py takes it."""
    out = Path(folder, "runs", f"{decay:g}-{style}-{law}-{seed}")
    save = out / "save"
    save.mkdir(parents=True, exist_ok=True)
    config = {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": 16, "steps_per_print": 10**9}
    config |= {"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}
    (save / "deepspeed.json").write_text(json.dumps(config))
    rows = [
        f"  {name}: {{path: {data}/{name}_train, weight: {share}, budget: {round(STEPS * BATCH * share)}}}"
        for name, share in SHARES.items()
    ]
    text = ["domains:", *rows, "target: {russian: 1}", "mode: fixed", f"every: {STEPS}", f"seed: {seed}"]
    text += ["probe: {samples: 8, splits: 2}", f"controller: {{law: {law}}}"]
    file = out / "mixture.yaml"
    file.write_text("\n".join(text) + "\n")
    words = [*MODEL.split(), "--deepspeed_config", f"{save}/deepspeed.json", "--save", str(save)]
    words += [
        "--weight-decay",
        str(decay),
        "--lr-decay-style",
        style,
        "--seed",
        str(seed),
        "--data-cache-path",
        f"{folder}/cache",
    ]
    for split, shares in (("train", SHARES), ("valid", dict.fromkeys(SHARES, 1))):
        words += [f"--{split}-data-path"]
        words += [part for name, share in shares.items() for part in (str(share), f"{data}/{name}_{split}")]
    words += ["--commute", str(file)]
    return {"script": f"{tree}/pretrain_gpt.py", "argv": words, "ranks": 2, "out": str(out)}


def final(planned):
    """Validation losses {domain: nats} of a job after its last step, None where it is not complete."""
    file = Path(planned["out"], "save", record.NAME)
    lines = record.read(file) if file.exists() else []
    if not lines or lines[-1]["event"] != "end":
        return None
    served = lines[-1]["served"]
    assert served == {name: round(STEPS * BATCH * share) for name, share in SHARES.items()}
    *_, valid = [line["valid"] for line in lines if line["event"] == "loss" and line.get("valid")]
    return valid


def runs(folder, data, table_only=False):
    """{(decay, style, law, seed): losses, None where it is not complete}; runs what is missing."""
    _, tree = matrix.trees(folder)
    asked = list(itertools.product(DECAYS, STYLES, LAWS, SEEDS))
    asked.sort(key=lambda place: place[-1])  # pairs first
    planned = {}
    for place in asked:
        one = job(folder, data, tree, *place)
        if final(one) is None and not table_only:
            shutil.rmtree(Path(one["out"]) / "save")
            planned["-".join(map(str, place))] = job(folder, data, tree, *place)
    if planned and not table_only:
        os.environ.setdefault("DRIVER_LIMIT", "3600")  # seconds of a run
        matrix.run(folder, planned)
    return {place: final(job(folder, data, tree, *place)) for place in asked}


def table(found):
    """Rows: change of every loss under flow, the shares' mixture and the even one included."""
    rows = []
    for decay, style in itertools.product(DECAYS, STYLES):
        pairs = [[found[decay, style, law, seed] for law in LAWS] for seed in SEEDS]
        pairs = [pair for pair in pairs if None not in pair]
        for loss in (*SHARES, "mixture", "even") if len(pairs) > 1 else ():
            weights = {"mixture": list(SHARES.values()), "even": [1 / 3] * 3}
            weights = weights.get(loss, [float(name == loss) for name in SHARES])
            base, ours = np.array(
                [[np.dot(weights, [one[name] for name in SHARES]) for one in pair] for pair in pairs]
            ).T
            rows.append({"weight_decay": decay, "style": style, "loss": loss, **change(ours, base)})
    return rows


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    places = (str(Path(place).resolve()) for place in sys.argv[1:3])
    found = runs(*places, table_only="--table" in sys.argv)
    here = Path(__file__)
    named = ("weight_decay", "style", "law", "seed")
    each = [dict(zip(named, place, strict=True)) | losses for place, losses in found.items() if losses]
    write(here.with_name("flow_gain_runs.csv"), each)
    rows = table(found)
    write(here.with_suffix(".csv"), rows)
    for row in rows:
        print(
            f"{row['weight_decay']}, {row['style']}: {row['loss']} {row['percent']:+.2f} ± {row['percent_interval']:.2f} %"
        )


if __name__ == "__main__":
    main()
