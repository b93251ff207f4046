"""Mutated indices and tokenizer notes: read as an independent reader reads them, or refused in one line."""

import mutation_readers_data as readers
import mutations
import pytest


@pytest.mark.parametrize("reader", readers.READERS, ids=lambda reader: reader.name)
def test_mutated_files_are_read_rightly_or_refused(reader):
    found = mutations.attack(reader)
    assert not found.faults, found.told()
    assert found.counts["refused"] > 100 and found.counts["same"] > 100, found.counts
