#!/usr/bin/env bash
# Everything a change must pass, from a fresh clone: environment, lint, format, types, fast tests.
# Usage: bash scripts/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_venv.sh

ensure_venv .venv '.[dev]' constraints.txt
run=.venv/bin/python

say "ruff"
"$run" -m ruff check .
"$run" -m ruff format --check .
say "mypy"
"$run" -m mypy
say "pytest"
# Two processes, each with one thread: more of them take less time on more cores, with -n 8.
"$run" -m pytest -n 2 --dist worksteal "$@"
