"""A cloud that is not there: tools that write down what they are asked for, and slices on this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tpu_scripts"
TOOLS = ("gcloud", "kubectl", "srun", "sbatch", "scontrol")

# Each describe answers with the next line of a file named after what it describes, and with the last one for
# ever; an empty or missing file says that there is no such thing. A command for the hosts runs in ./host-N.
GCLOUD = r"""#!/usr/bin/env bash
cd "$(dirname "$0")/.."
printf '%s\n' "$4 $5" >>asked
next() {
  [ -s "$1" ] || { echo "ERROR: NOT_FOUND: $1" >&2; exit 1; }
  line="$(head -n 1 "$1")"
  [ "$(wc -l <"$1")" = 1 ] || sed -i 1d "$1"
  [ "$line" != SILENCE ] || { echo "ERROR: no route to host" >&2; exit 1; }
  [ "$line" != MISSING ] || { echo "ERROR: NOT_FOUND: $1" >&2; exit 1; }
  echo "$line"
}
case "$4" in
  describe) next "$5.state" ;;
  ssh)
    for word in "$@"; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
    if [ -s answers ] && [[ "$command" == *'echo "train $train"' ]]; then next answers
    else for host in host-*; do (cd "$host" && HOME="$PWD" bash -c "$command"); done; fi ;;
esac
"""


def run(
    name: str, *arguments: str, settings: dict[str, str], folder: Path, timeout: int = 20
) -> subprocess.CompletedProcess[str]:
    """Runs a script where every command that could reach a network or a queue writes a file instead."""
    tools = folder / "tools"
    if not tools.exists():
        furnish(folder)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder), **settings}
    return subprocess.run(
        ["bash", str(FOLDER / name), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def furnish(folder: Path, *, gcloud: str = "") -> None:
    """Puts the tools into a folder; each but a ``gcloud`` of its own only writes a file."""
    tools = folder / "tools"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).write_text('#!/bin/sh\necho "$0 $*" >> "$(dirname $0)/../ran"\n')
    if gcloud:
        (tools / "gcloud").write_text(gcloud)
    for tool in tools.iterdir():
        tool.chmod(0o755)
