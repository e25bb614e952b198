#!/usr/bin/env bash
# test.sh plus the slow tests, and those in which transformers has a part once more with the oldest supported version.
# Usage: bash scripts/test_full.sh [--no-oldest] [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_venv.sh

oldest=true
if [ "${1:-}" = --no-oldest ]; then
    oldest=false
    shift
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
summaries=()

# summarize FOLDER: remembers what pytest's own summary in the log says about the environment FOLDER.
summarize() {
    local versions result
    versions=$("$1/bin/python" - <<'PY'
import os
import platform
from importlib.metadata import version

print(f"{os.cpu_count()} CPU cores, Python {platform.python_version()}", *(f"{name} {version(name)}" for name in ("torch", "transformers")), sep=", ")
PY
    )
    result=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E '[0-9]+ (passed|failed|errors?|skipped).* in [0-9.]+s' | tail -n 1 |
        sed 's/^=* *//; s/ *=*$//') || true
    summaries+=("$versions: ${result:-stopped before the summary of pytest}")
}

# Both environments have the same torch, and nothing in these imports transformers.
arithmetic=(tests/{linalg,rules,engine} tests/checkpoint/test_{state_machine,optimizer_state,reshard}.py tests/config/test_param_groups.py tests/optimizers/test_{long_runs,properties,optimizers,bad_input}.py)

failed=0
bash scripts/test.sh --slow "$@" 2>&1 | tee "$log" || failed=1
summarize .venv

if $oldest; then
    ensure_venv .venv-oldest '.[dev]' constraints-oldest.txt
    say "pytest with the oldest supported transformers"
    .venv-oldest/bin/python -m pytest -n 2 --dist worksteal --slow "${arithmetic[@]/#/--ignore=}" "$@" 2>&1 | tee "$log" || failed=1
    summarize .venv-oldest
fi

say "summary"
for summary in "${summaries[@]}"; do
    echo "- $(date +%F), commit $(git rev-parse --short HEAD 2>/dev/null || echo none), $summary"
done
exit $failed
