"""Mutated checkpoints: read as their files say, or refused in one line."""

import mutation_readers_checkpoints as readers
import mutations
import pytest


@pytest.mark.parametrize("reader", readers.READERS, ids=lambda reader: reader.name)
def test_mutated_checkpoints_are_read_rightly_or_refused(reader, tmp_path):
    known = reader.prepare(tmp_path)
    assert reader.attempt(tmp_path, known) == "same", "what is mutated is whole"
    found = mutations.attack(reader)
    assert not found.faults, found.told()
    assert found.counts["refused"] > 100 and found.counts["same"] > 100, found.counts
