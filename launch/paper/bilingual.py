"""`megatron-commute bilingual` as a script, for launchers that start a file. deepspeed adds
--local_rank to its flags, which the environment says as well.
"""

import sys

from megatron_commute.cli.main import main

main(["bilingual", *(word for word in sys.argv[1:] if not word.startswith("--local_rank="))])
