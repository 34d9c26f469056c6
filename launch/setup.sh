#!/usr/bin/env bash
# Make .venv in the checkout and install the project into it, with the exact versions of constraints.txt.
#
#   launch/setup.sh                           # training, fine-tuning, Hugging Face both ways: what the README shows
#   launch/setup.sh all                       # every optional part too (setup.py lists them), and what the tests need
#   BASE_PYTHON=python3.12 launch/setup.sh    # another Python than python3
#
# It does nothing (quickly) when all is in place. Safe to interrupt and to run twice at once: the stamp is written last,
# and a .venv without one is made anew.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
log=$root/.venv.log               # all that pip says
what=${1:-main}
stamp=$venv/.pretrain-setup       # marks the folder as ours; its text says what was installed
PATH=${PATH//"$venv/bin:"/}       # inside an activated .venv, python3 must still mean the one it was made from
python=${BASE_PYTHON:-python3}

say() { printf 'set-up: %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$@" >&2; exit 1; }

wanted() {  # wanted main|all: what a finished stamp says: the place, the Python, the hash of what decides what is installed
    "$venv/bin/python" -c 'import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [root / name for name in ("setup.py", "pyproject.toml", "constraints.txt", "launch/setup.sh")]
print(root, sys.version.split()[0], hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest(), sys.argv[2])' \
        "$root" "$1"
}

finished() {
    [[ -f $stamp ]] || return
    [[ $(cat "$stamp") == "$(wanted "$what" 2>/dev/null)" || $(cat "$stamp") == "$(wanted all 2>/dev/null)" ]]
}

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
        if [[ $(cat "$stamp") == "$(wanted main)" ]]; then
            say "adding what is optional to $venv"
        else
            say "setup.py or constraints.txt has changed: updating $venv"
            [[ $(cat "$stamp") != *" all" ]] || what=all
        fi
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

packages() { find "$venv/lib" -maxdepth 3 -name '*.dist-info' 2>/dev/null | wc -l || true; }

progress() {  # progress BEFORE: what pip is doing, by what it wrote last; BEFORE packages were there
    local last
    last=$(grep -E '^ *(Collecting|Downloading|Using cached|Building|Installing)' "$log" | tail -n 1) || true
    if [[ $last == Installing* ]]; then  # the one line for all of them: what is done shows in the folder
        echo "$(($(packages) - $1)) of $(tr ',' '\n' <<<"$last" | wc -l) packages installed"
    else
        cut -c 1-100 <<<"${last#"${last%%[! ]*}"}"
    fi
}

install() {
    local started=$SECONDS told=0 extras=hf before
    before=$(packages)
    [[ $what != all ]] || extras=http,s3,hf,prepare,tasks,eval,dev
    say "installing the packages of constraints.txt (a minute or two; what pip says is in $log)"
    cd "$root"
    # Python compiles what it imports; pip would compile all, most of which nobody imports.
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --no-input --progress-bar off --no-compile \
        -e ".[$extras]" -c constraints.txt >"$log" 2>&1 &
    local pip=$!
    trap 'kill "$pip" 2>/dev/null; fail "interrupted: run launch/setup.sh again to start over"' INT TERM HUP
    while kill -0 "$pip" 2>/dev/null; do
        sleep 1
        ((SECONDS - started < told + 5)) || { told=$((SECONDS - started)); say "$told s: $(progress "$before")"; }
    done
    if ! wait "$pip"; then
        grep -v 'is ignored: it is neither a file nor a directory' "$log" | tail -n 30 >&2
        fail "the installation failed (see above, and $log): run launch/setup.sh again to retry"
    fi
    trap - INT TERM HUP
    wanted "$what" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "done in $((SECONDS - started)) s: $venv"
}

[[ $what == main || $what == all ]] || fail "launch/setup.sh $what: the one argument it takes is 'all'"
finished && exit
check_tools
if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock --nonblock 9 || { say "another set-up is running here: waiting for it"; flock 9; }
    finished && exit
fi
make_venv
install
