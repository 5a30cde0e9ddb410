#!/bin/bash
#SBATCH --job-name=hiermpi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=16
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.out
# Train under SLURM, ranks started by mpirun:
#     DATA=data.h5 RUN=runs/mine sbatch --nodes=4 --ntasks-per-node=32 jobs/slurm-mpirun.sh --train.steps 5000
# Words after the script's name go to hiermpi train. The job saves and requeues itself until the run is done.
set -euo pipefail

# Each can be set in the environment.
MODULES=${MODULES:-}         # modules to load, in one string
VENV=${VENV:-.venv}          # the Python environment that holds hiermpi; none: whatever the modules give
DATA=${DATA:-data.h5}        # made by hiermpi prepare
RUN=${RUN:-runs/slurm}       # run folder, new or to be continued; a task of an array appends its number
CONFIG=${CONFIG:-}           # TOML file of settings
FLAGS=${FLAGS:-}             # further flags of hiermpi train, separated by spaces; %a is the number of the array task
MARGIN=${MARGIN:-180}        # seconds kept for saving before the allocation ends
MAX_RESTARTS=${MAX_RESTARTS:-20}
BIND=${BIND:-core}           # none where there are more ranks than cores
MPIRUN=${MPIRUN:-mpirun}     # the launcher and its first flags

launch() { # COMMAND...
    local launcher
    read -ra launcher <<<"$MPIRUN"
    [ "$BIND" = none ] || launcher+=(--map-by "slot:PE=${SLURM_CPUS_PER_TASK:-1}")
    exec "${launcher[@]}" --bind-to "$BIND" -n "$SLURM_NTASKS" "$@"
}

# From here on the same text in slurm-mpirun.sh and slurm-srun.sh: SLURM runs a copy, which finds no file beside it.

# USR1 comes before the time is over (--signal) or from scancel --signal=USR1 --batch; TERM from a preemption.
asked=
pid=
# shellcheck disable=SC2317  # called by trap
stop() {
    interrupted=1
    asked=yes
    [ -z "$pid" ] || kill -s USR1 "$pid" 2>/dev/null || true
}
trap stop USR1 TERM

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the plain number may mean the whole array
    RUN=$RUN-$SLURM_ARRAY_TASK_ID
fi

if [ -n "$MODULES" ]; then
    set +u
    # shellcheck disable=SC1091
    type module >/dev/null 2>&1 || . /etc/profile
    # shellcheck disable=SC2086
    module load $MODULES
    set -u
fi
[ "$VENV" = none ] || PATH=$(cd "$VENV/bin" && pwd):$PATH
export PATH OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONFAULTHANDLER=1
ulimit -c 0

seconds_left() { # of the allocation; nothing where it has no limit
    local left
    left=$(squeue --noheader --jobs "$job" --Format TimeLeft | tr -d ' ') || true
    [[ $left =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 0
    local days=${BASH_REMATCH[2]:-0} hours=${BASH_REMATCH[4]:-0} minutes=${BASH_REMATCH[5]} seconds=${BASH_REMATCH[6]}
    echo $((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
}

newest_checkpoint() {
    find "$RUN/checkpoints" -name 'step-*.h5' 2>/dev/null | sort | tail -n 1
}

read -ra command <<<"hiermpi train ${FLAGS//%a/${SLURM_ARRAY_TASK_ID:-0}}"
command+=(--data "$DATA" --run "$RUN")
[ -z "$CONFIG" ] || command+=(--config "$CONFIG")
left=$(seconds_left)
if [ -n "$left" ]; then
    command+=(--run.time_limit "$((left > 2 * MARGIN ? left - MARGIN : left / 2))")
fi
before=$(newest_checkpoint) || true
was_done=$([ -f "$RUN/DONE" ] && echo yes) || true
restarts=${SLURM_RESTART_COUNT:-0}
echo "job $job, start $((restarts + 1)), on $SLURM_JOB_NODELIST: ${command[*]} $*"

launch "${command[@]}" "$@" &
pid=$!
[ -z "$asked" ] || stop

interrupted=1
while [ -n "$interrupted" ]; do # a trapped signal interrupts wait
    interrupted=
    code=0
    wait "$pid" || code=$?
done

# DONE tells success. A launcher that lost a node may return 0.
if [ -f "$RUN/DONE" ] && { [ "$code" -eq 0 ] || [ -z "$was_done" ]; }; then
    exit 0
fi
after=$(newest_checkpoint) || true
if [ "$code" -eq 2 ]; then
    echo "not requeued: the command line or the configuration is wrong"
elif [ "$code" -ne 75 ] && [ -z "$asked" ] && [ "$after" = "$before" ]; then
    echo "not requeued: exit code $code, and no new checkpoint since this start"
elif [ "$restarts" -ge "$MAX_RESTARTS" ]; then
    echo "not requeued: $restarts restarts are the limit (MAX_RESTARTS)"
elif [ "$(squeue --noheader --jobs "$job" --Format State | tr -d ' ')" != RUNNING ]; then
    echo "not requeued: the job was cancelled, or SLURM has requeued it"
else
    echo "exit code $code, newest checkpoint ${after:-none}: asking for a requeue"
    scontrol requeue "$job" || true # it may be killed by its own success
fi
[ "$code" -ne 0 ] || code=1
exit "$code"
