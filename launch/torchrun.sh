#!/usr/bin/env bash
# Train with torchrun, on one node or several. Everything on the command line goes to the trainer.
#
#   launch/torchrun.sh experiment=quickstart run.name=first data.train=shards data.val=shards
#
# Several nodes: the same line on each of them, with
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh ...    # NODE_RANK=1 on the second
#
# Settings (environment): NPROC ranks on each node (default: its GPUs, or its NUMA nodes), NNODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT (default on one node: a free one; on several: 29500), MODULE (pretrain.train), PYTHON (.venv/bin/python).
# SIGTERM, SIGUSR1 or Ctrl-C: the run saves a checkpoint and stops with exit code 75; a second Ctrl-C stops at once.
# Exit code 2: a mistake in the configuration or the data, explained in one message. All codes: launch/README.md.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

prepare "$@"
if ((NNODES == 1)) && [[ -z ${MASTER_PORT:-} ]]; then
    where=(--standalone --local-addr 127.0.0.1)
else
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
supervise "$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC" "${where[@]}" -m "$MODULE" "$@"
