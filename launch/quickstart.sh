#!/usr/bin/env bash
# Runs the whole method on the embedded toy data, on any machine: sets up .venv, runs every stage and writes the report.
#
#   bash launch/quickstart.sh [key=value ...]     overrides of configs/quickstart.yaml, e.g.  seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/mpo run configs/quickstart.yaml "$@"
