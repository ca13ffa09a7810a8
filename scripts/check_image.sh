#!/usr/bin/env bash
# Builds deploy/Dockerfile without docker, by buildah, and runs what it says with its own user and environment: ENTRYPOINT's
# version, which must say that its scheduler is compiled; then ENTRYPOINT and CMD until HEALTHCHECK is content, one
# completion over HTTP, and STOPSIGNAL, after which it must end with 0.
#   scripts/check_image.sh [cpu|cuda] [OPTIONS FOR `buildah bud`]     # some GB and minutes; as root, or by `buildah unshare`
#   RUN_OPTIONS='--volume A:B …' scripts/check_image.sh …              # options for `buildah run`
# Where neither namespaces nor overlays can be had: BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs. Then the port is one of the
# machine's own: PORT=8123 takes another than CMD's 8000. The image stays in buildah's store: `buildah rmi treadle:cpu`.
# Nothing is waited for without a limit, in seconds: BUILD_SECONDS=3600 START_SECONDS=900 ANSWER_SECONDS=120 STOP_SECONDS=120.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-cpu}
shift || true
case $target in cpu | cuda) ;; *) echo "there is no target $target: cpu or cuda" >&2 && exit 2 ;; esac
read -ra run_options <<<"${RUN_OPTIONS:-}"

# OCI's own format knows no HEALTHCHECK.
build_seconds=${BUILD_SECONDS:-3600}
timeout --foreground "$build_seconds" \
    buildah bud --format docker --file deploy/Dockerfile --target "$target" --tag "treadle:$target" "$@" . || {
    code=$?
    [ "$code" -ne 124 ] || echo "the image was not built within $build_seconds s (BUILD_SECONDS)" >&2
    exit "$code"
}

container=$(buildah from "treadle:$target")
work=$(mktemp -d)
trap 'buildah rm "$container" >"$work/removed"; rm -rf "$work"' EXIT

# The words of a list in the image's settings, each ended by a zero byte.
setting() {
    buildah inspect --type image "treadle:$target" | python3 -c '
import json, sys
value = json.load(sys.stdin)["Docker"]["config"]
for name in sys.argv[1:]:
    value = value[name]
for word in [value] if isinstance(value, str) else value:
    print(word, end="\0")
' "$@"
}
port=${PORT:-8000}
mapfile -d '' entrypoint < <(setting Entrypoint)
mapfile -d '' command < <(setting Cmd)
server=("${entrypoint[@]}" "${command[@]/#0.0.0.0:8000/0.0.0.0:$port}")
mapfile -d '' health < <(setting Healthcheck Test)
mapfile -d '' signal < <(setting StopSignal)
[ "${health[0]}" = CMD ]

# An installation that nobody told to compile succeeds, too, and serves as well.
version=$(buildah run "${run_options[@]}" "$container" -- "${entrypoint[@]}" --version)
echo "$version"
[[ $version == *"scheduler compiled" ]] || { echo "the scheduler of treadle:$target is not compiled" >&2 && exit 1; }

# What happens inside. $1: the port, $2: the signal, $3: seconds for health, an answer and the end, $6: how many words the
# health check has; then it, then the server.
cat >"$work/inside.sh" <<'INSIDE'
set -eu
port=$1 signal=$2 start_seconds=$3 answer_seconds=$4 stop_seconds=$5 count=$6
shift 6
missing() { echo "$1" >&2 && exit 1; }
health=("${@:1:count}") server=("${@:count+1}")
echo "user $(id -u):$(id -g), home $HOME, in $PWD: ${server[*]}"
if (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then missing "port $port is taken"; fi
"${server[@]}" &
started=$!
trap 'kill -KILL "$started" 2>/dev/null || true' EXIT
SECONDS=0
until timeout 30 "${health[@]}"; do
    kill -0 "$started" || missing "the server ended before it was healthy"
    [ "$SECONDS" -lt "$start_seconds" ] || missing "the server was not healthy within $start_seconds s (START_SECONDS)"
    sleep 1
done
echo "healthy"
code=0
timeout "$answer_seconds" python - "http://127.0.0.1:$port/v1/completions" <<'P' || code=$?
import json, sys, urllib.request
fields = {"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
asking = urllib.request.Request(sys.argv[1], json.dumps(fields).encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(asking, timeout=3600))["choices"][0])
P
[ "$code" -ne 124 ] || missing "no completion came within $answer_seconds s (ANSWER_SECONDS)"
[ "$code" -eq 0 ] || missing "the completion failed with $code"
kill -s "$signal" "$started"
SECONDS=0
while kill -0 "$started" 2>/dev/null; do
    [ "$SECONDS" -lt "$stop_seconds" ] || missing "the server did not end within $stop_seconds s of $signal (STOP_SECONDS)"
    sleep 0.1
done
code=0
wait "$started" || code=$?
trap - EXIT
echo "$signal: ended with $code"
exit "$code"
INSIDE
buildah run "${run_options[@]}" --volume "$work/inside.sh:/inside.sh:ro" "$container" -- \
    bash /inside.sh "$port" "${signal[0]}" "${START_SECONDS:-900}" "${ANSWER_SECONDS:-120}" "${STOP_SECONDS:-120}" \
    "$((${#health[@]} - 1))" "${health[@]:1}" "${server[@]}"
echo "ok: target $target was built and ran"
