#!/usr/bin/env bash
# From a fresh machine to a GPT trained under law flow for its rarest language, on two CPU cores or up to two GPUs:
#
#     bash launch/quickstart.sh                          # english, russian and code from packages
#     bash launch/quickstart.sh --compare                # and the constant mixture; final losses side by side
#     bash launch/quickstart.sh --text a=a.txt --text b=folder
#
# --text NAME=PATH takes your own UTF-8 text instead: a folder of files, or a file whose documents are parted
# by blank lines; two domains or more, about 1.2 MB each, the last is the rarest and the target. Run it again (with the same --text): it resumes where
# it stopped; a finished run shows its report. Everything lands in quickstart/; remove it to start afresh.
#
# Where no virtual environment is active it makes .venv in the repository. On a machine without a GPU, install
# PyTorch's CPU build into an environment of your own first and activate it: that saves gigabytes.
#
# Environment (defaults in brackets):
#   QUICKSTART_DIR    folder of data, mixture file and run [quickstart/ in the repository]
#   QUICKSTART_ITERS  training steps of 16 sequences [500]; a change needs a new folder
#   QUICKSTART_DECAY  learning rate after the warm-up, cosine, linear, constant or WSD (decay in the last fifth)
#                     [cosine]; a change needs a new folder
#   QUICKSTART_SEED   of weights and order of samples [1234]; a change needs a new folder
#   QUICKSTART_RANKS  processes, 1, 2 or 4, one GPU each where there are GPUs [2; 1 on a machine with one GPU]
#   PYTHON            interpreter that makes .venv, 3.10 or newer [python3]
#   OMP_NUM_THREADS   threads of each rank [1]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${QUICKSTART_DIR:-$root/quickstart}
iters=${QUICKSTART_ITERS:-500}
decay=${QUICKSTART_DECAY:-cosine}
seed=${QUICKSTART_SEED:-1234}
batch=16

# shellcheck source=environment.sh
source "$root/launch/environment.sh"

text=() compare=
while (($#)); do
    case $1 in
        --text) (($# > 1)) || fail "--text: write --text NAME=PATH" ; text+=(--text "$2") ; shift 2 ;;
        --text=*) text+=(--text "${1#--text=}") ; shift ;;
        --compare) compare=yes ; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" ; exit 0 ;;
        *) fail "$1: unknown; only --text NAME=PATH and --compare are taken, see --help" ;;
    esac
done
[[ $iters =~ ^[1-9][0-9]*$ ]] || fail "QUICKSTART_ITERS=$iters: write a positive number of training steps"
[[ $decay =~ ^(cosine|linear|constant|WSD)$ ]] ||
    fail "QUICKSTART_DECAY=$decay: write cosine, linear, constant or WSD"
[[ $seed =~ ^[0-9]+$ ]] || fail "QUICKSTART_SEED=$seed: write a whole number"
[[ ${QUICKSTART_RANKS:-2} =~ ^[124]$ ]] || fail "QUICKSTART_RANKS=$QUICKSTART_RANKS: write 1, 2 or 4"
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

# DeepSpeed compiles its CPU operator inside the first start of a job, which looks like a hang; so do it here.
build_communication() {
    local cache=${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/torch_extensions}
    if [[ -n $(find "$cache" -path '*/deepspeed_shm_comm/*.so' 2>/dev/null) ]]; then
        return
    fi
    if ! command -v "${CXX:-c++}" >/dev/null; then
        say "No C++ compiler (${CXX:-c++}): the ranks talk through gloo alone, a little slower"
        return
    fi
    say "Building DeepSpeed's CPU communication op, once: about 35 seconds"
    local build='from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as op; op().load(verbose=False)'
    python -W ignore -c "$build" >"$dir/build.log" 2>&1 ||
        fail "the build failed, see $dir/build.log; it needs a C++ compiler and ninja"
}

use_environment "$root"
install_extra "$root" demo tokenizers tensorboard

devices=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
ranks=${QUICKSTART_RANKS:-$((devices == 1 ? 1 : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if ((devices == 0)); then
    export DS_ACCELERATOR=cpu
    build_communication
fi

say "Preparing text in $dir/data"
python "$root/launch/prepare_data.py" --out "$dir/data" "${text[@]+"${text[@]}"}"
fifth=$(((iters + 4) / 5))
rate=(--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters $((iters / 10)) --lr-decay-style "$decay")
if [[ $decay == WSD ]]; then
    rate+=(--lr-wsd-decay-iters "$fifth" --lr-wsd-decay-style linear)
fi

# train LAW RUN MIXTURE: a run under one law, in its folder, with its mixture file; goes on where it stopped.
train() {
    local law=$1 run=$2 mixture=$3 table train=() valid=() port
    table=$(python "$root/launch/quickstart_mixture.py" --law "$law" --seed "$seed" \
        --data "$dir/data" --out "$mixture" --train-iters "$iters" --global-batch-size "$batch")
    while IFS=$'\t' read -r name weight prefix; do
        train+=("$weight" "$prefix")
        valid+=("$weight" "${prefix%_train}_valid")
    done <<<"$table"
    if [[ -e $run/latest ]]; then
        say "Going on from $run ($(<"$run/latest"))"
    else
        say "Training $iters steps under law $law on $ranks ranks (500 take about 6 minutes on 2 CPU cores)"
    fi
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed --log_level error --num_gpus "$ranks" --master_addr 127.0.0.1 --master_port "$port" \
        "$root/launch/pretrain_gpt.py" \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 \
        --vocab-size 4096 --hidden-dropout 0 --attention-dropout 0 --seed "$seed" \
        --micro-batch-size 4 --global-batch-size "$batch" --train-iters "$iters" --num-workers 1 \
        "${rate[@]}" --weight-decay 0.01 \
        --train-data-path "${train[@]}" --valid-data-path "${valid[@]}" \
        --log-interval $(((iters + 24) / 25)) --eval-interval "$fifth" --eval-iters 8 \
        --save "$run" --load "$run" --save-interval "$fifth" --tensorboard-dir "$run/tensorboard" \
        --commute "$mixture"
}

train flow "$dir/run" "$dir/mixture.yaml"
if [[ $compare ]]; then
    train hold "$dir/constant" "$dir/constant.yaml"
    say "Final validation losses (nats per token), equal data and compute"
    python "$root/launch/quickstart_compare.py" "$dir/run" "$dir/constant"
fi
