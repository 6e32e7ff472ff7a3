#!/usr/bin/env bash
# Sets up .venv with the test extra and runs the tests.
#
#   bash launch/test.sh [pytest option ...]     e.g.  -k dpo    -n 8
#
# Without -m, tests marked "thorough", "processes", "parity" and "plan" are left out: see CONTRIBUTING.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh test
exec .venv/bin/python -m pytest -n 2 "$@"
