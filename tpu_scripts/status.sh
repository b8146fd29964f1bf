#!/usr/bin/env bash
# How the request, its slices and the trainer on every host are.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. [NUM_SLICES=1] status.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME
slices

report="$TRAINER
echo \"\$(hostname): \$train: \$(tail -n 1 train.log 2>/dev/null)\""
if "$DRY_RUN"; then
  run gcloud compute tpus queued-resources describe "$TPU_NAME-request" "${PLACE[@]}" --format="value(state.state)"
  for slice in "${SLICES[@]}"; do
    run gcloud compute tpus tpu-vm describe "$slice" "${PLACE[@]}" --format="value(state)"
  done
  on_workers all "$report"
  exit
fi
state="$(state_of queued-resources "$TPU_NAME-request")"
[[ "$state" == MISSING ]] || echo "$TPU_NAME-request: $state"
ready=()
for slice in "${SLICES[@]}"; do
  state="$(state_of tpu-vm "$slice")"
  echo "$slice: $state"
  [[ "$state" != READY ]] || ready+=("$slice")
done
SLICES=("${ready[@]}")
[[ "${#ready[@]}" == 0 ]] || on_workers all "$report"
