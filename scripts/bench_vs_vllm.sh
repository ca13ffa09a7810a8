#!/usr/bin/env bash
# Ours and vLLM beside each other: one machine, one run, one table of ratios with the physical limits.
#
#     scripts/bench_vs_vllm.sh OUT_DIRECTORY MODEL_DIRECTORY
#
# MODEL_DIRECTORY holds a config.json; the weights are random on both sides. Environment:
#   VLLM_SITE      where vLLM is installed, put on PYTHONPATH for it alone (unset: it is importable as it is)
#   VLLM_BENCH     its benchmark: bench_vllm_offline.py, the same modes and definitions as scripts/bench_gpu.py
#   VLLM_ENV       a file to source for it alone
#   DATASET        JSON lines [input length, output length], or uniform-1k
#   MODES TP BATCHES TTFT REPEATS     as in bench_gpu.py --help
#   OURS_ARGS THEIRS_ARGS             more arguments for either
#   ROUNDS         times that both are run, alternating (default 1); the table takes medians over all
#   SKIP           "ours" or "vllm": use what OUT_DIRECTORY already has of it
#   BASE_TP        measure ours with this group size, too, and print what TP brings over it
set -uo pipefail
OUT=${1:?usage: bench_vs_vllm.sh OUT_DIRECTORY MODEL_DIRECTORY}
MODEL=${2:?usage: bench_vs_vllm.sh OUT_DIRECTORY MODEL_DIRECTORY}
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3} MODES=${MODES:-throughput,latency,ttft} TP=${TP:-1} ROUNDS=${ROUNDS:-1} SKIP=${SKIP:-}
BATCHES=${BATCHES:-1,8,32,64,128,256} TTFT=${TTFT:-512,2048,8192,32768} REPEATS=${REPEATS:-2}
mkdir -p "$OUT"
if [ "${DATASET:-uniform-1k}" = uniform-1k ]; then
  DATASET=$OUT/uniform-1k.jsonl
  (cd "$ROOT/scripts" && "$PYTHON" -c 'import bench_gpu
for pair in bench_gpu.dataset("uniform-1k", 0): print(list(pair))') >"$DATASET"
fi
NUM_PROMPTS=${NUM_PROMPTS:-$(wc -l <"$DATASET")}
common=(--model-config "$MODEL" --modes "$MODES" --batch-sizes "$BATCHES" --ttft-lens "$TTFT" --repeats "$REPEATS"
  --num-prompts "$NUM_PROMPTS")

ours() {
  PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$ROOT/scripts/bench_gpu.py" "${common[@]}" \
    --tensor-parallel-size "$TP" --dataset "$DATASET" --json "$OUT/ours.jsonl" ${OURS_ARGS:-} \
    >>"$OUT/ours.log" 2>&1 || { echo "ours failed:"; tail -n 25 "$OUT/ours.log"; }
}

theirs() (
  [ -z "${VLLM_ENV:-}" ] || . "$VLLM_ENV"
  [ -z "${VLLM_SITE:-}" ] || export PYTHONPATH=$VLLM_SITE
  "$PYTHON" "${VLLM_BENCH:?}/bench_vllm_offline.py" "${common[@]}" --tp "$TP" \
    --dataset-lens "$DATASET" --out "$OUT/vllm.jsonl" ${THEIRS_ARGS:-} >>"$OUT/vllm.log" 2>&1 ||
    { echo "vLLM failed:"; tail -n 25 "$OUT/vllm.log"; }
)

base() (TP=$BASE_TP && ours)

"$PYTHON" "$ROOT/scripts/gpu_limits.py" --json "$OUT/limits.json"
for _ in $(seq "$ROUNDS"); do
  [ "$SKIP" = ours ] || ours
  [ -z "${BASE_TP:-}" ] || base
  [ "$SKIP" = vllm ] || theirs
done
"$PYTHON" "$ROOT/scripts/compare_gpu.py" --ours "$OUT/ours.jsonl" --theirs "$OUT/vllm.jsonl" \
  --limits "$OUT/limits.json" --model-config "$MODEL" --tensor-parallel-size "$TP" \
  --dataset "$DATASET" ${BASE_TP:+--speed-up-over "$BASE_TP"} | tee "$OUT/table.md"
