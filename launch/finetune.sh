#!/usr/bin/env bash
# Fine-tune with torchrun: what launch/torchrun.sh does, with pretrain.finetune as the trainer.
#
#   launch/finetune.sh task=classification init=runs/NAME data.train=train.jsonl data.val=val.jsonl run.name=mood
MODULE=pretrain.finetune exec "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" "$@"
