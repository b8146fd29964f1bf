#!/usr/bin/env bash
# Makes one TPU slice now, or fails if there is no capacity (queued_resource.sh waits for it).
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. TOPOLOGY=v6e:4x4 [SPOT=true] [RESERVED=true]
  create.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME TOPOLOGY
truth SPOT false
truth RESERVED false
slices
[[ "$NUM_SLICES" == 1 ]] || mistake "NUM_SLICES=$NUM_SLICES: this makes one slice; see queued_resource.sh"
find_slice

options=(--accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME")
! "$SPOT" || options+=(--spot)
! "$RESERVED" || options+=(--reserved)
run gcloud compute tpus tpu-vm create "$TPU_NAME" "${PLACE[@]}" "${options[@]}"
