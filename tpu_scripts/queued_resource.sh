#!/usr/bin/env bash
# Asks for TPU slices and waits in the queue until they are there, at most WAIT_MINUTES.
# Run it again to wait on: a request that is there already is not made twice.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. TOPOLOGY=v6e:4x4 [NUM_SLICES=1] [SPOT=true] [RESERVED=true]
  [WAIT_MINUTES=360] [POLL_SECONDS=30] [VALID_FOR=6h]
  queued_resource.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME TOPOLOGY
truth SPOT false
truth RESERVED false
number WAIT_MINUTES 360
number POLL_SECONDS 30
slices
find_slice

request="$TPU_NAME-request"
options=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME")
if [[ "$NUM_SLICES" == 1 ]]; then
  options+=(--node-id="$TPU_NAME")
else
  options+=(--node-count="$NUM_SLICES" --node-prefix="$TPU_NAME")
fi
! "$SPOT" || options+=(--spot)
! "$RESERVED" || options+=(--reserved)
[[ -z "${VALID_FOR:-}" ]] || options+=(--valid-until-duration="$VALID_FOR")
create=(gcloud compute tpus queued-resources create "$request" "${PLACE[@]}" "${options[@]}")
if "$DRY_RUN"; then
  run "${create[@]}"
  run gcloud compute tpus queued-resources describe "$request" "${PLACE[@]}" --format="value(state.state)"
  echo "# the latter every $POLL_SECONDS s until it says ACTIVE, for at most $WAIT_MINUTES min"
  exit
fi

deadline=$((SECONDS + 60 * WAIT_MINUTES)) before="" made=false
while state="$(state_of queued-resources "$request")"; do
  [[ "$state" == "$before" ]] || echo "$request: $state after $((SECONDS / 60)) min"
  before="$state"
  case "$state" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED)
      # A request in these states never comes back by itself.
      echo "$SCRIPT: $request is $state; delete.sh removes it, then ask again" >&2
      exit 1 ;;
  esac
  if [[ "$state" == MISSING && "$made" == false ]]; then
    "${create[@]}"
    made=true
    continue
  fi
  if [[ "$SECONDS" -ge "$deadline" ]]; then
    echo "$SCRIPT: $request is still $state after WAIT_MINUTES=$WAIT_MINUTES; run again to wait on, or delete.sh" >&2
    exit 1
  fi
  sleep "$POLL_SECONDS"
done
