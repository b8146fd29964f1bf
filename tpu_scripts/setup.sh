#!/usr/bin/env bash
# Copies this checkout, uncommitted changes included, to every host of the slices and installs it there.
# With BUCKET, every host also mounts that bucket at ~/runs, so that all of them see one work folder.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. [NUM_SLICES=1] [BUCKET=name] setup.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME
slices

archive="${TMPDIR:-/tmp}/vl_jax_source.tgz"
excluded=(--exclude=.git --exclude=.venv --exclude=__pycache__ --exclude=./runs --exclude=./build)
run tar -C "$(dirname "$HERE")" "${excluded[@]}" -czf "$archive" .
for slice in "${SLICES[@]}"; do
  run gcloud compute tpus tpu-vm scp "$archive" "$slice:vl_jax_source.tgz" "${PLACE[@]}" --worker=all
done

# The hosts' own Python may be older than the package needs; uv brings one.
on_workers all 'set -e
rm -rf vl_jax_source && mkdir vl_jax_source && tar -xzf vl_jax_source.tgz -C vl_jax_source
python3 -m pip install --quiet --user uv
[ -d vl_jax_env ] || python3 -m uv venv --quiet --python 3.12 vl_jax_env
python3 -m uv pip install --quiet --python vl_jax_env/bin/python -e "vl_jax_source[tpu]"'

if [[ -n "${BUCKET:-}" ]]; then
  on_workers all "set -e
key=/usr/share/keyrings/cloud.google.asc
curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee \$key >/dev/null
echo \"deb [signed-by=\$key] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
  sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
mkdir -p runs && (mountpoint -q runs || gcsfuse --implicit-dirs $BUCKET runs)"
fi
