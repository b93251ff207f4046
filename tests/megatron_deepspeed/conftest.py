"""Runs of Megatron-DeepSpeed itself; MEGATRON_DEEPSPEED names a checkout of the pinned commit, which is copied."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and "scratch" in item.fixturenames:
            item.add_marker(pytest.mark.megatron_deepspeed)
            if "MEGATRON_DEEPSPEED" not in os.environ:
                item.add_marker(
                    pytest.mark.skip(reason="set MEGATRON_DEEPSPEED to a checkout of Megatron-DeepSpeed")
                )


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A folder that keeps patched trees and data for all tests of a session."""
    return tmp_path_factory.mktemp("megatron_deepspeed")
