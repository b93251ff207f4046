"""What Megatron-DeepSpeed itself, untouched, does not do at this commit: grouped queries, checkpoints of experts."""

from planned_jobs import Jobs


def test_grouped_queries_end_the_host_in_its_first_forward_pass(scratch, tmp_path):
    """It cuts what the projection gives into three equal parts, which keys and values of fewer heads are not."""
    here = Jobs(scratch, tmp_path, "gqa")
    here.add("stock", "--exit-interval", "2", hooked=False)
    assert here.run()["stock"] == [None, None]
    assert "RuntimeError: shape '[32, 2, -1, 8]' is invalid for input of size" in here.log("stock")


def test_a_mixture_of_experts_trains_and_cannot_be_saved(scratch, tmp_path):
    """With deepspeed 0.19, whose _save_moe_checkpoint takes a method of the host's model for a dictionary."""
    here = Jobs(scratch, tmp_path, "experts-kept")
    here.add("stock", "--exit-interval", "2", hooked=False)
    here.run()
    log = here.log("stock")
    assert "iteration        2/" in log or "exiting program" not in log
    assert "_save_moe_checkpoint" in log and "TypeError: 'method' object is not iterable" in log
    assert not list((tmp_path / "stock/save").glob("latest"))
