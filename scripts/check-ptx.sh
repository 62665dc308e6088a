#!/usr/bin/env bash
# Compiles the kernels of the tier, of gpu-check and of examples/gpu_kernel with NVIDIA's assembler, which needs no card: `ptxas` of a
# toolkit, or else the one that PyPI has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ptxas=$(command -v ptxas || true)
if [ -z "$ptxas" ]; then
    python3 -m pip -q download --no-deps -d "$work" 'nvidia-cuda-nvcc-cu12==12.9.*'
    python3 -m zipfile -e "$work"/*.whl "$work/wheel"
    ptxas=$work/wheel/nvidia/cuda_nvcc/bin/ptxas
    chmod +x "$ptxas"
fi
sed -n '/^const KERNELS: &str = "$/,/^";$/{//!p}' examples/gpu_kernel.rs >"$work/example.ptx"
grep -q 'entry vmem_add' "$work/example.ptx"
"$ptxas" --version | tail -1
for kernels in crates/vmem-gpu/src/pieces.ptx crates/vmem-gpu-check/src/kernels.ptx "$work/example.ptx"; do
    for card in sm_75 sm_80 sm_90; do
        "$ptxas" -arch="$card" "$kernels" -o "$work/out"
        echo "$(basename "$kernels") for $card: $(stat -c %s "$work/out") bytes"
    done
done
