#!/usr/bin/env bash
# Gives the slices back, with all that is on their disks, and the request that they came by.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. [NUM_SLICES=1] delete.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME
slices

# --force deletes the slices of the request first; slices that create.sh made have no request.
if "$DRY_RUN" || [[ "$(state_of queued-resources "$TPU_NAME-request")" != MISSING ]]; then
  run gcloud compute tpus queued-resources delete "$TPU_NAME-request" "${PLACE[@]}" --force --quiet
fi
for slice in "${SLICES[@]}"; do
  if "$DRY_RUN" || [[ "$(state_of tpu-vm "$slice")" != MISSING ]]; then
    run gcloud compute tpus tpu-vm delete "$slice" "${PLACE[@]}" --quiet
  fi
done
! "$DRY_RUN" || echo "# each only where it is there"
