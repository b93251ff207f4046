"""What people do with the official scripts: the page's own example, other models, no --save, --data-path."""

import json
import re
import shutil
from types import SimpleNamespace

import indexed_files
import matrix
import numpy as np
import pytest
from planned_jobs import Jobs

from megatron_commute.adapters.megatron_deepspeed import refusals
from megatron_commute.config import ConfigError, load, resolve
from megatron_commute.data import blend
from megatron_commute.settings.shares import Run

PAGE = matrix.HERE.parent.parent / "megatron_commute/adapters/megatron_deepspeed/README.md"
SMALL = """--num-layers 1 --hidden-size 16 --num-attention-heads 1 --max-position-embeddings 1024 --lr 1e-3
    --tokenizer-type NullTokenizer --vocab-size 256 --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --distributed-backend gloo --exit-interval 2"""


def forward_step_of(file):
    return eval(compile("lambda: None", file, "eval"))


def test_scripts_of_other_models_are_refused_with_what_is_supported():
    for name in ("pretrain_bert.py", "pretrain_t5.py"):
        with pytest.raises(ConfigError, match=f"--commute: {name} is not supported.*; use pretrain_gpt.py"):
            refusals.refuse_script(forward_step_of(f"/host/{name}"))
    refusals.refuse_script(forward_step_of("/host/pretrain_gpt.py"))
    refusals.refuse_script(forward_step_of("/host/pretrain_ours.py"))
    refusals.refuse_script(SimpleNamespace())


@pytest.mark.parametrize(
    ("workers", "micro_batch", "ranks", "lead"),
    [(0, 1, 1, 64), (2, 8, 2, 80), (2, 16, 1, 80), (2, 4, 2, 64), (3, 8, 2, 112), (4, 4, 2, 80)],
)
def test_the_default_lead_is_what_fits(tmp_path, workers, micro_batch, ranks, lead):
    """(2 workers + 1) micro-batches of every rank, rounded up to global batches of 16, 4 of them at least."""
    path = tmp_path / "mixture.yaml"
    path.write_text("domains:\n  en: {path: en, weight: 1}\nmode: fixed\nprobe: {samples: 8, splits: 2}\n")
    run = Run(8, 16, micro_batch, ranks, 100, 2 * workers)
    plan = resolve(load(str(path)), run, [5000])
    told = [warning for warning in plan.warnings if warning.startswith("lead: ")]
    assert plan.lead == lead >= (2 * workers + 1) * micro_batch * ranks
    assert told == ([] if lead == 64 else [told[0]]) and all(f"lead: {lead} samples" in text for text in told)


def test_a_message_names_the_flag_that_was_written(tmp_path):
    with pytest.raises(ConfigError, match=r"^--data-path: 0.5 a 0.5: write WEIGHT PREFIX"):
        blend.check(None, None, ["0.5", "a", "0.5"], "--data-path")


def example(folder):
    """The words of the page's command for a run that acts, on data and a model that fit two CPU ranks."""
    text = PAGE.read_text()
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for name in ("english", "russian", "code"):
        for split, sequences in (("train", 1400), ("valid", 300)):
            indexed_files.write(folder / f"data/{name}_{split}", rng.integers(256, size=sequences * 1024 + 1))
    (folder / "mixture.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}
    (folder / "zero1.json").write_text(json.dumps(config))
    words = re.search(r" pretrain_gpt\.py (\.\.\.model.*?--commute mixture\.yaml)", text, re.DOTALL)[1]
    words = words.replace("...model...", " ".join(SMALL.split())).replace("\\\n", " ").split()
    ours = ("data/", "RUN", "zero1.json", "mixture.yaml")
    return [str(folder / word) if word.startswith(ours) else word for word in words]


def test_the_page_s_example_of_acting_runs(scratch, tmp_path):
    _, tree = matrix.trees(scratch)
    job = {"script": f"{tree}/pretrain_gpt.py", "argv": example(tmp_path), "ranks": 2}
    job["out"] = str(tmp_path / "out")
    matrix.run(tmp_path, {"example": job})
    log = (tmp_path / "out/rank0.log").read_text()
    assert json.loads((tmp_path / "out/codes.json").read_text()) == [0, 0], log[-3000:]
    start, *_, end = matrix.record(job)
    assert start["mode"] == "act" and start["lead"] == 80 and end["sample"] == 32
    assert "note: lead: 80 samples, over the usual 4 global batches" in log


def test_other_scripts_no_save_and_data_path_on_the_host(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "zero1")
    file = tmp_path / "mine.yaml"
    shutil.copy(here.data / "fixed.yaml", file)
    for name in ("bert", "t5"):
        here.add(name, "--commute", file)
        here.planned[name]["script"] = here.planned[name]["script"].replace("_gpt", f"_{name}")
    short = {"--train-iters 20": "--train-iters 20 --exit-interval 2"}
    here.add("unsaved", "--commute", file, words={**short, f"--save {tmp_path}/unsaved/save": ""})
    here.add("broken", "--commute", here.data / "shadow.yaml", words={"--train-data-path 0.6": "--data-path"})
    here.run()
    for name in ("bert", "t5"):
        assert f"error: --commute: pretrain_{name}.py is not supported" in here.log(name), here.log(name)
        assert (tmp_path / name / "codes.json").read_text() == "[2, 2]"
    folder = tmp_path / "mine.yaml.run"
    assert f"no --save: the decision log and its report will lie in {folder}" in here.log("unsaved")
    assert {path.name for path in folder.iterdir()} >= {"commute.jsonl", "report.html"}
    assert "no checkpoint was kept: write --save FOLDER" in here.log("unsaved")
    assert not list(here.trees[1].glob("commute.jsonl*"))
    assert "error: --data-path: " in here.log("broken")
