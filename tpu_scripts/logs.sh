#!/usr/bin/env bash
# The end of the trainer's log on one host of the first slice, or on all hosts, each line with its host.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. [WORKER=0 or all] [TAIL=50] [FOLLOW=true] [NUM_SLICES=1]
  logs.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME
truth FOLLOW false
number TAIL 50
WORKER="${WORKER:-0}"
[[ "$WORKER" == all ]] || number WORKER 0
slices

follow=""
[[ "$FOLLOW" == false ]] || follow=" -F"
if [[ "$WORKER" == all ]]; then
  [[ -z "$follow" || "$NUM_SLICES" == 1 ]] || mistake "FOLLOW=true shows one slice; set WORKER to one of its hosts"
  on_workers all "tail -n $TAIL$follow train.log | sed -u \"s/^/\$(hostname): /\""
else
  on_workers "$WORKER" "tail -n $TAIL$follow train.log"
fi
