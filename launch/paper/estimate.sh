#!/usr/bin/env bash
# Writes launch/paper/estimate.csv, what the studies of study.sh would cost: bash launch/paper/estimate.sh [--tflops N]
# Counted from the job lists; hours ASSUME the sustained speed of a GPU that --tflops gives. Nothing is trained.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# count NAME STUDY FLAGS: rows of one study under that name
count() {
    local name=$1 study=$2
    shift 2
    LAUNCH=python bash "$here/study.sh" "$study" "$work" --data none --estimate "$@" >/dev/null
    [[ -e lines ]] || sed 's/^/variant,/;q' "$study/estimate.csv" >lines
    sed "1d;s/^/$name,/" "$study/estimate.csv" >>lines
}
count "as printed" paper --set seeds=1 --set tail=0 "$@"
count "two seeds and a tail" paper "$@"
mv lines "$here/estimate.csv"
cat "$here/estimate.csv"
