#!/usr/bin/env bash
# Makes a TPU slice now, or fails if there is no capacity (queued_resource.sh waits for it).
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. ACCELERATOR=v6e-16 RUNTIME=v2-alpha-tpuv6e [SPOT=true]
  create.sh [--dry-run]"
source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
require PROJECT ZONE TPU_NAME ACCELERATOR RUNTIME

options=(--project="$PROJECT" --zone="$ZONE" --accelerator-type="$ACCELERATOR" --version="$RUNTIME")
[[ "${SPOT:-false}" != true ]] || options+=(--spot)
run gcloud compute tpus tpu-vm create "$TPU_NAME" "${options[@]}"
