#!/usr/bin/env bash
# What only a GPU can show, in one table and one JSON file:
#     bash tests/gpu.sh [--cpu] [--parts a,b] [--out FILE]
# With --cpu the same parts at tiny sizes, to see that they work. Environment as in tests/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=../launch/environment.sh
source launch/environment.sh

use_environment "$PWD"
install_extra "$PWD" demo tokenizers tensorboard
exec python tests/bench/gpu_kit.py "$@"
