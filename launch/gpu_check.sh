#!/usr/bin/env bash
# Checks correctness and speed on one GPU; writes Markdown and JSON.
#
#   bash launch/gpu_check.sh [FOLDER [GROUP...]]        default: runs/gpu_check, all groups
#
# Groups: kernels (numbers of whole stages and of the attention kernels), full (SFT, DPO, PPO and decoding of models of 1B
# and 135M parameters), adapters (the same training with LoRA), run (all stages of the toy world by a model of 135M). Each
# takes less than 9 minutes, for machines that limit a command's time: RESULTS-GROUP.md then holds what was named.
#
# PYTHON names the interpreter (default: .venv/bin/python, else python3) of an environment with jax and its CUDA plugin.
# MODEL is a checkpoint for the group run, such as launch/get_smollm2.sh's; without it the weights are random.
# Without a GPU it prints a note and exits with status 0. Each part has its own time limit; if a part fails, the failure
# is recorded, the other parts still run, and the exit status is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

out=${1:-runs/gpu_check}
groups=(kernels full adapters run)
chosen=("${@:2}")
for group in "${chosen[@]}"; do
  case " ${groups[*]} " in
    *" $group "*) ;;
    *)
      echo "gpu_check: no group $group; there are ${groups[*]}" >&2
      exit 2
      ;;
  esac
done
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null 2>&1 || python=python3
mkdir -p "$out"
report=$out/RESULTS$(printf -- '-%s' "${chosen[@]:-}" | sed 's/-$//').md
[ ${#chosen[@]} -gt 0 ] && groups=("${chosen[@]}")
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

size() { # HIDDEN MLP LAYERS HEADS KV_HEADS: sets `sized` to the options of a Llama with heads of 64
  local name
  sized=(model.architecture.head_dim=64 model.architecture.max_positions=2048)
  for name in hidden_size intermediate_size num_layers num_heads num_kv_heads; do
    sized+=("model.architecture.$name=$1")
    shift
  done
}
# Llama 3.2's 1B and SmolLM2's 135M, which share the head with the embedding
size 2048 8192 16 32 8
size_1b=("${sized[@]}")
size 576 1536 30 9 3
size_135m=("${sized[@]}")
lora=(model.adapter.rank=16 model.adapter.alpha=32)
mpo=("$python" -c 'from mpo_jax.cli import main; main()')
bench() { # NAME SECONDS WORKLOAD... OPTION...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "${mpo[@]}" bench "$@" --json "$out/$name.json"
}

kernels() {
  part correctness 130 "$python" tests/benchmarks/on_accelerator.py
  part attention 60 "$python" -m tests.benchmarks.attention_kernels
}
full() {
  bench train_1b 110 sft dpo --batch 8 --steps 5 --rows 512+512 --vocab 128256 "${size_1b[@]}"
  bench train_135m 70 sft dpo --batch 16 --steps 5 --rows 512+512 --vocab 49152 "${size_135m[@]}"
  bench ppo_1b 110 ppo --batch 8 --steps 3 --rows 256+256 --vocab 128256 "${size_1b[@]}"
  bench ppo_135m 80 ppo --batch 32 --steps 3 --rows 256+256 --vocab 49152 "${size_135m[@]}"
  bench decode_1b 80 generate --batch 64 --steps 2 --rows 128+256 --vocab 128256 "${size_1b[@]}"
  bench decode_1b_one 60 generate --batch 1 --steps 2 --rows 128+256 --vocab 128256 "${size_1b[@]}"
}
adapters() {
  bench train_1b_lora 110 sft dpo --batch 8 --steps 5 --rows 512+512 --vocab 128256 "${size_1b[@]}" "${lora[@]}"
  bench train_135m_lora 70 sft dpo --batch 16 --steps 5 --rows 512+512 --vocab 49152 "${size_135m[@]}" "${lora[@]}"
  bench ppo_1b_lora 110 ppo --batch 8 --steps 3 --rows 256+256 --vocab 128256 "${size_1b[@]}" "${lora[@]}"
  bench ppo_135m_lora 80 ppo --batch 32 --steps 3 --rows 256+256 --vocab 49152 "${size_135m[@]}" "${lora[@]}"
}
run() {
  local model=("${size_135m[@]}")
  [ -n "${MODEL:-}" ] && model=("model.path=$MODEL")
  rm -rf "$out/run"
  part run_135m 400 "${mpo[@]}" run configs/quickstart.yaml "workdir=$out/run" data.toy.num_demonstrations=4000 \
    data.toy.num_pairs=4000 data.toy.num_test=100 select.num_prompts=2000 sft.train.steps=100 'experiment=[mpo]' \
    sft.train.optim.learning_rate=3e-4 reward.train.optim.learning_rate=1e-4 dpo.train.optim.learning_rate=2e-5 \
    ppo.train.optim.learning_rate=2e-5 ppo.critic_optim.learning_rate=5e-5 "${model[@]}"
}

for group in "${groups[@]}"; do
  case $group in
    kernels) kernels ;;
    full) full ;;
    adapters) adapters ;;
    run) run ;;
  esac
done
cat "$report"
exit $status
