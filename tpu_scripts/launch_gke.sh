#!/usr/bin/env bash
# Fills in jobset.yaml and applies it to the current cluster; WORKDIR lies under /runs, where CLAIM is mounted,
# and DATA_CLAIM is mounted at /data, to be read. Further arguments go to the trainer.
# --check names what stops a large job on a shared cluster, and applies nothing.
set -euo pipefail
USAGE="usage: NAME=.. IMAGE=.. CONFIG=experiments/x.py WORKDIR=/runs/x TOPOLOGY=v6e:4x4 CLAIM=..
  [NUM_SLICES=1] [DATA_CLAIM=..] [SPOT=true or RESERVATION=..] [NAMESPACE=..] [QUEUE=..] [PRIORITY=..]
  [SAFE_TO_EVICT=false] [MAX_RESTARTS=20] [GRACE_SECONDS=300]
  launch_gke.sh [--check] [--dry-run] [--config.path=value ...]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require NAME IMAGE CONFIG WORKDIR TOPOLOGY CLAIM
truth SPOT false
truth SAFE_TO_EVICT false
number NUM_SLICES 1 1
number MAX_RESTARTS 20
number GRACE_SECONDS 300
find_topology
# Pods are called NAME-slice-JOB-POD-xxxxx, in 63 characters.
[[ "$NAME" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && "${#NAME}" -le 40 ]] ||
  mistake "NAME=$NAME must be up to 40 of a-z, 0-9 and -, a letter first, no - last"
[[ "$WORKDIR" == /runs/* || "$WORKDIR" == *://* ]] ||
  mistake "WORKDIR=$WORKDIR must lie under /runs: all else is lost with the pod"
[[ "$SPOT" == false || -z "${RESERVATION:-}" ]] || mistake "SPOT=true and RESERVATION=$RESERVATION exclude each other"

# A word as JSON writes it, which is YAML too.
quoted() {
  local text="$1"
  text="${text//\\/\\\\}"
  text="${text//\"/\\\"}"
  text="${text//$'\n'/\\n}"
  printf '"%s"' "$text"
}

COMMAND='"python", "-m", "vl_jax", "train"'
for word in "--config=$CONFIG" "--workdir=$WORKDIR" "${ARGUMENTS[@]}"; do
  COMMAND+=", $(quoted "$word")"
done
CHIPS_PER_HOST=$((CHIPS / HOSTS))
# shellcheck disable=SC2034 # read by name, as all settings are
ON_SPOT="${SPOT/false/}" RESERVATION_AFFINITY="${RESERVATION:+specific}" DATA_MOUNT="${DATA_CLAIM:+/data}"

plain=(COMMAND NUM_SLICES HOSTS CHIPS_PER_HOST MAX_RESTARTS GRACE_SECONDS)
texts=(NAME NAMESPACE QUEUE PRIORITY SAFE_TO_EVICT GKE_ACCELERATOR GKE_TOPOLOGY ON_SPOT RESERVATION
  RESERVATION_AFFINITY IMAGE CLAIM DATA_CLAIM DATA_MOUNT)
manifest=""
while IFS= read -r line; do # with one setting at most
  [[ "$line" != \#* ]] || continue
  for name in "${plain[@]}" "${texts[@]}"; do
    [[ "$line" == *"\${$name}"* ]] || continue
    value="${!name:-}"
    [[ -n "$value" ]] || continue 2
    [[ " ${plain[*]} " == *" $name "* ]] || value="$(quoted "$value")"
    line="${line//"\${$name}"/"$value"}"
    break
  done
  manifest+="$line"$'\n'
done <"$HERE/jobset.yaml"

if "$CHECK"; then
  status=0
  need() { # need WHAT WHY FRAGMENT...: the manifest has one of the fragments
    local fragment
    for fragment in "${@:3}"; do [[ "$manifest" != *"$fragment"* ]] || return 0; done
    echo "$SCRIPT: no $1: $2" >&2
    status=2
  }
  need namespace "set NAMESPACE, or the set lands in whichever the cluster's context has" "  namespace: "
  need "queue label" "set QUEUE, or Kueue never admits the set" "kueue.x-k8s.io/queue-name: "
  need reservation "set RESERVATION (or SPOT=true), or no nodes are made for a large slice" \
    "cloud.google.com/reservation-name: " "cloud.google.com/gke-spot: "
  need "priority class" "set PRIORITY, or a busy queue never comes to the set" "kueue.x-k8s.io/priority-class: "
  need safe-to-evict "set SAFE_TO_EVICT=false, or pods that wait look idle and are evicted" 'safe-to-evict: "false"'
  for fragment in "gke-tpu-accelerator: \"$GKE_ACCELERATOR\"" "gke-tpu-topology: \"$GKE_TOPOLOGY\"" \
    "google.com/tpu: $CHIPS_PER_HOST"$'\n' "parallelism: $HOSTS"$'\n' "completions: $HOSTS"$'\n'; do
    need "node shape" "jobset.yaml must have ${fragment%$'\n'} for TOPOLOGY=$TOPOLOGY" "$fragment"
  done
  [[ "$status" != 0 ]] || echo "all is there; $NUM_SLICES x $TOPOLOGY, each $HOSTS x $MACHINE with $CHIPS chips"
  exit "$status"
fi
if "$DRY_RUN"; then
  printf "kubectl apply -f - <<'END'\n%sEND\n" "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
