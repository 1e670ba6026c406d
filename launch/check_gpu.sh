#!/usr/bin/env bash
# Measures on this machine's card what the project claims of it, in under 8 minutes, into one JSON: see experiments/check_gpu.py.
# PYTHON names the interpreter (default: python3); arguments are those of experiments.check_gpu, such as --out=FILE or --toy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m experiments.check_gpu "$@"
