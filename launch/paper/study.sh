#!/usr/bin/env bash
# The study `paper` of `megatron-commute bilingual` at the size of Rukhovich et al. (arXiv 2501.15556): GPT-2 small, batch 512,
# sequence 1024, 28000 steps. Flags after OUT_DIR are those of the command and win over the ones written here.
#
#     bash launch/paper/study.sh paper OUT_DIR --data DATA                 # sections 4.2 and 4.3, on the GPUs of this machine
#     LAUNCH="sbatch --nodes 2 launch/slurm.sbatch" bash launch/paper/study.sh paper ...      # several nodes under SLURM
#     LAUNCH="bash launch/multi_node.sh --hostfile hosts --" bash launch/paper/study.sh ...   # or over ssh
#     LAUNCH=python bash launch/paper/study.sh paper OUT_DIR --data DATA --estimate  # what it would cost, nothing is trained
#     LAUNCH=echo bash launch/paper/study.sh paper OUT_DIR --data DATA               # the command, nothing is started
#
# Started again with the same OUT_DIR a study goes on with the cells that it lacks.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../environment.sh
source "$root/launch/environment.sh"

name=${1:-} out=${2:-}
[[ $name == paper ]] || fail "write the study first, paper, then the folder for it"
[[ $out && $out != -* ]] || fail "write the folder for the study: bash launch/paper/study.sh $name OUT_DIR --data DATA"
shift 2

# appendix C of the paper; vocabulary, warm-up, precision and the sequences that are read are ours
flags=(
    --study "$name" --set "domains=english,russian" --set others=
    --set layers=12 --set hidden=768 --set heads=12 --set sequence=1024 --set vocabulary=50304
    --set batch=512 --set micro=8 --set dtype=bfloat16
    --set optimizer=adam --set lr=1.5e-4 --set warmup=280 --set held=512 --set probe=1200
    # tail and paired seeds are ours: seeds=1 and tail=0 are the paper's
    --set "starts=2000,8000,14000,20000" --set window=4000 --set tail=4000 --set seeds=2
    --set "checkpoints=4000,6000,10000,12000,16000,18000,22000,24000"
)

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc-per-node $((gpus > 0 ? gpus : 1))}"
exec "${launch[@]}" "$root/launch/paper/bilingual.py" "$out" "${flags[@]}" "$@"
