#!/bin/sh
# In place of ssh for Open MPI's launcher: each "host" is this machine under a host name of its own, so that MPI sees
# several nodes. Called as: emulated_ssh.sh [options] HOST COMMAND...
while [ "${1#-}" != "$1" ]; do shift; done
name=$1
shift
exec unshare --uts sh -c 'hostname "$0" && exec sh -c "$1"' "$name" "$*"
