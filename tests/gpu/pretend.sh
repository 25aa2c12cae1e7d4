#!/usr/bin/env bash
# The CPU's arithmetic behind device `cuda`: finds tensors on the wrong device and of the wrong dtype without a GPU.
# Builds the stand-in once (g++), then runs both quickstarts in fp16, text encoders, optimizers, and the whole GPU check
# with tiny models: the quickstarts in bf16, verify-resume, offload, quantised bases, whole runs under a memory limit.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PRETEND_CUDA_DIR="${PRETEND_CUDA_DIR:-$(mktemp -d)}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" CI=true
python="${PYTHON:-python3}"
test -e "$PRETEND_CUDA_DIR/libhooks.so" || "$python" tests/gpu/pretend_cuda.py build
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
try() {
  echo "== pretend CUDA: $*"
  "$python" tests/gpu/pretend_cuda.py run -m emotrain "$@" > "$runs/out" 2> "$runs/err" || { tail -30 "$runs/err"; exit 1; }
}
short=(--plain --runs-dir "$runs" --set train.max_steps=4 --set sample.steps=2 --set sample.every=4 --set save.every=2)
short+=(--set sample.at_start=false --set train.loss.baseline=raw)
for preset in quickstart quickstart-flux; do  # in bf16 the check runs them
  try run "$preset" "${short[@]}" --name "$preset-fp16" --set model.dtype=fp16
done
PRETEND_BF16=0 try run quickstart "${short[@]}" --name no-bf16
try run quickstart "${short[@]}" --name text --set network.text_encoder=true
try run quickstart "${short[@]}" --name checkpointed --set train.gradient_checkpointing=true --set train.gradient_accumulation_steps=2
try run quickstart "${short[@]}" --name beside --set sample.base=builtin:tiny-sd
PRETEND_FREE_GIB=0.62 try run quickstart "${short[@]}" --name in-turn --set sample.base=builtin:tiny-sd --set model.quantize=fp8
for optimizer in emoairy emocats emonavi; do
  try run quickstart "${short[@]}" --name "$optimizer" --set "train.optimizer=$optimizer" --set sample.every=0
done
echo "== pretend CUDA: copies of a checkpoint"
"$python" tests/gpu/pretend_cuda.py run tests/gpu/saves.py 2> "$runs/err" || { tail -30 "$runs/err"; exit 1; }
echo "== pretend CUDA: what a CUDA graph could not hold"
"$python" tests/gpu/pretend_cuda.py run tests/gpu/captures.py 2> "$runs/err" || { tail -30 "$runs/err"; exit 1; }
echo "== pretend CUDA: small models of the newer families"
"$python" tests/gpu/pretend_cuda.py run tests/gpu/families.py > "$runs/out" 2> "$runs/err" || { tail -30 "$runs/err"; exit 1; }
echo "== pretend CUDA: the check"
"$python" tests/gpu/pretend_cuda.py run tests/gpu/check.py --tiny --out "$runs/check.jsonl"
echo "pretend CUDA: all runs ended well"
