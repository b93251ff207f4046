"""Megatron-DeepSpeed itself with the plug-in, layout by layout, against itself without it."""

import agreement
import layouts
import matrix
import pytest

CLAIMS = [name for name in matrix.COLUMNS if name not in ("layout", "ranks", "flags", "probes")]


@pytest.mark.parametrize("name", layouts.MATRIX)
def test_the_plug_in_watches_feeds_and_resumes(scratch, name):
    row = next(iter(matrix.rows(scratch, [name])))
    assert {claim: row[claim] for claim in CLAIMS} == dict.fromkeys(CLAIMS, True)
    assert row["probes"] == 4


def test_all_layouts_measure_the_same_criterion(scratch):
    wrong = [row for row in agreement.rows(scratch) if not row["within"]]
    assert not wrong
