#!/usr/bin/env bash
# Starts training on every host of the slices and returns; the same command resumes after a stop.
# CONFIG is a path in this checkout, WORKDIR one that all hosts see, from their home folder.
# Further arguments go to the trainer: launch.sh --config.model.moe.top_k=4
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. CONFIG=experiments/x.py WORKDIR=runs/x [NUM_SLICES=1]
  launch.sh [--dry-run] [--config.path=value ...]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME CONFIG WORKDIR
slices

# The trainer runs in the checkout, which lies in the home folder.
[[ "$WORKDIR" == /* || "$WORKDIR" == *://* ]] || WORKDIR="../$WORKDIR"
printf -v command ' %q' python -m vl_jax train "--config=$CONFIG" "--workdir=$WORKDIR" "${ARGUMENTS[@]}"
# setsid lets the trainer outlive the connection; the shell around it stays to write its status down.
on_workers all "set -e
cd vl_jax_source
if [ -f ../train.pid ] && [ ! -f ../train.exit ] && kill -0 \$(cat ../train.pid) 2>/dev/null
then echo 'already running'; exit 1; fi
rm -f ../train.exit ../train.stopped
echo \"== launched on \$(date)\" >>../train.log
PATH=\$HOME/vl_jax_env/bin:\$PATH VL_JAX_DISTRIBUTED=1 setsid nohup bash -c \
'trap : TERM; \"\$@\" >>../train.log 2>&1; echo \$? >../train.exit' train$command >/dev/null 2>&1 </dev/null &
echo \$! >../train.pid"
echo "logs.sh shows the log, status.sh how the hosts are" >&2
