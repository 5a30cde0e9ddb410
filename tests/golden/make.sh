#!/bin/sh
# Make the golden files with the hiermpi on PATH. They were made once, by the code of commit 284b750, and stay as they are:
#     git worktree add ../old 284b750 && make -C ../old install && PATH=../old/.venv/bin:$PATH sh tests/golden/make.sh
set -eu
cd "$(dirname "$0")"
export HIERMPI_KERNELS=plain
work=$(mktemp -d)
python - > "$work/text.txt" <<'PY'
for i in range(120):
    print(f"def function_{i}(x, y={i}):\n    return [x + {i % 7} * y for _ in range({i % 13})]\n")
PY
hiermpi prepare "$work/text.txt" --out data.h5 --force
settings="--model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.context_length 16 --train.batch_size 8
    --train.micro_batch_size 2 --train.steps 10 --train.eval_interval 0 --train.eval_batches 4 --checkpoint.interval 5
    --checkpoint.keep_last 2 --optimizer.warmup_steps 2 --optimizer.decay_steps 10 --lattice.coupling 1e-4"
for mode in false true; do
    hiermpi train --data data.h5 --run "$work/$mode" $settings --hierarchy.reproducible $mode
    for step in 05 10; do
        cp "$work/$mode/checkpoints/step-000000$step.h5" "reproducible-$mode-$step.h5"
    done
    hiermpi evaluate "$work/$mode" --data data.h5 --json > "reproducible-$mode.json"
done
rm -r "$work"
