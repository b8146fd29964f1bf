#!/usr/bin/env bash
# Keeps a run going until it is done: asks for slices, sets them up, launches and watches. Slices that are taken
# away are made anew, and what ended early is launched again with the same WORKDIR, which resumes; RETRIES times
# at most. Slices that are there are taken as they are. Further arguments go to the trainer.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. TOPOLOGY=v6e:4x4 CONFIG=experiments/x.py WORKDIR=runs/x
  [RETRIES=10] [POLL_SECONDS=60] [PATIENCE=60] [all that queued_resource.sh, setup.sh and stop.sh take]
  babysit.sh [--dry-run] [--config.path=value ...]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME TOPOLOGY CONFIG WORKDIR
number RETRIES 10
number POLL_SECONDS 60
number PATIENCE 60 # polls without an answer
slices
find_slice

look() { # how the trainers of one slice are: a line "train STATE" from each host
  run timeout 300 gcloud compute tpus tpu-vm ssh "$1" "${PLACE[@]}" --worker=all --command="$TRAINER
echo \"train \$train\""
}

if "$DRY_RUN"; then
  for script in delete.sh queued_resource.sh setup.sh; do
    echo "# $script"
    "$HERE/$script" --dry-run
  done
  echo "# launch.sh"
  "$HERE/launch.sh" --dry-run "${ARGUMENTS[@]}"
  echo "# every $POLL_SECONDS s, until every host says: train ended 0"
  for slice in "${SLICES[@]}"; do look "$slice"; done
  echo "# all of it again where slices are gone, stop.sh and launch.sh where a trainer ended, $RETRIES times at most"
  exit
fi

give_up() {
  echo "$SCRIPT: $1; slices that are there go on to cost money: status.sh, logs.sh, delete.sh" >&2
  exit "${2:-1}"
}
retries=-1 # the first launch is none
again() {
  retries=$((retries + 1))
  [[ "$retries" -le "$RETRIES" ]] || give_up "$1, and RETRIES=$RETRIES are used up"
  echo "$(date +%FT%T) $1: launch $((retries + 1))"
}
start() { "$HERE/setup.sh" && "$HERE/launch.sh" "${ARGUMENTS[@]}"; }

clear_away() { # what is left of the slices and their request, unless the request still waits in the queue
  case "$(state_of queued-resources "$TPU_NAME-request")" in
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) ;;
    *) "$HERE/delete.sh" ;;
  esac
}

slices_are() { # whole, lost, or waiting for an answer or a repair
  local slice answer=whole
  for slice in "${SLICES[@]}"; do
    case "$(state_of tpu-vm "$slice")" in
      READY) ;;
      MISSING | PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) answer=lost ;;
      *) [[ "$answer" == lost ]] || answer=waiting ;;
    esac
  done
  echo "$answer"
}

trainers_are() { # silent, stopped, mistaken, done, new, running or ended
  local slice found="" hosts
  for slice in "${SLICES[@]}"; do
    found+="$(look "$slice" 2>/dev/null </dev/null | grep '^train ' || true)"$'\n'
  done
  hosts="$(grep -c . <<<"$found" || true)"
  found="$(sort -u <<<"$found" | sed '/^$/d')"
  case "$found" in
    *"train stopped"*) echo stopped ;;
    *"train ended 2"$'\n'* | *"train ended 2") echo mistaken ;;
    *) if [[ "$hosts" -lt $((HOSTS * NUM_SLICES)) ]]; then echo silent
       elif [[ "$found" == "train ended 0" ]]; then echo "done"
       elif [[ "$found" == "train none" ]]; then echo new
       elif grep -qvxE 'train (running|ended 0)' <<<"$found"; then echo ended
       else echo running; fi ;;
  esac
}

silent=0
while :; do
  now="$(slices_are)"
  [[ "$now" != whole ]] || now="$(trainers_are)"
  case "$now" in
    done) echo "$(date +%FT%T) done; fetch.sh brings the results, delete.sh gives the slices back"; exit 0 ;;
    stopped) echo "$(date +%FT%T) stopped by stop.sh; the slices are still there"; exit 0 ;;
    mistaken) give_up "the trainer refuses its settings (status 2)" 2 ;;
    new) again "slices without a trainer"; start || true ;;
    ended) again "a trainer ended early"; { RELAUNCH=true "$HERE/stop.sh" && start; } || true ;;
    lost) again "no slices"; { clear_away && "$HERE/queued_resource.sh" && start; } || true ;;
  esac
  case "$now" in
    silent | waiting) silent=$((silent + 1)) ;;
    *) silent=0 ;;
  esac
  [[ "$silent" -le "$PATIENCE" ]] || give_up "no answer to PATIENCE=$PATIENCE polls ($now)"
  sleep "$POLL_SECONDS"
done
