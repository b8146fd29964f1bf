#!/usr/bin/env bash
# Brings the work folder from the first host, without its checkpoints: metrics, evaluations, report.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. WORKDIR=runs/x DESTINATION=runs/x [NUM_SLICES=1]
  fetch.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME WORKDIR DESTINATION
slices

printf -v folder '%q' "$WORKDIR"
on_workers 0 "tar -C $folder --exclude=./checkpoints -czf run.tgz ."
run mkdir -p "$DESTINATION"
run gcloud compute tpus tpu-vm scp "${SLICES[0]}:run.tgz" "$DESTINATION/run.tgz" "${PLACE[@]}" --worker=0
run tar -C "$DESTINATION" -xzf "$DESTINATION/run.tgz"
run rm "$DESTINATION/run.tgz"
