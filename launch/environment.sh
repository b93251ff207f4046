# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment, what is installed in it, and messages.

say() { printf '\n== %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# use_environment ROOT: the active virtual environment, else ROOT/.venv, made where it is absent or half made.
use_environment() {
    if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
        return
    fi
    local python=${PYTHON:-python3}
    if [[ ! -e $1/.venv/complete ]]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$python is older than 3.10 or absent; name another one with PYTHON"
        say "Making a virtual environment in .venv"
        "$python" -m venv --clear "$1/.venv" ||
            fail "python -m venv failed: install python3-venv, or activate an environment of your own"
        touch "$1/.venv/complete"
    fi
    # shellcheck disable=SC1091
    source "$1/.venv/bin/activate"
}

# install_extra ROOT EXTRA PACKAGE...: pip install -e ROOT[EXTRA] unless ROOT and the packages are there.
install_extra() {
    local root=$1 extra=$2
    shift 2
    if ! python -I - "$root" megatron-commute "$@" 2>/dev/null <<'PY'
import importlib.metadata as metadata, json, pathlib, sys, urllib.parse
for name in sys.argv[2:]:
    metadata.version(name)
source = json.loads(metadata.distribution("megatron-commute").read_text("direct_url.json"))["url"]
path = urllib.parse.unquote(urllib.parse.urlparse(source).path)
sys.exit(pathlib.Path(path).resolve() != pathlib.Path(sys.argv[1]).resolve())
PY
    then
        say "Installing megatron_commute[$extra] with PyTorch, DeepSpeed and megatron-core: minutes, once"
        python -m pip install --quiet -e "${root}[$extra]" || fail "pip could not install it, see above"
    fi
}
