#!/usr/bin/env bash
# Wheels for a GPU machine that has torch and reaches no network: wheels.sh FOLDER [PYTHON_VERSION, default 3.12]
# In FOLDER: what torch's own images lack, in the versions of constraints.txt; of bitsandbytes the library for one CUDA alone
# (CUDA=130 is that of torch 2.11), which makes 60 MB 4. There: pip install --no-index --no-deps --target site FOLDER/*.whl
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?"which folder?"} version=${2:-3.12} cuda=${CUDA:-130}
mkdir -p "$out"
pinned() { grep -i "^$1==" "$here/../../constraints.txt" || echo "$1"; }
platforms=()
for number in 28 27 24 17; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
get() { "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" -d "$out" "$@"; }
get "$(pinned diffusers)" "$(pinned pydantic)" annotated-types typing-inspection "$(pinned sentencepiece)" "$(pinned bitsandbytes)"
core=$(unzip -p "$out"/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: \(pydantic.core==[0-9.]*\).*/\1/p')
get "$core"
wheel=$(ls "$out"/bitsandbytes-*.whl)
zip -q -d "$wheel" $(unzip -Z1 "$wheel" | grep -E '\.so$' | grep -vE "cpu\.so|cuda$cuda\.so") || true
ls -l "$out"
du -sh "$out"
