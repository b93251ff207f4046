"""Megatron-DeepSpeed itself with the plug-in, layout by layout, against itself without it."""

import os

import agreement
import layouts
import matrix
import numpy as np
import pytest
from planned_jobs import Jobs

REWRITES = "REWRITE_TABLES" in os.environ
PROBES = {"rampup": 5, "fp16": 3}  # every fourth of 22 or 20 steps; before the fourth all of fp16 overflow
CLAIMS = [name for name in matrix.COLUMNS if name not in ("layout", "ranks", "flags", "probes")]


@pytest.fixture(scope="module")
def table():
    """Rows of layouts as they come; a run of all of them rewrites matrix.csv, where it is wanted."""
    found = []
    yield found
    if REWRITES and len(found) == len(layouts.MATRIX):
        matrix.write(matrix.HERE / "matrix.csv", found)


@pytest.mark.parametrize("name", layouts.MATRIX)
def test_the_plug_in_watches_feeds_and_resumes(scratch, table, name):
    row = next(iter(matrix.rows(scratch, [name])))
    table.append(row)
    assert {claim: row[claim] for claim in CLAIMS} == dict.fromkeys(CLAIMS, True)
    assert row["probes"] == PROBES.get(name, 4)


def test_all_layouts_measure_the_same_criterion(scratch):
    rows = list(agreement.rows(scratch))
    if REWRITES:
        agreement.write(rows)
    assert not [row for row in rows if not row["within"]]


@pytest.mark.parametrize("layout", ["zero1", "pp2", "tp2"])
def test_a_step_off_interval_makes_no_collective_of_its_own(scratch, tmp_path, layout):
    """As many as the host alone, but for a log line's one, with which the control file is due before the next step."""
    here = Jobs(scratch, tmp_path, layout)
    short = ("--exit-interval", "10")
    here.add("stock", *short, hooked=False, counted=True)
    here.add("shadow", "--commute", here.mixture("shadow", 10), *short, counted=True)
    seen = here.run()
    for alone, watched in zip(seen["stock"], seen["shadow"], strict=True):
        without, own = (np.diff(rank["collectives"]) for rank in (alone, watched))
        assert without.min() > 0 and len(own) == 9
        assert (own - without).tolist() == [
            0,
            0,
            0,
            1,
            1,
            0,
            0,
            0,
            0,
        ]  # steps 2 to 10; the log line is of step 5
