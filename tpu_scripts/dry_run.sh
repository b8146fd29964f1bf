# Sourced by the other scripts, after they have set USAGE.
# Takes --dry-run and --help out of the arguments; the others are left in ARGUMENTS.

DRY_RUN=false
ARGUMENTS=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=true ;;
    --help) echo "$USAGE"; exit 0 ;;
    *) ARGUMENTS+=("$argument") ;;
  esac
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
  local name
  for name in "$@"; do
    if [[ -z "${!name:-}" ]]; then
      echo "$(basename "$0"): $name is not set" >&2
      echo "$USAGE" >&2
      exit 2
    fi
  done
}

# The same command on every host of the slice, or on one: on_workers all 'command'
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}
