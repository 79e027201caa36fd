# Sourced by the scripts beside it: the checkout's own .venv, made when missing, quick when there.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
# Where it is set, as in many containers, each program started here would compile torch anew.
unset PYTHONDONTWRITEBYTECODE

# The first Python that has venv and is new enough for the export extra.
find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        # A name on PATH may be a shim that points nowhere: believe only one that runs.
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python >= 3.11 with the venv module on PATH; install one" \
        "(Debian, Ubuntu: apt install python3-venv) and run this again." \
        "Running a bundle, without exporting one, works on 3.10: pip install ." >&2
    return 2
}

# ensure_venv EXTRA...: .venv with this checkout and these extras. Stamps, one an extra, are keyed
# by what decides the set of packages, so the second run installs nothing.
ensure_venv() {
    local python key stamps extra missing="" start=$SECONDS
    if [[ ! -x $venv/bin/python ]]; then
        python=$(find_python) || return
        "$python" -m venv "$venv" || return
    elif ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: $venv does not hold a working Python >= 3.11; remove it and run this again" >&2
        return 2
    fi
    key=$(cat "$root/pyproject.toml" "$root/tools/constraints.txt" | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')
    stamps=$venv/.gap-export/$key
    for extra in "$@"; do
        [[ -e $stamps/$extra ]] || missing=yes
    done
    [[ -n $missing ]] || return 0
    local wanted
    wanted=$(IFS=,; echo "$*")
    echo "installing gap-export[$wanted] into ${venv#"$PWD"/} (once; some minutes)" >&2
    # --no-compile: most modules of torch are never imported, so compiling them all is wasted time.
    "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check \
        --constraint "$root/tools/constraints.txt" --editable "$root[$wanted]" >&2 || return
    mkdir -p "$stamps" || return
    for extra in "$@"; do
        touch "$stamps/$extra"
    done
    echo "installed in $((SECONDS - start)) s" >&2
}
