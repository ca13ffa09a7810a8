#!/usr/bin/env bash
# Builds deploy/Dockerfile without docker, by buildah, and runs what it says with its own user and environment: ENTRYPOINT
# and CMD until HEALTHCHECK is content, one completion over HTTP, and STOPSIGNAL, after which it must end with 0.
#   scripts/check_image.sh [cpu|cuda] [OPTIONS FOR `buildah bud`]     # some GB and minutes; as root, or by `buildah unshare`
#   RUN_OPTIONS='--volume A:B …' scripts/check_image.sh …              # options for `buildah run`
# Where neither namespaces nor overlays can be had: BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs. Then the port is one of the
# machine's own: PORT=8123 takes another than CMD's 8000. The image stays in buildah's store: `buildah rmi treadle:cpu`.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-cpu}
shift || true
case $target in cpu | cuda) ;; *) echo "there is no target $target: cpu or cuda" >&2 && exit 2 ;; esac
read -ra run_options <<<"${RUN_OPTIONS:-}"

# OCI's own format knows no HEALTHCHECK.
buildah bud --format docker --file deploy/Dockerfile --target "$target" --tag "treadle:$target" "$@" .

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
mapfile -d '' server < <(setting Entrypoint && setting Cmd)
server=("${server[@]/#0.0.0.0:8000/0.0.0.0:$port}")
mapfile -d '' health < <(setting Healthcheck Test)
mapfile -d '' signal < <(setting StopSignal)
[ "${health[0]}" = CMD ]

# What happens inside. $1: the port, $2: the signal, $3: how many words the health check has; then it, then the server.
cat >"$work/inside.sh" <<'INSIDE'
set -eu
port=$1 signal=$2 count=$3
shift 3
health=("${@:1:count}") server=("${@:count+1}")
echo "user $(id -u):$(id -g), home $HOME, in $PWD: ${server[*]}"
if (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then echo "port $port is taken" >&2 && exit 1; fi
"${server[@]}" &
started=$!
trap 'kill -KILL "$started" 2>/dev/null || true' EXIT
until "${health[@]}"; do
    kill -0 "$started" || { echo "the server ended before it was healthy" >&2 && exit 1; }
    sleep 1
done
echo "healthy"
python - "http://127.0.0.1:$port/v1/completions" <<'P'
import json, sys, urllib.request
fields = {"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
asking = urllib.request.Request(sys.argv[1], json.dumps(fields).encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(asking, timeout=120))["choices"][0])
P
kill -s "$signal" "$started"
code=0
wait "$started" || code=$?
trap - EXIT
echo "$signal: ended with $code"
exit "$code"
INSIDE
buildah run "${run_options[@]}" --volume "$work/inside.sh:/inside.sh:ro" "$container" -- \
    bash /inside.sh "$port" "${signal[0]}" "$((${#health[@]} - 1))" "${health[@]:1}" "${server[@]}"
echo "ok: target $target was built and ran"
