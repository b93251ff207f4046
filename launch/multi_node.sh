#!/usr/bin/env bash
# A training job on several nodes with the deepspeed launcher:
#
#     bash launch/multi_node.sh --hostfile hosts -- launch/pretrain_gpt.py FLAGS             # from one node, over ssh (pdsh)
#     bash launch/multi_node.sh --hostfile hosts --node-rank N --master-addr node-0 -- ...   # once on every node, without ssh
#     bash launch/multi_node.sh --hostfile hosts -- /path/to/Megatron-DeepSpeed/pretrain_gpt.py FLAGS
#
# Everything after -- is the training script and its flags; the folder of every path must be the same on all nodes, and
# --save and --load must lie on a file system that all of them share. Started again after a failure it resumes from --load.
#
#     --hostfile FILE      one line "NAME slots=RANKS" for each node, see hostfile.example (required)
#     --node-rank N        this node's line in the hostfile, from 0: start here only, without ssh
#     --master-addr HOST   address of the first node [the hostfile's first name, without a user]
#     --master-port PORT   a free port of the first node [29500]
#     --ssh-port PORT      port of sshd on the nodes
#     --env NAME           also carry this variable to the nodes; may be given again
#     --dry-run            print the command and the variables, start nothing
#
# Over ssh these variables travel to the nodes: what DeepSpeed carries itself (PYTHON*, UCX*), NCCL_*, GLOO_*, DS_*, TORCH_*,
# CUDA_DEVICE_MAX_CONNECTIONS, CUDA_HOME, OMP_NUM_THREADS, MEGATRON_DEEPSPEED, PATH, LD_LIBRARY_PATH, TMPDIR and
# XDG_CACHE_HOME, then the lines of ~/.deepspeed_env and ./.deepspeed_env, which win. Without ssh every node has its own environment. CPU ranks need
# DS_ACCELERATOR=cpu, and GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs) where a node has several networks.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$root/launch/environment.sh"

identifier='^[A-Za-z_][A-Za-z0-9_]*$'
hostfile='' node='' address='' port=29500 ssh_port='' dry='' names=()
value() { [[ -n ${2:-} && $2 != --* ]] || fail "$1: write a value after it, see --help"; }
while (($#)); do
    case $1 in
        --hostfile) value "$@"; hostfile=$2; shift 2 ;;
        --node-rank) value "$@"; node=$2; shift 2 ;;
        --master-addr) value "$@"; address=$2; shift 2 ;;
        --master-port) value "$@"; port=$2; shift 2 ;;
        --ssh-port) value "$@"; ssh_port=$2; shift 2 ;;
        --env)
            value "$@"
            [[ $2 =~ $identifier ]] || fail "--env $2: is no name of a variable; write letters, digits and _ alone"
            names+=("$2")
            shift 2
            ;;
        --dry-run) dry=yes; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --) shift; break ;;
        *) fail "$1: unknown here; flags of the training script go after --, see --help" ;;
    esac
done

[[ -n $hostfile ]] || fail "--hostfile: missing; write one like $root/launch/hostfile.example"
[[ -e $hostfile ]] || fail "--hostfile $hostfile: no such file; write one like $root/launch/hostfile.example"
(($#)) || fail "no training script: write -- launch/pretrain_gpt.py and its flags at the end"
[[ -f $1 ]] || fail "$1: no such training script; name it with its path"
[[ $port =~ ^[1-9][0-9]{0,4}$ && $port -lt 65536 ]] || fail "--master-port $port: write a port between 1 and 65535"

hosts=() ranks=0
nodes=$("${PYTHON:-python3}" "$root/launch/hostfile.py" "$hostfile") || exit 2
while read -r host slots; do
    hosts+=("$host")
    ranks=$((ranks + slots))
done <<<"$nodes"

command -v deepspeed >/dev/null || fail "no deepspeed command: activate the environment that has it, on every node"
first=${hosts[0]##*@} # the rendezvous wants an address, ssh alone a user
address=${address:-$first}
# DeepSpeed reads plain lines, whatever encoding and comments the file has
variables='' plain=$(mktemp)
trap 'rm -f "$plain" ${variables:+"$variables"}' EXIT
while read -r host slots; do printf '%s slots=%s\n' "$host" "$slots"; done <<<"$nodes" >"$plain"
command=(deepspeed --hostfile "$plain" --master_addr "$address" --master_port "$port")

# DeepSpeed reads one file of variables for the nodes; what is set here comes first, the user's own files win.
carry() {
    local name line
    local wanted='^(NCCL_|GLOO_|DS_|TORCH_)|^(CUDA_DEVICE_MAX_CONNECTIONS|CUDA_HOME|OMP_NUM_THREADS|MEGATRON_DEEPSPEED|PATH|LD_LIBRARY_PATH|TMPDIR|XDG_CACHE_HOME)$'
    while IFS= read -r name; do
        [[ $name =~ $wanted && $name != DS_ENV_FILE ]] && names+=("$name")
    done < <(compgen -e)
    for name in "${names[@]+"${names[@]}"}"; do
        [[ -n ${!name+set} ]] || fail "--env $name: not set here; export it first"
        # shellcheck disable=SC2016  # the characters themselves, which the remote shell would interpret
        [[ ${!name} != *[\"\$\`\\]* && ${!name} != *$'\n'* ]] ||
            fail "$name: its value has a quote, \$, \` or a line feed, which does not survive ssh; unset it or change it"
        printf '%s=%s\n' "$name" "${!name}"
    done
    for name in "$HOME/.deepspeed_env" ./.deepspeed_env; do
        [[ -f $name ]] || continue
        while IFS= read -r line || [[ -n $line ]]; do
            line=${line#$'\xef\xbb\xbf'} line=${line%$'\r'}
            [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
            [[ $line == *=* && ${line%%=*} =~ ^[[:space:]]*(export[[:space:]]+)?[A-Za-z_][A-Za-z0-9_]*$ ]] ||
                fail "$name: '$line': write NAME=VALUE"
            printf '%s\n' "$line"
        done <"$name"
    done
}

if [[ -n $node ]]; then
    [[ $node =~ ^(0|[1-9][0-9]{0,8})$ && $node -lt ${#hosts[@]} ]] ||
        fail "--node-rank $node: $hostfile has ${#hosts[@]} nodes; write 0 to $((${#hosts[@]} - 1))"
    command+=(--no_ssh --node_rank "$node")
    say "node $node of ${#hosts[@]}, $ranks ranks in all; rendezvous at $address:$port"
else
    variables=$(mktemp)
    carry >"$variables"
    export DS_ENV_FILE=$variables
    if [[ -z $dry ]]; then
        command -v pdsh >/dev/null || fail "pdsh is not installed: install it, or start every node with --node-rank N"
    fi
    # --force_multi: a single node of the hostfile need not be this one
    command+=(--launcher pdsh --force_multi)
    [[ -z $ssh_port ]] || command+=(--ssh_port "$ssh_port")
    say "${#hosts[@]} nodes over ssh, $ranks ranks in all; rendezvous at $address:$port"
fi
command+=("$@")

if [[ -n $dry ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    [[ -z $variables ]] || cat "$variables"
    exit 0
fi
"${command[@]}" &
launcher=$!
# the launcher itself dies of a signal without a word to its ranks; its child passes it on to them
trap 'pkill -TERM -P "$launcher" || kill -TERM "$launcher"' INT TERM
status=0
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" && status=0 || status=$?
done
((status == 0)) || echo "error: the job ended here with status $status; the first error above is the cause. Started again on all" \
    "nodes with the same command, it resumes from --load" >&2
exit "$status"
