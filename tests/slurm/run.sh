#!/bin/sh
# Run the tests of the job scripts on a private SLURM; say why not where there can be none.
#     sh tests/slurm/run.sh PYTHON
set -eu

skip() {
    echo "skipped: $1"
    exit 0
}

[ "$(id -u)" -eq 0 ] || skip "a private SLURM with several nodes needs root"
unshare --uts true 2>/dev/null || skip "no right to give processes a host name of their own (unshare --uts)"
"$(dirname "$1")/mpiexec" --version 2>/dev/null | grep -q "Open MPI" || skip "the tests expect Open MPI"
if ! command -v slurmd >/dev/null || ! command -v slurmctld >/dev/null; then
    command -v apt-get >/dev/null || skip "no slurmd and slurmctld, and no apt-get to install them"
    echo "installing slurm-wlm and libpmix-dev with apt-get"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        slurm-wlm libpmix2 libpmix-dev; } >/dev/null 2>&1 || skip "apt-get could not install slurm-wlm"
fi
plugins=$(find /usr/lib*/ -path '*slurm*' -name mpi_pmix.so 2>/dev/null) || true
[ -n "$plugins" ] || skip "this SLURM has no PMIx plugin"

# The folders of the tests are removed, whatever happens.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
"$1" -m pytest -q --durations=9 tests/slurm --basetemp "$folder/tests"
