"""Thousands of seeded mutations of each text file: read as an independent reader reads it, or refused in one line."""

import mutation_readers_text
import mutations
import pytest


@pytest.mark.parametrize("reader", mutation_readers_text.READERS, ids=lambda reader: reader.name)
def test_a_mutated_file_is_read_rightly_or_refused_in_one_line(reader):
    """MUTATIONS=20000 asks for more. Every mutated file that is still valid is among those read."""
    found = mutations.attack(reader)
    assert not found.faults, found.told()
    assert sum(found.counts.values()) == mutations.COUNT and found.counts["same"] > mutations.COUNT // 50
