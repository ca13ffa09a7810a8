#!/usr/bin/env bash
# Builds the FlashInfer kernels that the engine calls, on a machine that has nvcc but no GPU.
#
#     scripts/build_flashinfer.sh OUT [HEAD_DIM...]          default head sizes: 128 64
#
# OUT/<module>/<module>.so are then found through TREADLE_FLASHINFER_MODULES=OUT. They need apache-tvm-ffi at run time
# and neither flashinfer-python nor a compiler, and do not depend on torch's ABI. FlashInfer itself would also find them
# in site-packages/flashinfer/data/aot. Per head size two modules, bfloat16, Hopper only:
#   FA3 prefill: paged, causal (with and without one schedule for all heads)
#   FA2 decode:  paged, no mask, 16-row query tiles (what tensor-core decoding of up to 16 grouped heads picks)
# Everything else of FlashInfer's modules (ragged, other masks, larger tiles) is replaced by stubs that return
# cudaErrorNotSupported: that is what makes a build take minutes and not an hour.
#
# PYTHON: a Python with torch (any build) and pip. MAX_JOBS: parallel compilations. WORK: where to unpack and compile.
set -euo pipefail
OUT=$(mkdir -p "${1:?usage: build_flashinfer.sh OUT [HEAD_DIM...]}" && cd "$1" && pwd)
shift
HEAD_DIMS=${*:-128 64}
PYTHON=${PYTHON:-python3}
WORK=${WORK:-$(mktemp -d)}
export MAX_JOBS=${MAX_JOBS:-1} CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} FLASHINFER_CUDA_ARCH_LIST=9.0a
export FLASHINFER_WORKSPACE_BASE=$WORK FLASHINFER_LOGGING_LEVEL=warning
mkdir -p "$WORK/site" "$WORK/stubs"
if [ ! -d "$WORK/site/flashinfer" ]; then
  "$PYTHON" -m pip install -q --no-deps --target "$WORK/site" flashinfer-python==0.6.18.post1 apache-tvm-ffi==0.1.15.post2 \
    nvidia-ml-py requests tqdm filelock jinja2 markupsafe packaging urllib3 idna certifi charset-normalizer
fi
# FlashInfer's headers include cuRAND's, which a small toolkit lacks.
if [ ! -f "$CUDA_HOME/include/curand_kernel.h" ] && [ ! -d "$WORK/curand" ]; then
  "$PYTHON" -m pip install -q --no-deps --target "$WORK/curand" nvidia-curand==10.4.0.35
fi
export FLASHINFER_EXTRA_CUDAFLAGS=-I$WORK/curand/nvidia/cu13/include
# It may lack the driver's link stub, too; the driver's symbols are there at run time.
echo | gcc -shared -fPIC -x c - -Wl,-soname,libcuda.so.1 -o "$WORK/stubs/libcuda.so"
export FLASHINFER_EXTRA_LDFLAGS="-L$WORK/stubs" PYTHONPATH=$WORK/site
nice -n 19 "$PYTHON" - "$OUT" $HEAD_DIMS <<'PY'
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from flashinfer.jit import gen_batch_prefill_module

