"""The official recipe, from raw text to a report: JSON lines, the host's own tools/preprocess_data.py with --append-eod, a
byte-pair tokenizer, pretrain_gpt.py, and the page that the run leaves."""

import json
import os
import random
import re
import subprocess
import sys

import jobs
import matrix
from planned_jobs import Jobs

WORDS = {
    "english": "the sea wind over a grey stone house and under its roof of slate many birds sleep",
    "russian": "море ветер над серым камнем дома и под крышей спят птицы а за окном тихо идёт снег",
    "code": "def f(x): return x + 1 for i in range(n): print(i) if a == b: c = [0] * k",
}
MERGES = "#version: 0.2\nt h\nth e\nĠ the\nÐ ¾\n"


def tokenizer(folder):
    """Vocabulary and merges of a byte-pair tokenizer of the GPT-2 kind: all bytes, a few merges, the end of a text."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(len(hidden))]
    letters += [line.replace(" ", "") for line in MERGES.splitlines()[1:]] + ["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: n for n, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text(MERGES)
    return (
        f"--tokenizer-type GPT2BPETokenizer --vocab-file {folder}/vocab.json --merge-file {folder}/merges.txt"
    )


def prepared(tree, folder, flags):
    """Indexed data of every domain and split as the host's own tool makes them of raw text."""
    (folder / "nltk.py").write_text(  # the tool names its classes even where no sentence is split
        "class tokenize:\n    class punkt:\n        class PunktLanguageVars: pass\n"
    )
    surroundings = {**os.environ, "PYTHONPATH": str(folder)}
    for name, words in WORDS.items():
        for split, texts in (("train", 400), ("valid", 60)):
            rng, prefix = random.Random(f"{name} {split}"), folder / f"{name}_{split}"
            lines = [json.dumps({"text": " ".join(rng.choices(words.split(), k=40))}) for _ in range(texts)]
            prefix.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
            command = [
                sys.executable,
                "tools/preprocess_data.py",
                "--input",
                f"{prefix}.jsonl",
                "--append-eod",
            ]
            command += [
                "--output-prefix",
                str(prefix),
                "--dataset-impl",
                "mmap",
                "--workers",
                "1",
                *flags.split(),
            ]
            done = subprocess.run(
                command, cwd=tree, capture_output=True, text=True, timeout=300, env=surroundings
            )
            assert done.returncode == 0, done.stderr
            for end in ("bin", "idx"):
                os.rename(f"{prefix}_text_document.{end}", f"{prefix}.{end}")


def test_from_raw_text_to_a_report(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "zero1")
    here.data = tmp_path / "raw"
    here.data.mkdir()
    flags = tokenizer(here.data)
    prepared(here.trees[0], here.data, flags)
    words = {"--tokenizer-type NullTokenizer --vocab-size 256": flags}
    for mode in ("shadow", "act"):
        file = jobs.write_mixture(str(here.data), f"{mode}.yaml", mode=mode, iters=20, extra=matrix.EXTRA)
        here.add(mode, "--commute", file, words=words)
    here.add("stock", hooked=False, words=words)
    seen = here.run()
    assert matrix.same(seen["shadow"], seen["stock"])
    for mode in ("shadow", "act"):
        assert "OTHER SAMPLES" not in here.log(mode)
        events = [line["event"] for line in here.record(mode)]
        assert events.count("probe") == 2 and events[-1] == "end" and "skip" not in events
        page = (tmp_path / mode / "save/report.html").read_text()
        assert all(name in page for name in WORDS) and re.search(r"160 of 160", page)
    assert list(here.record("act")[-1]["served"].values()) == [96, 16, 48]
    losses = [float.fromhex(step["lm loss"]) for step in seen["act"][0]["losses"]]
    assert losses[-1] < losses[0]
