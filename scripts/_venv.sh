# Sourced by the other scripts, from the root of the checkout: a Python that is new enough, and virtual environments
# that are built once and reused while what they were built from stays the same.
#
# Honours $PYTHON (the interpreter to build with) and pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...).

say() { printf '\n==> %s\n' "$*"; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints the interpreter to build with. The first candidates are the versions that constraints.txt was resolved for.
find_python() {
    local candidate found
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    found=$("${PYTHON:-python3}" --version 2>&1) || found="none"
    echo "hf_soap needs Python 3.11 or newer, got ${PYTHON:-python3}: $found;" \
        "install a newer Python or name one: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# ensure_venv FOLDER WHAT CONSTRAINTS: FOLDER holds `pip install -e WHAT` under the pins of the file CONSTRAINTS.
# Editable, so that a later `git pull` needs no new installation.
ensure_venv() {
    local folder=$1 what=$2 constraints=$3 python base stamp record
    python=$(find_python) || return 1
    # A venv that was copied along with its checkout still points at the old one, hence the path.
    base="$("$python" --version) in $PWD"
    if [ "$(cat "$folder/.base" 2>/dev/null)" != "$base" ] || ! is_new_enough "$folder/bin/python"; then
        say "building $folder: $base"
        if ! "$python" -m venv --clear "$folder"; then
            echo "$python -m venv failed; on Debian and Ubuntu the module comes with: apt-get install python3-venv" >&2
            return 1
        fi
        echo "$base" >"$folder/.base"
    fi
    stamp=$(cat pyproject.toml "$constraints" | cksum)
    record="$folder/.installed$(printf '%s' "$what" | tr -c 'a-z' '-')"
    if [ "$(cat "$record" 2>/dev/null)" = "$stamp" ]; then
        say "$folder is up to date"
        return
    fi
    say "installing $what into $folder (minutes, the first time)"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e "$what" || return 1
    # Written last: an interrupted installation is taken up again by the next call.
    echo "$stamp" >"$record"
}
