#!/usr/bin/env bash
# Checks correctness and speed on one GPU in under 9 minutes; writes Markdown and JSON.
#
#   bash launch/gpu_check.sh [FOLDER]        default: runs/gpu_check
#
# PYTHON names the interpreter (default: .venv/bin/python, else python3) of an environment with jax and its CUDA plugin.
# Without a GPU it prints a note and exits with status 0. Each part has its own time limit; if a part fails, the failure
# is recorded, the other parts still run, and the exit status is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

out=${1:-runs/gpu_check}
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null 2>&1 || python=python3
mkdir -p "$out"
report=$out/RESULTS.md
export PYTHONPATH=. XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

platform=$("$python" -c 'import jax; print(jax.default_backend())' 2>"$out/backend.log") || platform=none
if [ "$platform" != gpu ]; then
  echo "gpu_check: no GPU that JAX can use (backend: $platform; see $out/backend.log); nothing was run"
  exit 0
fi

status=0
# shellcheck disable=SC2016 # the quotes in the format are Markdown's
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "gpu_check: $name"
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    printf '\n## %s (%d s)\n\n```\n%s\n```\n' "$name" $((SECONDS - begin)) "$(tail -n 40 "$out/$name.log")" >>"$report"
  else
    local code=$?
    status=1
    printf '\n## %s: FAILED, status %d (%d s)\n\n```\n%s\n```\n' "$name" "$code" $((SECONDS - begin)) \
      "$(tail -n 40 "$out/$name.log")" >>"$report"
  fi
}

{
  printf '# GPU check, %s\n\n```\n' "$(date -u +%Y-%m-%d)"
  git rev-parse HEAD 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  "$python" -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.__version__, jax.devices())'
  printf '```\n'
} >"$report"

llama_1b=(model.architecture.hidden_size=2048 model.architecture.intermediate_size=8192
  model.architecture.num_layers=16 model.architecture.num_heads=32 model.architecture.num_kv_heads=8
  model.architecture.head_dim=64 model.architecture.max_positions=2048)
bench() { # NAME SECONDS WORKLOAD... OPTION...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -c 'from mpo_jax.cli import main; main()' bench "$@" --vocab 32000 \
    --json "$out/$name.json" "${llama_1b[@]}"
}

part correctness 130 "$python" tests/benchmarks/on_accelerator.py
part attention 60 "$python" -m tests.benchmarks.attention_kernels
bench train_1b 120 sft dpo --batch 8 --steps 5 --rows 512+512
bench decode_1b 90 generate --batch 64 --steps 2 --rows 128+256
bench ppo_1b 110 ppo --batch 8 --steps 3 --rows 256+256
cat "$report"
exit $status
