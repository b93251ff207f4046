"""What the deepspeed launcher starts on a node: TREE/pretrain_gpt.py with its flags, TREE from the environment.

DIES="NODE STEP" lets every process of that node die at once before that step, as of a machine that loses power.
"""

import os
import runpy
import signal
import sys

import driver


def main(tree, dies):
    driver.preload(tree)
    from megatron import get_args, training

    step_of = training.train_step

    def train_step(*args):
        if dies == [os.environ["CROSS_RANK"], str(get_args().curr_iteration)]:
            os.killpg(0, signal.SIGKILL)
        return step_of(*args)

    training.train_step = train_step
    os.chdir(tree)
    sys.argv[0] = f"{tree}/pretrain_gpt.py"
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(os.environ["TREE"], os.environ.get("DIES", "").split())
