#!/bin/bash
# Train on this machine:
#     DATA=data.h5 RUN=runs/mine RANKS=8 jobs/local.sh --train.steps 5000
# Ctrl-C, or SIGTERM to this script: the run saves a checkpoint and ends with 75; the same command continues. A second
# one ends it at once. Words after the script's name go to hiermpi train. The exit code is the run's.
set -euo pipefail

# Each can be set in the environment.
MODULES=${MODULES:-}         # modules to load, in one string
VENV=${VENV:-.venv}          # the Python environment that holds hiermpi; none: whatever the modules give
DATA=${DATA:-data.h5}        # made by hiermpi prepare
RUN=${RUN:-runs/local}       # run folder, new or to be continued
CONFIG=${CONFIG:-}           # TOML file of settings
FLAGS=${FLAGS:-}             # further flags of hiermpi train, separated by spaces
RANKS=${RANKS:-$(lscpu --parse=CORE,SOCKET | grep -v "^#" | sort -u | wc -l)} # one per core
MPIRUN=${MPIRUN:-mpirun}     # the launcher and its flags; MPICH: "mpiexec -disable-auto-cleanup"

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

read -ra launcher <<<"$MPIRUN"
read -ra command <<<"hiermpi train $FLAGS"
command+=(--data "$DATA" --run "$RUN")
[ -z "$CONFIG" ] || command+=(--config "$CONFIG")

# SIGTERM and SIGINT would make mpirun kill the ranks before they can save; SIGUSR1 it forwards to them.
# setsid: the terminal's Ctrl-C must reach this script only.
asked=
# shellcheck disable=SC2317  # called by trap
stop() {
    interrupted=1
    kill -s "${asked:-USR1}" "$pid" 2>/dev/null || true
    asked=TERM
}
setsid "${launcher[@]}" -n "$RANKS" "${command[@]}" "$@" &
pid=$!
trap stop INT TERM HUP

interrupted=1
while [ -n "$interrupted" ]; do # a trapped signal interrupts wait
    interrupted=
    code=0
    wait "$pid" || code=$?
done
if [ "$code" -eq 0 ] && [ ! -f "$RUN/DONE" ]; then
    echo "the launcher says success, but $RUN is not done" >&2
    code=1
fi
exit "$code"
