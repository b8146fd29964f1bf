#!/usr/bin/env bash
# Fills in jobset.yaml and applies it to the current cluster; WORKDIR lies under /runs, the mounted claim.
# Further arguments go to the trainer: launch_gke.sh --config.model.moe.top_k=4
set -euo pipefail
USAGE="usage: NAME=.. IMAGE=.. CONFIG=experiments/x.py WORKDIR=/runs/x ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4
  NUM_HOSTS=4 CHIPS_PER_HOST=4 CLAIM=.. [NUM_SLICES=1]
  launch_gke.sh [--dry-run] [--config.path=value ...]"
source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
NUM_SLICES="${NUM_SLICES:-1}"
names=(NAME IMAGE CONFIG WORKDIR ACCELERATOR TOPOLOGY NUM_HOSTS CHIPS_PER_HOST CLAIM NUM_SLICES)
require "${names[@]}"

# A word as JSON writes it, which is YAML too.
quoted() {
  local text="$1"
  text="${text//\\/\\\\}"
  text="${text//\"/\\\"}"
  text="${text//$'\n'/\\n}"
  printf '"%s"' "$text"
}

words=("--config=$CONFIG" "--workdir=$WORKDIR" "${ARGUMENTS[@]}")
COMMAND='"python", "-m", "vl_jax", "train"'
for word in "${words[@]}"; do
  COMMAND+=", $(quoted "$word")"
done
names+=(COMMAND)

manifest="$(sed '/^#/d' "$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")"
for name in "${names[@]}"; do
  manifest="${manifest//"\${$name}"/"${!name}"}"
done
if "$DRY_RUN"; then
  printf "kubectl apply -f - <<'END'\n%s\nEND\n" "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
