# Sourced by torchrun.sh and deepspeed.sh: what they share. Checks the configuration in one process first, so that a
# mistake is one message; then starts the launcher and passes signals to the training processes themselves, because the
# launchers would kill them before they have saved.

set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage_error() { echo "error: $*" >&2; exit 2; }

for name in NPROC NNODES; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || usage_error "$name=${!name} must be a whole number, at least 1"
done
[[ ${NODE_RANK:=0} =~ ^[0-9]+$ ]] || usage_error "NODE_RANK=$NODE_RANK must be a whole number"
unset RANK LOCAL_RANK WORLD_SIZE  # left over from a launcher around this one
source "$checkout/launch/env.sh"
MODULE=${MODULE:-pretrain.train}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
PYTHON=${PYTHON:-$checkout/.venv/bin/python}
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}  # this checkout's code, from whatever folder it is started

launcher= first_signal= hostfile= told=
launch_id=$$-$RANDOM$RANDOM  # in the environment of every process of this launch, by which it is found again

check_settings() {
    command -v "$PYTHON" >/dev/null || usage_error "no $PYTHON: run launch/setup.sh first, or set PYTHON"
    ((NODE_RANK < NNODES)) || usage_error "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES (they count from 0)"
    if ((NNODES > 1)) && [[ $MASTER_ADDR == 127.0.0.1 && -z ${MASTER_PORT:-} ]]; then
        usage_error "NNODES=$NNODES needs MASTER_ADDR, the first node's name or address, the same on every node"
    fi
}

processes() {  # ids of every process of this launch
    { grep -lzs "^PRETRAIN_LAUNCH=$launch_id\$" /proc/[0-9]*/environ || true; } | cut -d / -f 3
}

workers() {  # ids of the training processes: those with a rank whose parent has none
    local pid parent
    for pid in $(processes); do
        grep -qzs '^LOCAL_RANK=' "/proc/$pid/environ" || continue
        parent=$(sed 's/.*) . \([0-9]*\) .*/\1/' "/proc/$pid/stat" 2>/dev/null) || continue
        grep -qzs '^LOCAL_RANK=' "/proc/$parent/environ" || echo "$pid"
    done
}

forward() {  # the trap of all signals
    local signal=$1 pids
    interrupted=1
    if [[ $signal == INT && -n $first_signal ]] && ((SECONDS - first_signal > 1)); then
        echo "stopping at once, without saving" >&2
        pids=$(processes)
        [[ -z $pids ]] || kill -KILL $pids 2>/dev/null || true
        return
    fi
    first_signal=${first_signal:-$SECONDS}
    pids=$(workers)
    if [[ -n $pids ]]; then
        echo "SIG$signal: the training processes save and stop (Ctrl-C again: at once)" >&2
        [[ $signal == USR1 ]] || signal=TERM
        kill -"$signal" $pids 2>/dev/null || true
    elif [[ -n $launcher ]]; then
        kill -TERM "$launcher" 2>/dev/null || true
    fi
}

supervise() {  # run a command to its end, with signals forwarded; returns its exit code
    set -m  # in a process group of its own: Ctrl-C in the terminal reaches this script only
    PRETRAIN_LAUNCH=$launch_id PRETRAIN_EXIT_CODE=$told "$@" </dev/null &
    launcher=$!
    set +m
    [[ -z $first_signal ]] || kill -TERM "$launcher" 2>/dev/null || true  # it came while nothing was running
    local code
    interrupted=1
    while ((interrupted)); do  # a signal ends the wait, not the command
        interrupted=0
        code=0
        wait "$launcher" || code=$?
    done
    launcher=
    return "$code"
}

finish() {  # leave no process behind, whatever happened
    local code=$? pids pid
    trap '' TERM INT HUP USR1
    for pid in $(workers); do
        if ((code == 0)) && grep -qzsx -e "$MODULE" "/proc/$pid/cmdline"; then
            echo "error: the launcher ended before the training processes did" >&2  # deepspeed's says 0 when it is killed
            code=1
        fi
    done
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        pids=$(processes)
        [[ -n $pids ]] || break
        sleep 0.2
    done
    [[ -z $pids ]] || kill -KILL $pids 2>/dev/null || true
    [[ ! -s $told ]] || code=$(head -n 1 "$told")  # of the ranks: torchrun makes 1 of every code
    rm -f "$hostfile" "$told"
    exit "$code"
}

show_only() {  # --help, --cfg job and the like print something once and start nothing
    local argument
    for argument; do
        case $argument in -h | --help | --hydra-help | --version | -c | --cfg | --cfg=* | -i | --info | --info=* | --check)
            return 0 ;;
        esac
    done
    return 1
}

prepare() {  # prepare OVERRIDES... : judge settings, configuration and data; on a mistake the script ends here
    check_settings
    ! show_only "$@" || exec "$PYTHON" -m "$MODULE" "$@"
    told=$(mktemp)
    trap finish EXIT
    for signal in TERM INT HUP USR1; do
        trap "forward $signal" "$signal"
    done
    supervise env WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" -m "$MODULE" --check "$@" >/dev/null || exit
}
