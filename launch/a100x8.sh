#!/usr/bin/env bash
# One host with eight GPUs: the paper's HH-RLHF runs, or another configuration.
#
#   bash launch/a100x8.sh                                                  configs/hh_llama2_7b.yaml
#   bash launch/a100x8.sh configs/tldr_llama2_7b.yaml workdir=/data/tldr   another configuration, with overrides
#
# Edit or set: HF_TOKEN (the model is gated), workdir (hundreds of GB of checkpoints and models; launch/README.md).
# Run the same command again to resume after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh cuda12

export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # as mpo plan assumes; JAX's default: 0.75
config=configs/hh_llama2_7b.yaml
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
  config=$1
  shift
fi
exec .venv/bin/mpo run "$config" runtime.flags=recommended "$@"
