#!/usr/bin/env bash
# Lint, format and tests, from any folder: bash tests/run.sh [pytest arguments]
# Where no virtual environment is active it makes .venv in the repository; the extra [dev] goes into either.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=../launch/environment.sh
source launch/environment.sh

use_environment "$PWD"
install_extra "$PWD" dev ruff pytest hypothesis tokenizers curvlinops-for-pytorch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# DeepSpeed takes a machine with nvcc and no GPU for a GPU machine unless told.
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || export DS_ACCELERATOR=cpu

ruff check .
ruff format --check .
# -rs: every skipped test with its reason.
exec python -m pytest -rs "$@"
