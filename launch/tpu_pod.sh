#!/usr/bin/env bash
# Runs the same command on every worker of a Cloud TPU slice; JAX finds the other workers by itself.
set -euo pipefail

usage() {
  cat >&2 <<'EOF'
usage: launch/tpu_pod.sh NAME ZONE [options] -- --config=FILE [overrides]
       launch/tpu_pod.sh NAME ZONE --setup [--repo URL] [options] [-- --config=FILE [overrides]]

  --project ID       Google Cloud project (default: that of gcloud's configuration)
  --workdir gs://... a bucket folder, passed on as --workdir: every worker must see it, and it outlives the slice
  --dir DIR          the repository on the workers, relative to the home folder (default: mim_jax)
  --env KEY[=VALUE]  an environment variable for the run; without =VALUE, its value here; may be repeated
  --setup            first make DIR/.venv on every worker and install the requirements and the TPU extra there
  --repo URL         with --setup: git clone URL to DIR on workers that have no DIR yet
  --python NAME      with --setup: the workers' Python, 3.11 or newer (default: python3)
  --dry-run          print the commands and run nothing
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

project="" workdir="" dir="mim_jax" setup=false repo="" python="python3" dry_run=false separated=false
names=() settings=()
while [ $# -gt 0 ]; do
  case $1 in
    --) separated=true; shift; break ;;
    --setup) setup=true; shift ;;
    --dry-run) dry_run=true; shift ;;
    --project | --workdir | --dir | --env | --repo | --python)
      [ $# -ge 2 ] && [ -n "$2" ] || usage
      case $1 in
        --project) project=$2 ;;
        --workdir) workdir=$2 ;;
        --dir) dir=$2 ;;
        --repo) repo=$2 ;;
        --python) python=$2 ;;
        --env)
          key=${2%%=*}
          case $key in "" | [0-9]* | *[!A-Za-z0-9_]*) echo "--env: '$key' is no variable name" >&2; usage ;; esac
          case $2 in
            *=*) settings+=("$2") ;;
            *) [ -n "${!key+set}" ] || { echo "--env: $key is not set here" >&2; usage; }
               settings+=("$key=${!key}") ;;
          esac ;;
      esac
      shift 2 ;;
    -*) echo "unknown option: $1" >&2; usage ;;
    *) names+=("$1"); shift ;;
  esac
done
[ ${#names[@]} -eq 2 ] || usage
$separated && [ $# -gt 0 ] || { $setup && ! $separated; } || usage
[ -z "$repo" ] || $setup || { echo "--repo needs --setup" >&2; usage; }

on_workers() {  # on_workers COMMAND: one shell command line, on every worker
  local command=(gcloud compute tpus tpu-vm ssh "${names[0]}" "--zone=${names[1]}")
  if [ -n "$project" ]; then command+=("--project=$project"); fi
  command+=(--worker=all "--command=$1")
  if $dry_run; then quote "${command[@]}"; else "${command[@]}"; fi
}

$dry_run || command -v gcloud >/dev/null || { echo "gcloud is not installed here" >&2; exit 1; }

if $setup; then
  steps=""
  if [ -n "$repo" ]; then steps="{ test -d $(quote "$dir") || git clone $(quote "$repo" "$dir"); } && "; fi
  steps+="cd $(quote "$dir")"
  steps+=" && { test -x .venv/bin/python || $(quote "$python") -m venv .venv; }"
  steps+=" && .venv/bin/python -m pip install -r requirements.txt -e '.[tpu]'"
  on_workers "$steps"
fi
if [ $# -gt 0 ]; then
  words=()
  if [ ${#settings[@]} -gt 0 ]; then words=(env "${settings[@]}"); fi
  words+=(.venv/bin/python -m mim_jax.main "$@")
  if [ -n "$workdir" ]; then words+=("--workdir=$workdir"); fi
  on_workers "cd $(quote "$dir") && $(quote "${words[@]}")"
fi
