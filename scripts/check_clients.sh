#!/usr/bin/env bash
# lm-eval and AIPerf against our gateway. Each has an environment of its own: they bring hundreds of packages, and take
# minutes to install, so they are no part of the suite.
#   scripts/check_clients.sh [DIRECTORY FOR THE ENVIRONMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
where=${1:-.venv/clients}
export PYTHONPATH=$PWD

ready() {
    local name=$1
    shift
    [ -e "$where/$name/.ready" ] && return 0
    "${TREADLE_PYTHON:-python3}" -m venv "$where/$name"
    "$where/$name/bin/pip" install --quiet --disable-pip-version-check "$@"
    touch "$where/$name/.ready"
}

ready lmeval 'lm-eval[api]==0.4.13' 'transformers>=5,<6'
ready aiperf 'aiperf==0.13.0'
exec "${PYTHON:-.venv/bin/python}" scripts/check_clients.py \
    --lm-eval "$where/lmeval/bin/lm_eval" --aiperf "$where/aiperf/bin/aiperf"
