# Sourced by the other scripts: makes .venv once, and again when pyproject.toml changes. Says clearly what failed.
# usage: . scripts/setup.sh [extra]

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
extra=${1:-}

fail() {
    printf 'treadle: %s\n' "$1" >&2
    exit 1
}

find_python() {
    for candidate in "${TREADLE_PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null || continue
        printf '%s' "$candidate"
        return 0
    done
    return 1
}

setup() {
    local python stamp log
    python=$(find_python) || fail "Python 3.11 or newer is needed, and none was found (set TREADLE_PYTHON to one)"
    stamp=".venv/.treadle-$(cat pyproject.toml scripts/setup.sh | cksum | tr ' ' '-')-${extra:-base}"
    [ -e "$stamp" ] && return 0
    "$python" -m venv .venv || fail "$python -m venv failed (on Debian: apt install python3-venv)"
    log=.venv/setup.log
    printf 'treadle: installing into .venv (a few minutes the first time; log in %s)\n' "$log" >&2
    if ! .venv/bin/python -m pip install --disable-pip-version-check -e ".${extra:+[$extra]}" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "installing failed: a package index must be reachable (see above and $log); nothing was changed outside .venv"
    fi
    rm -f .venv/.treadle-*-"${extra:-base}"
    touch "$stamp"
}

setup
