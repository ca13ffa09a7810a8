# Sourced by the other scripts: makes .venv once, and again when pyproject.toml changes. Says clearly what failed.
# usage: . scripts/setup.sh [extra]

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
extra=${1:-}

fail() {
    printf 'treadle: %s\n' "$1" >&2
    exit 1
}

fits() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null
}

find_python() {
    if [ -n "${TREADLE_PYTHON:-}" ]; then
        fits "$TREADLE_PYTHON" || fail "TREADLE_PYTHON is $TREADLE_PYTHON, which is not a Python 3.11 or newer"
        printf '%s' "$TREADLE_PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if fits "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, and there is none ($(python3 --version 2>&1 || true)); set TREADLE_PYTHON to one"
}

# why LOG CODE: what a failed pip was short of, by what it said itself
why() {
    if grep -qiE 'no space left on device|disk quota exceeded' "$1"; then
        printf 'the disk is full (torch and what it needs take some GB here, and as much in %s meanwhile)' "${TMPDIR:-/tmp}"
    elif [ "$2" -ge 128 ] || grep -q 'MemoryError' "$1"; then
        printf 'pip was ended (exit code %s): probably there was too little memory' "$2"
    elif grep -qE 'Permission denied|Read-only file system' "$1"; then
        printf 'a file or directory may not be written (see above)'
    elif grep -qE 'requires a different Python|Requires-Python|none of the wheels match|not a supported wheel' "$1"; then
        printf '%s has no packages to match: set TREADLE_PYTHON to another version of Python' "$3"
    elif grep -qE 'NewConnectionError|name resolution|Name or service not known|Network is unreachable|Connection refused|ConnectTimeout|ReadTimeout|ProxyError|SSLError|CERTIFICATE_VERIFY|Max retries|timed out' "$1"; then
        printf 'the package index cannot be reached: this machine is offline, or needs a proxy (HTTPS_PROXY) or an index of its own (PIP_INDEX_URL)'
    elif grep -qE 'No matching distribution|Could not find a version' "$1"; then
        printf 'the package index has no such package for %s: set TREADLE_PYTHON to another Python, or PIP_INDEX_URL to another index' "$3"
    else
        printf 'pip failed, and said why above'
    fi
}

# name_clone SITE: the clone's own directory is named treadle, too. Beside it Python would take that for the package, which
# pip's editable finder comes too late to prevent. A path on which only the package lies does. It is no link in SITE: a plain
# `pip install .` would write through that one, into the clone.
name_clone() {
    [ -n "$1" ] || fail ".venv/bin/python does not say where its packages are"
    [ ! -L "$1/treadle" ] || rm "$1/treadle"
    mkdir -p .venv/clone
    ln -sfn "$root/treadle" .venv/clone/treadle
    printf '%s\n' "$root/.venv/clone" >"$1/treadle-clone.pth"
}

setup() {
    local python stamp log code=0
    python=$(find_python) || exit 1
    stamp=".venv/.treadle-$(cat pyproject.toml scripts/setup.sh | cksum | tr ' ' '-')-${extra:-base}"
    [ -e "$stamp" ] && return 0
    "$python" -m venv .venv || fail "$python -m venv failed and said why above (on Debian it needs: apt install python3-venv)"
    log=.venv/setup.log
    printf 'treadle: installing into .venv (a few minutes the first time; log in %s)\n' "$log" >&2
    # Beside sources that are edited nothing is compiled, so pip need not fetch what that takes.
    TREADLE_COMPILE=0 .venv/bin/python -m pip install --disable-pip-version-check -e ".${extra:+[$extra]}" >"$log" 2>&1 || code=$?
    if [ "$code" -ne 0 ]; then
        [ "$code" -ne 130 ] || exit 130
        printf 'pip said:\n' >&2
        { grep -iE '^ *error: ' "$log" | grep -v subprocess-exited | tail -n 5; } >&2 || tail -n 15 "$log" >&2
        fail "installing failed: $(why "$log" "$code" "$("$python" --version 2>&1)"). The log is $log; nothing was changed outside .venv, so just run this again"
    fi
    name_clone "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    rm -f .venv/.treadle-*-"${extra:-base}"
    touch "$stamp"
}

trap 'exit 130' INT
setup
trap - INT
