#!/bin/bash
#PBS -N hiermpi
#PBS -l select=2:ncpus=16:mpiprocs=16
#PBS -l place=scatter
#PBS -l walltime=04:00:00
#PBS -r y
#PBS -j oe
# Train under PBS Pro, ranks started by mpirun. An example, never run under PBS. Copy it, set the lines above, and
#     qsub -v DATA=data.h5,RUN=runs/mine,FLAGS="--train.steps 5000" my-job.sh
# PBS lets no job requeue itself, so this one submits itself again (SCRIPT) until the run is done; options of qsub's
# command line are not repeated, lines above are. To save before the time is over: qsig -s SIGUSR1 JOB.
set -euo pipefail

# Each can be set in the environment (qsub -v).
MODULES=${MODULES:-}         # modules to load, in one string
VENV=${VENV:-.venv}          # the Python environment that holds hiermpi; none: whatever the modules give
DATA=${DATA:-data.h5}        # made by hiermpi prepare
RUN=${RUN:-runs/pbs}         # run folder, new or to be continued; a task of an array appends its number
CONFIG=${CONFIG:-}           # TOML file of settings
FLAGS=${FLAGS:-}             # further flags of hiermpi train, separated by spaces; %a is the number of the array task
MARGIN=${MARGIN:-180}        # seconds kept for saving before the walltime is over
MAX_RESTARTS=${MAX_RESTARTS:-20}
BIND=${BIND:-core}           # none where there are more ranks than cores
MPIRUN=${MPIRUN:-mpirun}     # the launcher and its first flags
SCRIPT=${SCRIPT:-jobs/pbs-mpirun.sh} # this script, seen from where qsub was called
TASK=${TASK:-${PBS_ARRAY_INDEX:-}}   # number of the array task
RESTARTS=${RESTARTS:-0}      # counted by the job itself

cd "$PBS_O_WORKDIR"
folder=$RUN${TASK:+-$TASK}

asked=
pid=
# shellcheck disable=SC2317  # called by trap
stop() {
    interrupted=1
    asked=$1
    [ -z "$pid" ] || kill -s USR1 "$pid" 2>/dev/null || true
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

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

newest_checkpoint() {
    find "$folder/checkpoints" -name 'step-*.h5' 2>/dev/null | sort | tail -n 1
}

read -ra launcher <<<"$MPIRUN"
read -ra command <<<"hiermpi train ${FLAGS//%a/${TASK:-0}}"
command+=(--data "$DATA" --run "$folder")
[ -z "$CONFIG" ] || command+=(--config "$CONFIG")
# PBS kills soon after its SIGTERM at the end of the walltime: the run must stop by itself before.
walltime=$(qstat -f "$PBS_JOBID" | sed -n 's/^ *Resource_List\.walltime = //p') || true
if [[ $walltime =~ ^([0-9]+):([0-9]+):([0-9]+)$ ]]; then
    limit=$(((10#${BASH_REMATCH[1]} * 60 + 10#${BASH_REMATCH[2]}) * 60 + 10#${BASH_REMATCH[3]}))
    command+=(--run.time_limit "$((limit > 2 * MARGIN ? limit - MARGIN : limit / 2))")
fi
before=$(newest_checkpoint) || true
was_done=$([ -f "$folder/DONE" ] && echo yes) || true
echo "job $PBS_JOBID, start $((RESTARTS + 1)): ${command[*]}"

"${launcher[@]}" --bind-to "$BIND" -n "$(wc -l <"$PBS_NODEFILE")" "${command[@]}" &
pid=$!
[ -z "$asked" ] || stop "$asked"

interrupted=1
while [ -n "$interrupted" ]; do # a trapped signal interrupts wait
    interrupted=
    code=0
    wait "$pid" || code=$?
done

# DONE tells success. A launcher that lost a node may return 0.
if [ -f "$folder/DONE" ] && { [ "$code" -eq 0 ] || [ -z "$was_done" ]; }; then
    exit 0
fi
after=$(newest_checkpoint) || true
if [ "$code" -eq 2 ]; then
    echo "not submitted again: the command line or the configuration is wrong"
elif [ "$asked" = TERM ]; then
    echo "not submitted again: the job was deleted"
elif [ "$code" -ne 75 ] && [ -z "$asked" ] && [ "$after" = "$before" ]; then
    echo "not submitted again: exit code $code, and no new checkpoint since this start"
elif [ "$RESTARTS" -ge "$MAX_RESTARTS" ]; then
    echo "not submitted again: $RESTARTS restarts are the limit (MAX_RESTARTS)"
else
    echo "exit code $code, newest checkpoint ${after:-none}: submitted again"
    RESTARTS=$((RESTARTS + 1))
    export MODULES VENV DATA RUN CONFIG FLAGS MARGIN MAX_RESTARTS BIND MPIRUN SCRIPT TASK RESTARTS
    qsub -v MODULES,VENV,DATA,RUN,CONFIG,FLAGS,MARGIN,MAX_RESTARTS,BIND,MPIRUN,SCRIPT,TASK,RESTARTS "$SCRIPT"
fi
[ "$code" -ne 0 ] || code=1
exit "$code"
