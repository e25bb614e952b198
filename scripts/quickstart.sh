#!/usr/bin/env bash
# From a fresh clone to a picture: installs hf_soap, trains a small model with AdamW and with SOAP, plots both.
# Usage: bash scripts/quickstart.sh [arguments for `hf-soap compare`]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_venv.sh

ensure_venv .venv '.[cli,plot]' constraints.txt

# Threads that wait for work spin by default, which takes minutes longer where other programs want the cores as well.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

output=outputs/quickstart
say "training with adamw and with soap"
.venv/bin/hf-soap compare adamw soap --output-dir "$output" "$@"

say "done"
find "$output" -name '*.png' -exec echo "plot:       {}" \;
find "$output" -type d -name 'checkpoint-*' -exec echo "checkpoint: {}" \;
