#!/usr/bin/env bash
# From nothing to a trained model that writes text: set up, train on the Python standard library, evaluate, generate.
#
#   launch/quickstart.sh                 # minutes; it says how many here. Run again, it continues
#   launch/quickstart.sh train.steps=50  # further arguments go to the trainer
#
# Everything it makes lies in runs/: quickstart-data (tokenizer, shards) and quickstart (the run).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/setup.sh
source launch/env.sh
((NPROC <= 2)) || { export NPROC=2; unset OMP_NUM_THREADS; }  # its batches of 8 rows are for small machines
python=.venv/bin/python
data=runs/quickstart-data
run=runs/quickstart
mkdir -p "$data"

step() { printf '\n== %s\n' "$*"; }

stdlib=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
text=(--input "$stdlib" --include '*.py' --exclude site-packages dist-packages test tests idlelib)
held_out=(--val-fraction 0.05)  # neither tokenizer nor model learns from these

step "1/5 tokenizer: 24,576 byte-pair pieces from the Python standard library"
if [[ -f $data/tokenizer.model ]]; then
    echo "there already: $data/tokenizer.model"
else
    "$python" tools/train_tokenizer.py "${text[@]}" --vocab-size 24576 "${held_out[@]}" \
        --output "$data/tokenizer.model"
fi

step "2/5 shards: tokens in WebDataset tars, 5 % of the documents held out"
if [[ -f $data/shards/train/index.json && -f $data/shards/val/index.json ]]; then
    echo "there already: $data/shards"
else
    "$python" tools/write_shards.py "${text[@]}" --tokenizer "$data/tokenizer.model" \
        --output "$data/shards" "${held_out[@]}"
fi

step "3/5 training with ZeRO-1, ranks: $NPROC (Ctrl-C saves; the same command continues)"
trainer= stopped= code=0
trap '[[ -z $trainer ]] || kill -TERM "$trainer" 2>/dev/null || true; stopped=1' INT TERM
launch/torchrun.sh experiment=quickstart run.name=quickstart data.train="$data/shards" data.val="$data/shards" "$@" &
trainer=$!
wait "$trainer" || code=$?
while kill -0 "$trainer" 2>/dev/null; do  # a signal ends the wait before the trainer has saved
    code=0
    wait "$trainer" || code=$?
done
trap - INT TERM
if ((code == 75)) || [[ -n $stopped && $code == 0 ]]; then
    echo "stopped; launch/quickstart.sh goes on from here"
    exit 75
fi
((code == 0)) || exit "$code"

unset OMP_NUM_THREADS  # one process from here on: all cores
step "4/5 evaluation on all held-out text"
"$python" tools/evaluate.py "$run"

step "5/5 a continuation of a prompt"
"$python" tools/generate.py "$run" --prompt $'class Stack:\n    def __init__(self, items=None):\n' \
    --max-tokens 120 --temperature 0.7 | tee "$run/sample.txt"

step "done"
"$python" tools/report.py "$run"
cat <<END
what to try next:
  .venv/bin/python tools/generate.py $run --prompt "class " --max-tokens 200
  launch/quickstart.sh train.steps=2000     # train on; every checkpoint and curve stays exact
  README.md: your own text, your GPUs, your cluster
END
