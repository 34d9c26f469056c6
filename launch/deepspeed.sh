#!/usr/bin/env bash
# Train with the deepspeed launcher, on one node or several. Everything on the command line goes to the trainer.
#
#   launch/deepspeed.sh experiment=quickstart run.name=first data.train=shards data.val=shards
#
# Several nodes: the same line on each of them (no ssh between them is needed), with
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/deepspeed.sh ...   # NODE_RANK=1 on the second
#
# Settings, signals and exit codes: as in torchrun.sh.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

prepare "$@"
if ((NNODES == 1)); then
    port=${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
    where=(--master_port "$port")
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then  # deepspeed takes all that are visible, and forgets which with --num_gpus
        CUDA_VISIBLE_DEVICES=$(cut -d , -f "1-$NPROC" <<<"$CUDA_VISIBLE_DEVICES")
    else
        where+=(--num_gpus "$NPROC")
    fi
else
    hostfile=$(mktemp)
    for ((node = 0; node < NNODES; node++)); do echo "node$node slots=$NPROC"; done >"$hostfile"
    where=(--hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
supervise "$PYTHON" -m deepspeed.launcher.runner --log_level error "${where[@]}" --module "$MODULE" "$@"
