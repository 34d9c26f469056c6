# The environment that training runs in, each setting with its reason. Sourced by every launcher, or by hand:
#
#   source launch/env.sh
#
# Nothing that is already set is overridden. Reads NPROC (ranks on this node; default: one a GPU, else one a NUMA node)
# and NNODES (default 1).

_checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)  # nproc would obey OMP_NUM_THREADS
_gpus=0
: "${NNODES:=1}"
if [[ -n ${CUDA_VISIBLE_DEVICES-all} ]] && { command -v nvidia-smi || compgen -G '/dev/nvidia*' || ls /dev/dxg /dev/kfd; } &>/dev/null
then  # there may be some: torch knows how many it can use, in containers, under WSL and ROCm too
    _gpus=$("${PYTHON:-$_checkout/.venv/bin/python}" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
fi
if ((_gpus)); then
    : "${NPROC:=$_gpus}"
else
    # One rank has no messages and no copies for them; memory of another NUMA node is slow to reach for its threads.
    _numa=$({ compgen -G '/sys/devices/system/node/node[0-9]*' || echo node0; } | wc -l)
    : "${NPROC:=$((_numa < _cores ? _numa : _cores))}"
    # DeepSpeed would guess, and guesses by installed packages: a CUDA build of torch on a machine without a GPU fails.
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    # Large tensors get new memory each time, and a step spends a tenth on its page faults: fewer, of larger pages.
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
fi

# Ranks that each start a thread a core fight over the cores; torchrun's own default is one thread, too few on a CPU. One
# rank alone on a CPU tries how many are fastest.
if ((_gpus || NPROC * NNODES > 1)) || [[ -n ${OMP_NUM_THREADS:-} ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((_cores / NPROC > 0 ? _cores / NPROC : 1))}
fi

# DeepSpeed builds C++ operators at first use, under a lock that a killed build leaves behind; whoever comes next waits
# for it without a word. So: a folder of our own, and locks older than any build (a few minutes) are removed.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$_checkout/.venv/torch_extensions}
if [[ -d $TORCH_EXTENSIONS_DIR ]]; then
    find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +20 -print -delete | sed 's/^/removed a stale build lock: /' >&2
fi

if ((NNODES == 1)); then
    # Gloo looks up the host's own name, which on a laptop or in a container may be unknown or lead outside.
    [[ ! -e /sys/class/net/lo ]] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi

# Processes of one run are connected with each other, and where they meet with all: 1,024 open files may be too few.
ulimit -S -n "$(ulimit -H -n)" 2>/dev/null || true

# NCCL is silent by default, also about why it fails.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# On GPUs: batches of many lengths leave holes in memory that no later one fits into, unless segments can grow.
[[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# Two stalled collectives look the same from outside: on a crash, NCCL's watchdog included, show where Python stood.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}

# The lines of all ranks go to one log: unbuffered they come in the order in which they were written.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}

unset _checkout _cores _gpus _numa