OUT = Path(sys.argv[1])
BF16, INT32 = torch.bfloat16, torch.int32
FA3_STUBS = """
#include <flashinfer/attention/mask.cuh>
#include "batch_prefill_sm90_config.inc"
namespace flashinfer {
template <uint32_t QK, uint32_t VO, MaskMode M, bool WINDOW, bool SAME, typename Variant, typename Params>
cudaError_t BatchPrefillWithPagedKVCacheDispatched(Params&, bool, cudaStream_t) { return cudaErrorNotSupported; }
template <uint32_t QK, uint32_t VO, MaskMode M, bool WINDOW, bool SAME, typename Variant, typename Params>
cudaError_t BatchPrefillWithRaggedKVCacheDispatched(Params&, bool, cudaStream_t) { return cudaErrorNotSupported; }
#define STUB(KIND, MASK, SAME, PARAMS)                                                                       \\
  template cudaError_t BatchPrefillWith##KIND##KVCacheDispatched<HEAD_DIM_QK, HEAD_DIM_VO, MaskMode::MASK, \\
      USE_SLIDING_WINDOW, SAME, DefaultAttention<USE_LOGITS_SOFT_CAP>, PARAMS>(PARAMS&, bool, cudaStream_t);
#define BOTH(KIND, MASK, PARAMS) STUB(KIND, MASK, true, PARAMS) STUB(KIND, MASK, false, PARAMS)
BOTH(Paged, kNone, PagedParams) BOTH(Paged, kCustom, PagedParams) BOTH(Paged, kMultiItemScoring, PagedParams)
BOTH(Ragged, kNone, RaggedParams) BOTH(Ragged, kCausal, RaggedParams)
BOTH(Ragged, kCustom, RaggedParams) BOTH(Ragged, kMultiItemScoring, RaggedParams)
}  // namespace flashinfer
"""
FA2_STUBS = """
#include <flashinfer/attention/mask.cuh>
#include "batch_prefill_config.inc"
namespace flashinfer {
template <uint32_t TILE, uint32_t QK, uint32_t VO, PosEncodingMode POS, bool F16, MaskMode M, typename V, typename P>
cudaError_t BatchPrefillWithPagedKVCacheDispatched(P, typename P::DTypeO*, float*, bool, cudaStream_t) {
  return cudaErrorNotSupported;
}
template <uint32_t TILE, uint32_t QK, uint32_t VO, PosEncodingMode POS, bool F16, MaskMode M, typename V, typename P>
cudaError_t BatchPrefillWithRaggedKVCacheDispatched(P, typename P::DTypeO*, float*, bool, cudaStream_t) {
  return cudaErrorNotSupported;
}
#define STUB(KIND, TILE, MASK, P)                                                                            \\
  template cudaError_t BatchPrefillWith##KIND##KVCacheDispatched<TILE, HEAD_DIM_QK, HEAD_DIM_VO,           \\
      POS_ENCODING_MODE, USE_FP16_QK_REDUCTION, MaskMode::MASK,                                              \\
      DefaultAttention<MaskMode::MASK == MaskMode::kCustom, USE_SLIDING_WINDOW, USE_LOGITS_SOFT_CAP, false>, \\
      P>(P, P::DTypeO*, float*, bool, cudaStream_t);
#define LARGE(KIND, MASK, P) STUB(KIND, 32, MASK, P) STUB(KIND, 64, MASK, P) STUB(KIND, 128, MASK, P)
#define ALL(KIND, MASK, P) STUB(KIND, 16, MASK, P) LARGE(KIND, MASK, P)
LARGE(Paged, kNone, PagedParams)
ALL(Paged, kCausal, PagedParams) ALL(Paged, kCustom, PagedParams) ALL(Paged, kMultiItemScoring, PagedParams)
ALL(Ragged, kNone, RaggedParams) ALL(Ragged, kCausal, RaggedParams)
ALL(Ragged, kCustom, RaggedParams) ALL(Ragged, kMultiItemScoring, RaggedParams)
}  // namespace flashinfer
"""


def only_small_tiles(source: str) -> str:
    """An instantiation file of FlashInfer's without the query tiles of 64 and 128 rows."""
    head, *parts = source.split("template cudaError_t ")
    small = [part.split(";")[0] + ";" for part in parts if "/*CTA_TILE_Q=*/16," in part]
    return head + "\n".join("template cudaError_t " + part for part in small) + "\n}  // namespace flashinfer\n"


def trimmed(backend: str, head_dim: int):
    """FlashInfer's own recipe for a module, with only what the engine calls."""
    spec = gen_batch_prefill_module(
        backend, BF16, BF16, BF16, INT32, head_dim, head_dim, 0, False, False, False
    )
    directory = spec.sources[0].parent
    kernel = "paged_sm90_kernel_mask_1" if backend == "fa3" else "paged_kernel_mask_0"
    keep = [path for path in spec.sources if "kernel_mask" not in path.name or kernel in path.name]
    if backend == "fa2":
        instance = next(path for path in keep if "kernel_mask" in path.name)
        instance.write_text(only_small_tiles(instance.read_text()))
    stubs = directory / "stubs.cu"
    stubs.write_text(FA3_STUBS if backend == "fa3" else FA2_STUBS)
    spec.sources = [*keep, stubs]
    return spec


for head_dim in map(int, sys.argv[2:]):
    for backend in ("fa2", "fa3"):
        began = time.time()
        spec = trimmed(backend, head_dim)
        spec.build(verbose=True)
        target = OUT / spec.name / f"{spec.name}.so"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(spec.jit_library_path, target)
        subprocess.run(["strip", "--strip-unneeded", target], check=True)
        print(f"{target.name}: {target.stat().st_size >> 10} KiB in {time.time() - began:.0f} s", flush=True)
PY
