#!/usr/bin/env bash
# The single-GPU set: GPT-2 124M and 1.5B and Llama 1B in bf16, predicted against measured peaks, and each kernel against its
# rivals, each call well under ten minutes.
#
#   benchmarks/gpu/run.sh CALL [FOLDER]     CALL: gpt2-124m | gpt2-1.5b | llama-1b | peak | kernels | all     FOLDER: where JSON goes
#
# On one GPU there is nothing to shard: what is measured is that the one line costs nothing (plain JAX against stage 3), and the
# tokens per second beside published ones (llm.c on one H100: 124M 468k, 1.5B 47k).
# Needs a Python with jax for the GPU, flax, optax and rich: PYTHON=... names it.
set -euo pipefail

call=${1:?"usage: $0 gpt2-124m|gpt2-1.5b|llama-1b|peak|kernels|all [FOLDER]"}
folder=${2:-${OUT:-build/gpu}}
python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
mkdir -p "$folder"

bench() {
  local name=$1
  shift
  "$python" -m jzero.bench --model "$name" --devices 1 --precision bf16 --json "$folder/$name.json" "$@" | tee "$folder/$name.txt"
}

# Remat and batch as the memory of an 80 GB device allows for plain JAX and stage 3 one after the other.
gpt2_124m() { bench gpt2-124m --stage 3 --batch 32 --seq 1024 --steps 60; }
gpt2_1_5b() { bench gpt2-1.5b --stage 3 --batch 8 --seq 1024 --steps 30 --remat full; }
llama_1b() { bench llama-1b --stage 3 --batch 4 --seq 4096 --steps 30 --remat full; }

peak() { "$python" benchmarks/gpu/predicted_peak.py --json "$folder/predicted_peak.json" | tee "$folder/predicted_peak.txt"; }

kernels() { "$python" -m pallas_kernels.bench --json "$folder/kernels.json" | tee "$folder/kernels.txt"; }

case $call in
  gpt2-124m) gpt2_124m ;;
  gpt2-1.5b) gpt2_1_5b ;;
  llama-1b) llama_1b ;;
  peak) peak ;;
  kernels) kernels ;;
  all) gpt2_124m && gpt2_1_5b && llama_1b && peak && kernels ;;
  *)
    echo "unknown call '$call': gpt2-124m, gpt2-1.5b, llama-1b, peak, kernels or all" >&2
    exit 2
    ;;
esac
