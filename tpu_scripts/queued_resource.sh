#!/usr/bin/env bash
# Asks for a TPU slice and waits in the queue for it; the slice is called TPU_NAME once it is there.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. ACCELERATOR=v6e-16 RUNTIME=v2-alpha-tpuv6e [SPOT=true] [VALID_FOR=6h]
  queued_resource.sh [--dry-run]"
source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
require PROJECT ZONE TPU_NAME ACCELERATOR RUNTIME

place=(--project="$PROJECT" --zone="$ZONE")
options=(--node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
[[ "${SPOT:-false}" != true ]] || options+=(--spot)
[[ -z "${VALID_FOR:-}" ]] || options+=(--valid-until-duration="$VALID_FOR")
run gcloud compute tpus queued-resources create "$TPU_NAME-request" "${place[@]}" "${options[@]}"
run gcloud compute tpus queued-resources describe "$TPU_NAME-request" "${place[@]}" --format="value(state.state)"
