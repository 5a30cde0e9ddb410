#!/bin/bash
#SBATCH --job-name=hiermpi-prepare
#SBATCH --ntasks=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
# Make a dataset under SLURM, on one core:
#     SOURCES="my-texts more.txt" DATA=data.h5 sbatch jobs/slurm-prepare.sh --tokenizer bpe --vocab-size 8192
# Words after the script's name go to hiermpi prepare. To train when it is there:
#     sbatch --dependency=afterok:JOB jobs/slurm-mpirun.sh
set -euo pipefail

# Each can be set in the environment.
MODULES=${MODULES:-}         # modules to load, in one string
VENV=${VENV:-.venv}          # the Python environment that holds hiermpi; none: whatever the modules give
SOURCES=${SOURCES:-stdlib}   # text files and folders, separated by spaces; stdlib: Python's own source
DATA=${DATA:-data.h5}        # dataset to make; an existing one is kept unless --force is given

if [ -n "$MODULES" ]; then
    set +u
    # shellcheck disable=SC1091
    type module >/dev/null 2>&1 || . /etc/profile
    # shellcheck disable=SC2086
    module load $MODULES
    set -u
fi
[ "$VENV" = none ] || PATH=$(cd "$VENV/bin" && pwd):$PATH
export PATH OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

read -ra sources <<<"$SOURCES"
exec hiermpi prepare "${sources[@]}" --out "$DATA" "$@"
