#!/usr/bin/env bash
# From nothing to a plan, launch files and a training run: needs Python 3.11 or newer and a package index.
# PYTHON chooses the interpreter, PLANNER_VENV the environment's folder, PLANNER_TORCH the torch to install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
venv="${PLANNER_VENV:-.venv}"
out="runs/quickstart"

say() { printf '\n== %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "quickstart: $python is older than 3.11: set PYTHON to a newer one" >&2
  exit 2
}

say "1. Install the package with its runtime extra into $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${PLANNER_TORCH:-torch==2.13.0}" ".[runtime]"
planner="$venv/bin/planner"
"$planner" --version

say "2. Plan Llama-3-70B on 8 nodes of 8 H100"
mkdir -p "$out"
"$planner" plan llama3-70b --hardware h100-sxm --nodes 8 --seq-len 8192 --global-batch 512 -o "$out/llama3-70b.json"

say "3. Write its launch files"
"$planner" emit "$out/llama3-70b.json" --launcher slurm --out "$out/llama3-70b" --force
"$planner" emit "$out/llama3-70b.json" --launcher torchrun --out "$out/llama3-70b" --force
"$planner" check "$out/llama3-70b.json"

say "4. Plan a tiny model for 4 processes on this CPU"
"$planner" plan examples/models/tiny.yaml --hardware local-cpu --gpus 4 --seq-len 256 --global-batch 16 \
  --precision fp32 -o "$out/tiny.json"

say "5. Train it for 20 steps with the bundled runtime, and compare"
"$planner" run "$out/tiny.json" --steps 20 --out "$out/tiny-run" --measure "$out/tiny-measured.json"
