#!/usr/bin/env bash
# Runs one process on this machine, with all of its GPUs; the same on every host of a multi-host run.
set -euo pipefail

usage() {
  cat >&2 <<'EOF'
usage: launch/gpu_node.sh [--dry-run] [--hosts N --host-id I --coordinator HOST:PORT] -- --config=FILE [overrides]

  --hosts N                hosts in the run; start this script once on each
  --host-id I              which of them this is, 0 to N-1
  --coordinator HOST:PORT  an address of host 0 that all hosts reach, and a free port there
  --dry-run                print the commands and run nothing

PYTHON names the interpreter (default: python). Paths are relative to the repository.
EOF
  exit 2
}

# Words quoted so that a shell reads back exactly the same ones.
quote() {
  local word out="" single="'" escaped="'\"'\"'"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$single/$escaped}'" ;;
    esac
    out+="${out:+ }$word"
  done
  printf '%s\n' "$out"
}

is_number() { case $1 in "" | *[!0-9]*) return 1 ;; esac; }

dry_run=false hosts="" host_id="" coordinator="" separated=false
while [ $# -gt 0 ]; do
  case $1 in
    --) separated=true; shift; break ;;
    --dry-run) dry_run=true; shift ;;
    --hosts | --host-id | --coordinator)
      [ $# -ge 2 ] || usage
      case $1 in
        --hosts) hosts=$2 ;;
        --host-id) host_id=$2 ;;
        --coordinator) coordinator=$2 ;;
      esac
      shift 2 ;;
    *) echo "unknown argument: $1" >&2; usage ;;
  esac
done
$separated && [ $# -gt 0 ] || usage

# XLA_FLAGS: overlap communication with computation; flags the caller set come last and win.
# Memory: JAX takes 75 % of each GPU unless told otherwise. XLA_CLIENT_MEM_FRACTION replaces the deprecated
# XLA_PYTHON_CLIENT_MEM_FRACTION; jaxlib refuses both at once, so a caller's old name is left to stand alone.
settings=("XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}")
if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then
  settings+=("XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.9}")
fi

if [ -n "$hosts$host_id$coordinator" ]; then
  is_number "$hosts" && is_number "$host_id" && [ "$host_id" -lt "$hosts" ] ||
    { echo "--hosts N and --host-id I are needed together, with I below N" >&2; usage; }
  is_number "${coordinator##*:}" && [ -n "${coordinator%:*}" ] && [ "$coordinator" != "${coordinator##*:}" ] ||
    { echo "--coordinator takes HOST:PORT" >&2; usage; }
  settings+=("JAX_COORDINATOR_ADDRESS=$coordinator" "JAX_NUM_PROCESSES=$hosts" "JAX_PROCESS_ID=$host_id")
fi

$dry_run || command -v nvidia-smi >/dev/null ||
  { echo "no nvidia-smi here: this script is for machines with NVIDIA GPUs" >&2; exit 1; }

# Under Slurm JAX gives a task only the GPU of its own local number; name all of them, as there is one task per node.
if [ -n "${SLURM_LOCALID:-}" ] && [ -z "${JAX_LOCAL_DEVICE_IDS:-}" ]; then
  devices=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, - || true)}
  count=$(printf '%s' "$devices" | tr ',' '\n' | grep -c . || true)
  if [ "$count" -gt 0 ]; then settings+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((count - 1)))"); fi
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command=(env "${settings[@]}" "${PYTHON:-python}" -m mim_jax.main "$@")
if $dry_run; then
  quote cd "$root"
  quote "${command[@]}"
else
  cd "$root"
  exec "${command[@]}"  # exec: signals reach the trainer, which saves on SIGTERM
fi
