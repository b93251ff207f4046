"""Law flow in mode act, killed at random with other numbers of ranks in between: budgets and stream stay those of the
record. tests/bench/kills.py does the same fifty times."""

import killed_runs


def test_kills_lose_and_repeat_nothing_and_the_change_of_target_holds(tmp_path):
    killed_runs.prepare(tmp_path)
    undisturbed, expected = killed_runs.whole(tmp_path, "undisturbed", 0, seed=1)
    killed, brought = killed_runs.whole(tmp_path, "killed", 5, seed=1)
    assert undisturbed["kills"] == 0 and killed["kills"] == 5
    for row in (undisturbed, killed):
        assert row["budgets_exact"] and row["loader_as_drawn"] and row["stream_as_recorded"], row
    assert brought == expected and len(brought) == killed_runs.STEPS * killed_runs.BATCH
