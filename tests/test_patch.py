"""Our diffs on a tree of Megatron-DeepSpeed: on and off byte for byte, moved lines, and trees that are refused untouched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_commute import patch as diffs
from megatron_commute.cli.main import main

REAL = os.environ.get("MEGATRON_DEEPSPEED")


def synthetic(root, ending="\n", shift=0):
    """A tree that has nothing of Megatron-DeepSpeed but the lines that our diffs need, `shift` lines further down."""
    texts = {}
    for name in diffs.NAMES:
        for file, hunks in diffs.changes(name).items():
            lines = texts.setdefault(file, [])
            for change in hunks:
                at = change.line - 1 + shift
                lines += [f"# {file} {i}" for i in range(len(lines), at)]
                lines[at:] = list(change.before)
            lines.append("# the end")
    texts["pretrain_gpt.py"].append("    pretrain()")
    texts["megatron/training.py"].append("engine = deepspeed.initialize()")
    for file, lines in texts.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            "".join(line + ending for line in lines).encode() + b"# caf\xe9\x0c no line feed at the end"
        )
    return root


@pytest.fixture
def tree(tmp_path):
    return synthetic(tmp_path / "a tree with spaces")


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(root, do="apply", names=diffs.NAMES):
    """The message of a refusal that left every byte as it was."""
    before = content(root)
    with pytest.raises(diffs.PatchError) as told:
        diffs.patch(root, do, names)
    assert content(root) == before
    return str(told.value)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_on_once_and_off_again_byte_for_byte(tmp_path, ending):
    root = synthetic(tmp_path, ending)
    before = content(root)
    rows = diffs.patch(root)
    assert len(rows) == 8 and {row["did"] for row in rows} == {"applied"}
    after = content(root)
    for script in ("pretrain_gpt.py", "pretrain_bert.py", "pretrain_t5.py"):
        hook = [line for line in after[script].splitlines() if b"megatron_commute" in line]
        assert hook == [b"    from megatron_commute.adapters.megatron_deepspeed import pretrain"]
    assert after["megatron/model/transformer.py"].count(b".reshape(") == 3
    for text in after.values():
        assert text.count(b"\r\n") == (text.count(b"\n") if ending == "\r\n" else 0)
    assert {row["did"] for row in diffs.patch(root)} == {None} and content(root) == after
    assert {row["did"] for row in diffs.patch(root, "revert")} == {"reverted"}
    assert content(root) == before
    assert {row["state"] for row in diffs.patch(root, "revert")} == {"absent"}


@pytest.mark.parametrize(
    "tool", [["git", "apply", "--unidiff-zero"], ["patch", "-p1", "-i"]], ids=lambda t: t[0]
)
def test_other_tools_read_the_diffs_alike(tmp_path, tool):
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    ours, theirs = synthetic(tmp_path / "ours"), synthetic(tmp_path / "theirs")
    diffs.patch(ours)
    for name in diffs.NAMES:
        command = [*tool, str(diffs.folder() / f"{name}.patch")]
        outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        subprocess.run(command, cwd=theirs, env=outside, check=True, capture_output=True)
    assert content(ours) == content(theirs)


def test_a_newer_tree_with_moved_lines_is_patched_and_the_new_lines_are_told(tmp_path):
    root = synthetic(tmp_path, shift=7)
    rows = diffs.patch(root)
    assert {row["did"] for row in rows} == {"applied"}
    assert [row["line"] - row["moved_from"] for row in rows] == [7] * 8
    assert "pretrain_gpt.py:365 (line 358 of 4efb479d): applied now" in "\n".join(diffs.sentences(rows))


def test_a_line_that_is_gone_is_named_and_the_other_diff_still_goes_on(tree):
    """One diff at a time; modes of files are kept and links followed."""
    file, script = tree / "megatron/model/transformer.py", tree / "pretrain_gpt.py"
    file.write_bytes(file.read_bytes().replace(b"key_layer = key_layer.view(", b"key_layer = reshape("))
    message = refused(tree)
    assert "transformer.py: line 304" in message and "--only" in message
    kept = Path(shutil.move(script, tree.parent / "elsewhere.py"))
    kept.chmod(0o750)
    script.symlink_to(kept)
    assert {(row["patch"], row["did"]) for row in diffs.patch(tree, names=["hook"])} == {("hook", "applied")}
    assert script.is_symlink() and b"megatron_commute" in kept.read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o750


def test_half_patched_trees_are_refused(tree):
    file = tree / "megatron/model/transformer.py"
    file.write_bytes(file.read_bytes().replace(b"value_layer.view(", b"value_layer.reshape("))
    for do in ("apply", "revert", "check"):
        assert "in part only (changed: megatron/model/transformer.py:352;" in refused(tree, do)


def test_the_hook_of_an_older_version_is_completed_and_scripts_may_be_missing(tree):
    bare = {name: (tree / name).read_bytes() for name in ("pretrain_bert.py", "pretrain_t5.py")}
    diffs.patch(tree, names=["hook"])
    (tree / "pretrain_bert.py").write_bytes(bare["pretrain_bert.py"])
    (tree / "pretrain_t5.py").unlink()
    rows = diffs.patch(tree, names=["hook"])
    assert [(row["file"], row["did"]) for row in rows] == [
        ("pretrain_gpt.py", None), ("pretrain_bert.py", "applied")
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["first", "twice"])
def test_a_hook_put_in_by_hand_elsewhere_is_refused(tree, place):
    file = tree / "pretrain_gpt.py"
    line = "    from megatron_commute.adapters.megatron_deepspeed import pretrain\n"
    if place == "twice":
        diffs.patch(tree)
        file.write_bytes(file.read_bytes() + b"\n" + line.encode())
    else:
        file.write_bytes(line.encode() + file.read_bytes())
    assert "patched by hand?" in refused(tree)


def test_two_possible_anchors_are_refused_unless_one_stands_where_it_stood(tmp_path):
    moved, still = synthetic(tmp_path / "moved", shift=3), synthetic(tmp_path / "still")
    for root in (moved, still):
        file = root / "pretrain_gpt.py"
        file.write_bytes(file.read_bytes() + b'\nif __name__ == "__main__":\n    pretrain()\n')
    assert "cannot tell which of the lines 361, " in refused(moved)
    assert diffs.patch(still)[0]["line"] == 358


def test_hunks_that_add_or_take_lines_do_not_move_each_other(tmp_path, monkeypatch):
    root = synthetic(tmp_path / "tree")
    file = root / "pretrain_gpt.py"
    file.write_text("one\ntwo\nthree\nfour\npretrain()\n")
    text = "--- a/pretrain_gpt.py\n+++ b/pretrain_gpt.py\n@@ -1 +1,3 @@\n-one\n+1\n+1.3\n+1.6\n"
    text += "@@ -2,0 +5 @@ two\n+2.5\n@@ -3,2 +6 @@\n-three\n-four\n+3 and 4\n"
    (tmp_path / "hook.patch").write_text(text)
    monkeypatch.setattr(diffs, "folder", lambda: tmp_path)
    diffs.patch(root, names=["hook"])
    assert file.read_text() == "1\n1.3\n1.6\ntwo\n2.5\n3 and 4\npretrain()\n"
    diffs.patch(root, "revert", names=["hook"])
    assert file.read_text() == "one\ntwo\nthree\nfour\npretrain()\n"


def test_other_folders_are_refused(tmp_path, tree):
    assert "not Megatron-DeepSpeed" in refused(tmp_path / "nowhere")
    assert "not Megatron-DeepSpeed" in refused(tree / "megatron")
    (tree / "megatron/training.py").write_text("import torch\n")  # another Megatron
    assert "'deepspeed.initialize('" in refused(tree)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda file: file.unlink(), "tools/preprocess_data.py is missing"),
        (lambda file: file.chmod(0o444), "read-only; make the tree writable"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_the_first_is(tree, harm, told):
    harm(tree / "tools/preprocess_data.py")
    assert told in refused(tree)


def test_a_disk_that_fails_half_way_leaves_everything_as_it_was(tree, monkeypatch):
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(diffs.os, "replace", failing)
    assert "nothing was changed: no space left" in refused(tree)
    assert len(calls) == 5  # the third fails, two are put back


def test_the_command(tree):
    def call(*words):
        done = CliRunner().invoke(main, ["patch", str(tree), *words])
        return done.exit_code, done.output

    assert call("--check")[0] == 1
    status, text = call()
    assert status == 0 and text.count("applied now") == 8
    status, text = call("--check", "--json")
    assert status == 0 and {row["state"] for row in json.loads(text)} == {"applied"}
    status, text = call("--revert", "--only", "hook")
    assert status == 0 and text.startswith("hook: pretrain_gpt.py:358: taken off now\n")
    (tree / "pretrain_gpt.py").unlink()
    status, text = call()
    assert status == 2 and text.startswith("error: ") and "not Megatron-DeepSpeed" in text


@pytest.mark.megatron_deepspeed
@pytest.mark.skipif(REAL is None, reason="MEGATRON_DEEPSPEED names no checkout of Megatron-DeepSpeed")
def test_on_the_real_tree(tmp_path):
    root = tmp_path / "checkout"
    for file in {file for name in diffs.NAMES for file in diffs.changes(name)}:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(REAL) / file, root / file)
    before = content(root)
    rows = diffs.patch(root)
    assert {(row["did"], row["moved_from"]) for row in rows} == {("applied", None)}
    for file in content(root):
        subprocess.run([sys.executable, "-m", "py_compile", str(root / file)], check=True)
    shutil.rmtree(root / "__pycache__")
    for cache in root.rglob("__pycache__"):
        shutil.rmtree(cache)
    diffs.patch(root, "revert")
    assert content(root) == before
