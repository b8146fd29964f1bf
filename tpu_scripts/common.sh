# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is used there
# Sourced by the other scripts, after they have set USAGE: options, settings, messages, commands on the hosts.

SCRIPT="$(basename "$0")"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# A user's mistake: one line, status 2.
mistake() {
  echo "$SCRIPT: $*" >&2
  exit 2
}

# Takes --dry-run, --check and --help out of the arguments; the others are left in ARGUMENTS.
DRY_RUN=false CHECK=false ARGUMENTS=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=true ;;
    --check) CHECK=true ;;
    --help) echo "$USAGE"; exit 0 ;;
    *) ARGUMENTS+=("$argument") ;;
  esac
done
[[ "$USAGE" == *--check* ]] || ! "$CHECK" || mistake "unknown argument --check; $SCRIPT --help shows the usage"

# What is left belongs to the trainer, or is a mistake (which a remote trainer would tell much later).
for argument in "${ARGUMENTS[@]}"; do
  [[ "$USAGE" == *--config.* && "$argument" == @(--config.*|--profile)=* ]] ||
    mistake "unknown argument $argument; $SCRIPT --help shows the usage"
done

# Runs a command, or prints it so that it can be pasted into a shell.
run() {
  if "$DRY_RUN"; then
    printf '%s' "$1"
    [[ $# == 1 ]] || printf ' %q' "${@:2}"
    printf '\n'
  else
    "$@"
  fi
}

# Ends the script unless every named variable has a value.
require() {
  local name missing=""
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || missing+="${missing:+, }$name is not set"
  done
  [[ -z "$missing" ]] || mistake "$missing; $SCRIPT --help shows the usage"
}

# A setting that is true or false, and one that is a whole number; with their defaults.
truth() {
  [[ -n "${!1:-}" ]] || printf -v "$1" %s "$2"
  [[ "${!1}" == true || "${!1}" == false ]] || mistake "$1=${!1} must be true or false"
}
number() {
  [[ -n "${!1:-}" ]] || printf -v "$1" %s "$2"
  [[ "${!1}" =~ ^[0-9]+$ && "${!1}" -ge "${3:-0}" ]] || mistake "$1=${!1} must be a whole number >= ${3:-0}"
}

# Looks TOPOLOGY up: sets what its line says, and GKE_TOPOLOGY, RUNTIME and ZONES.
find_topology() {
  local name chip known="" chips=""
  while read -r name ACCELERATOR_TYPE CHIPS HOSTS MACHINE GKE_ACCELERATOR; do
    [[ "$name" != \#* ]] || continue
    [[ "$name" != "$TOPOLOGY" ]] || break
    [[ "$name" != "${TOPOLOGY%%:*}":* ]] || known+=" $name"
    [[ " $chips " == *" ${name%%:*} "* ]] || chips+=" ${name%%:*}"
    name=""
  done <"$HERE/topologies.txt"
  [[ -n "$name" ]] || mistake "TOPOLOGY=$TOPOLOGY is unknown; known are${known:- those of$chips}"
  GKE_TOPOLOGY="${TOPOLOGY#*:}"
  while read -r chip RUNTIME ZONES; do
    [[ "$chip" != "${TOPOLOGY%%:*}" ]] || break
  done <"$HERE/zones.txt"
}

# For TPU VMs: the topology exists there, and in the zone.
find_slice() {
  find_topology
  [[ "$ACCELERATOR_TYPE" != - ]] || mistake "TOPOLOGY=$TOPOLOGY is on GKE only; see launch_gke.sh"
  [[ " $ZONES " == *" $ZONE "* ]] || mistake "ZONE=$ZONE has no ${TOPOLOGY%%:*}; it is in $ZONES"
}

# Names of the slices: TPU_NAME, or TPU_NAME-0, TPU_NAME-1 ... where there are several.
slices() {
  number NUM_SLICES 1 1
  PLACE=(--project="$PROJECT" --zone="$ZONE") SLICES=("$TPU_NAME")
  [[ "$NUM_SLICES" == 1 ]] || read -ra SLICES <<<"$(seq -s ' ' -f "$TPU_NAME-%.0f" 0 $((NUM_SLICES - 1)))"
}

# The same command on every host of all slices, or on one host of the first: on_workers all 'command'
on_workers() {
  local slice chosen=("${SLICES[0]}")
  [[ "$1" != all ]] || chosen=("${SLICES[@]}")
  for slice in "${chosen[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$slice" "${PLACE[@]}" --worker="$1" --command="$2"
  done
}

# What a host says of its trainer, in one word or two: none, running, stopped (by stop.sh), ended STATUS.
# shellcheck disable=SC2016
TRAINER='if [ -f train.stopped ]; then train=stopped
elif [ -f train.exit ]; then train="ended $(cat train.exit)"
elif [ ! -f train.pid ]; then train=none
elif kill -0 "$(cat train.pid)" 2>/dev/null; then train=running
else train="ended killed"; fi'

# The state of a request or of a slice; MISSING where there is none, UNKNOWN where nobody answers.
state_of() {
  local found format="value(state)"
  [[ "$1" != queued-resources ]] || format="value(state.state)"
  if found="$(gcloud compute tpus "$1" describe "$2" "${PLACE[@]}" --format="$format" 2>&1)"; then
    echo "${found##*$'\n'}"
  elif [[ "$found" == *NOT_FOUND* ]]; then echo MISSING
  else echo UNKNOWN; fi
}
