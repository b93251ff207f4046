"""The layouts of the matrix, and the command lines of tiny runs of Megatron-DeepSpeed in them."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import jobs

ITERS, BATCH, SAVED, SEQUENCE = 20, 8, 10, 32
MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine
    --weight-decay 0.01 --clip-grad 1.0 --log-interval 5 --eval-interval 10 --eval-iters 1
    --tokenizer-type NullTokenizer --vocab-size 256 --data-impl mmap
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --distributed-backend gloo --deepspeed"""


class Layout(NamedTuple):
    """stage: of ZeRO; extra: the flags that make it what it is; config: entries of DeepSpeed's configuration; length: the
    flags that end the run, of {iters} steps, {samples} or {tokens}."""

    stage: int
    ranks: int = 2
    extra: str = ""
    config: dict | None = None
    length: str = "--train-iters {iters} --lr-warmup-iters 2"

    @property
    def micro_batch(self):
        """Sequences of a forward pass."""
        return (self.config or {}).get(MICRO, 2)


MICRO = "train_micro_batch_size_per_gpu"
RAMP = (4, 2, 24)  # steps of 4, 4, 4, 6, 6 and then 8 samples
GROWING = f"--train-samples {{samples}} --lr-warmup-samples 16 --rampup-batch-size {' '.join(map(str, RAMP))}"
TENSOR = "--tensor-model-parallel-size"
BF16 = {"bf16": {"enabled": True}}
# begins with a scale that overflows, and tries a larger one every third step
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 3, "hysteresis": 1}}
PLAIN = "--no-pipeline-parallel"
EXPERTS = "--num-experts 4 --topk 1 --create-moe-param-group"
FLASH = "--use-flash-attn-v2"
LAYOUTS = {
    "zero0": Layout(0, extra=PLAIN),
    "zero1": Layout(1, extra=PLAIN),
    "zero2": Layout(2, extra=PLAIN),
    "zero3": Layout(
        3, extra=PLAIN, config={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    ),
    "tp2": Layout(1, extra=f"{PLAIN} --tensor-model-parallel-size 2"),
    "pipe1": Layout(1),
    "pp2": Layout(1, extra="--pipeline-model-parallel-size 2"),
    "bf16-zero1": Layout(1, extra=f"{PLAIN} --bf16", config=BF16),
    "checkpointing": Layout(
        1, extra=f"{PLAIN} --checkpoint-activations --deepspeed-activation-checkpointing"
    ),
    "single": Layout(1, 1, PLAIN),
    "bf16-single": Layout(1, 1, f"{PLAIN} --bf16", BF16),
    "bf16-pp2": Layout(1, 2, "--pipeline-model-parallel-size 2 --bf16", BF16),
    "pp2-tp2": Layout(1, 4, f"--pipeline-model-parallel-size 2 {TENSOR} 2"),
    "pp2-dp2": Layout(1, 4, "--pipeline-model-parallel-size 2"),
    "tp2-dp2": Layout(1, 4, f"{PLAIN} {TENSOR} 2"),
    "bf16-rope": Layout(1, 2, f"{PLAIN} --bf16 --use-rotary-position-embeddings", BF16),
    "flash": Layout(1, extra=f"{PLAIN} --bf16 {FLASH}", config=BF16),
    "flash-single": Layout(1, 1, f"{PLAIN} --bf16 {FLASH}", BF16),
    "flash-pp2": Layout(1, extra=f"--pipeline-model-parallel-size 2 --bf16 {FLASH}", config=BF16),
    "fp16": Layout(1, extra=f"{PLAIN} --fp16", config=FP16),
    "fp16-single": Layout(1, 1, f"{PLAIN} --fp16", FP16),
    "fp16-pp2": Layout(1, extra="--pipeline-model-parallel-size 2 --fp16", config=FP16),
    "sequence-parallel": Layout(1, extra=f"{PLAIN} {TENSOR} 2 --sequence-parallel"),
    "sequence-parallel-pipe": Layout(1, extra=f"{TENSOR} 2 --sequence-parallel --no-position-embedding"),
    "tp2-pipe": Layout(1, extra=f"{TENSOR} 2 --no-position-embedding"),
    "workers2": Layout(1, extra=f"{PLAIN} --num-workers 2"),
    "rampup": Layout(1, extra=f"{PLAIN} --micro-batch-size 1", config={MICRO: 1}, length=GROWING),
    "rampup-single": Layout(1, 1, f"{PLAIN} --micro-batch-size 1", {MICRO: 1}, GROWING),
    "rampup-pp2": Layout(1, extra="--pipeline-model-parallel-size 2", length=GROWING),
    "experts-single": Layout(1, 1, f"{PLAIN} {EXPERTS}"),
    "experts-kept-single": Layout(1, 1, f"{PLAIN} {EXPERTS} --disable-moe-token-dropping"),
    "experts-kept": Layout(1, extra=f"{PLAIN} {EXPERTS} --disable-moe-token-dropping"),
    "experts-apart": Layout(
        1, extra=f"{PLAIN} {EXPERTS} --disable-moe-token-dropping --moe-expert-parallel-size 2"
    ),
    "tokens": Layout(
        1, extra=PLAIN, length="--train-samples 100000 --train-tokens {tokens} --lr-warmup-samples 16"
    ),
    "gqa": Layout(1, extra=f"{PLAIN} --num-attention-heads 4 --num-key-value-heads 2"),
}


MATRIX = [
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "tp2",
    "pipe1",
    "pp2",
    "bf16-zero1",
    "checkpointing",
    "workers2",
    "rampup",
    "tokens",
    "fp16",
    "flash",
]


def flags(name, data, save, *more, iters=ITERS):
    """The command line of layout `name` on the data of jobs.write_data in folder `data`; checkpoints go to `save`."""
    layout = LAYOUTS[name]
    Path(save).mkdir(parents=True, exist_ok=True)
    config = Path(save, "deepspeed.json")
    entries = {
        "train_batch_size": BATCH,
        MICRO: 2,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": layout.stage},
        "gradient_clipping": 1.0,
        **(layout.config or {}),
    }
    config.write_text(json.dumps(entries))
    length = layout.length.format(iters=iters, samples=iters * BATCH, tokens=iters * BATCH * SEQUENCE)
    words = [*MODEL.split(), *layout.extra.split(), *length.split()]
    shards = int(words[words.index(TENSOR) + 1]) if TENSOR in words else 1
    words += ["--make-vocab-size-divisible-by", str(32 // shards)]  # the same padded size in every layout
    words += ["--zero-stage", str(layout.stage), "--deepspeed_config", str(config), "--save", str(save)]
    if "--num-workers" not in words:
        words += ["--num-workers", "0"]
    for split in ("train", "valid"):
        words += [f"--{split}-data-path", *blend(data, split)]
    words += ["--data-cache-path", f"{data}/cache", "--save-interval", str(SAVED)]
    return [*words, *(str(word) for word in more)]


def blend(data, split):
    """WEIGHT PREFIX pairs."""
    return [
        part for domain, share in jobs.DOMAINS.items() for part in (str(share), f"{data}/{domain}_{split}")
    ]
