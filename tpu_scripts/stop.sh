#!/usr/bin/env bash
# Asks the trainer on every host to save and stop, and waits for it; after STOP_MINUTES it is killed.
# The slices stay, and cost money: delete.sh gives them back.
set -euo pipefail
USAGE="usage: PROJECT=.. ZONE=.. TPU_NAME=.. [NUM_SLICES=1] [STOP_MINUTES=10]
  stop.sh [--dry-run]"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE TPU_NAME
number STOP_MINUTES 10
truth RELAUNCH false # set by babysit.sh, which goes on; what a person stops, it leaves alone
slices

# All hosts are asked before any is waited for: they agree on the step after which they stop. The trainer is
# in a session of its own, whose number is that of the shell around it.
# shellcheck disable=SC2016
ask='if [ -f train.pid ]; then kill -TERM -- -"$(cat train.pid)" 2>/dev/null || true; fi'
[[ "$RELAUNCH" == true ]] || ask="touch train.stopped; $ask"
on_workers all "$ask"
on_workers all "[ -f train.pid ] || { echo \"\$(hostname): nothing was launched\"; exit 0; }
pid=\$(cat train.pid)
for second in \$(seq $((60 * STOP_MINUTES))); do
  if [ -f train.exit ] || ! kill -0 \$pid 2>/dev/null; then break; fi
  sleep 1
done
if [ -f train.exit ]; then echo \"\$(hostname): ended with status \$(cat train.exit)\"; exit 0; fi
kill -KILL -- -\$pid 2>/dev/null
echo killed >train.exit
echo \"\$(hostname): killed, without saving\""
