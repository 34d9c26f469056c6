#!/usr/bin/env bash
# Make .venv in the checkout and install the project into it, with the exact versions of constraints.txt.
#
#   launch/setup.sh                           # does nothing (quickly) when all is in place
#   BASE_PYTHON=python3.12 launch/setup.sh    # another Python than python3
#
# Safe to interrupt and to run twice at once: the stamp is written last, and a .venv without one is made anew.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.pretrain-setup       # marks the folder as ours; its text says what was installed
PATH=${PATH//"$venv/bin:"/}       # inside an activated .venv, python3 must still mean the one it was made from
python=${BASE_PYTHON:-python3}

say() { printf 'set-up: %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$@" >&2; exit 1; }

wanted() {  # what a finished stamp says: the place, the Python, and the hash of everything that decides what is installed
    "$venv/bin/python" -c 'import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [root / name for name in ("setup.py", "pyproject.toml", "constraints.txt", "launch/setup.sh")]
print(root, sys.version.split()[0], hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest())' "$root"
}

finished() { [[ -f $stamp ]] && [[ $(cat "$stamp") == "$(wanted 2>/dev/null)" ]]; }

check_tools() {
    command -v "$python" >/dev/null || fail "no $python found: install Python 3.10 or newer, or set BASE_PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail \
        "$("$python" --version 2>&1) is too old: install Python 3.10 or newer, or set BASE_PYTHON=/path/to/python3"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail \
        "$python has no venv and pip: install them (Debian, Ubuntu: apt-get install python3-venv)"
    for compiler in "${CXX:-c++}" g++ clang++; do
        command -v "$compiler" >/dev/null && return
    done
    fail "no C++ compiler found, which DeepSpeed's operators need: install one (Debian, Ubuntu: apt-get install g++), or set CXX"
}

make_venv() {
    if [[ -e $venv && ! -f $stamp && -n $(ls -A "$venv") ]]; then
        fail "$venv was not made by this script: move it away and run again"
    fi
    if [[ -f $stamp && $(cat "$stamp") != unfinished && $("$venv/bin/python" -c 'print(1)' 2>/dev/null) == 1 ]]; then
        say "setup.py or constraints.txt has changed: updating $venv"
    else
        if [[ -f $stamp ]]; then
            say "an earlier set-up was cut short or its Python is gone: starting over (removing $venv first)"
            rm -rf "$venv.old"
            mv "$venv" "$venv.old"  # a removal cut short must not leave a folder without our mark
        fi
        rm -rf "$venv.old" "$venv"
        say "making $venv with $("$python" --version) (a few seconds)"
        mkdir "$venv"
        echo unfinished >"$stamp"
        "$python" -m venv "$venv"
    fi
    echo unfinished >"$stamp"
}

install() {
    local quiet=()
    [[ -t 1 ]] || quiet=(--quiet)
    say "installing the packages of constraints.txt (about a minute, longer the first time)"
    cd "$root"
    "$venv/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check --no-input \
        -e '.[http,s3,hf,prepare,tasks,eval,dev]' -c constraints.txt &
    local pip=$!
    trap 'kill "$pip" 2>/dev/null; fail "interrupted: run launch/setup.sh again to start over"' INT TERM HUP
    wait "$pip" || fail "the installation failed (see above): run launch/setup.sh again to retry"
    trap - INT TERM HUP
    wanted >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "done: $venv"
}

finished && exit
check_tools
if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock --nonblock 9 || { say "another set-up is running here: waiting for it"; flock 9; }
    finished && exit
fi
make_venv
install
