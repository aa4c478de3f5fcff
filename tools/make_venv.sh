#!/bin/sh
# Makes the virtual environment named by the first argument with the first Python 3.11 or newer that works.
# Candidates are run, not only looked up: a version manager's shim can be on PATH and still not start.
set -eu

venv=$1
works='import sys, ensurepip, venv; raise SystemExit(not sys.version_info >= (3, 11))'

find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c "$works" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

if ! python=$(find_python); then
    cat >&2 <<'MESSAGE'
charkha needs Python 3.11 or newer with its venv module; tried: $PYTHON, python3.11, python3.12, python3.13, python3.
Ubuntu 22.04 (and WSL2 with it) ships Python 3.10. Three ways to get 3.11 beside it:
  deadsnakes   sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt-get install python3.11 python3.11-venv
  uv           uv python install 3.11            then: make quickstart PYTHON="$(uv python find 3.11)"
  conda        conda env create -f environment.yml    (its first lines say what comes next)
If Python 3.11 is there but its venv module is not: sudo apt-get install python3.11-venv
MESSAGE
    exit 1
fi

echo "Making $venv with $("$python" --version)"
"$python" -m venv --clear "$venv"
