#!/usr/bin/env bash
# Installs torch into the environment of the given python: the CPU build where no NVIDIA GPU is there (plain `torch`
# brings gigabytes of CUDA), a build that still supports the GPU where there is one.
set -euo pipefail
python=$1
version=2.13.0

if "$python" -c 'import torch' 2>/dev/null; then
    exit 0
fi
if command -v nvidia-smi >/dev/null && capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) \
    && [ -n "$capability" ]; then
    # Pascal and older need CUDA 12.6 builds: later ones were compiled without them.
    backend=$([ "${capability%%.*}" -lt 7 ] && echo cu126 || echo auto)
else
    backend=cpu
fi
if [ "$backend" = cpu ] && "$python" -m pip install --quiet "torch==$version+cpu" 2>/dev/null; then
    exit 0 # a configured index or folder has the CPU build
fi
"$python" -m pip install --quiet uv
"$python" -m uv pip install --quiet --python "$python" --torch-backend "$backend" "torch==$version" ||
    "$python" -m pip install "torch==$version"
