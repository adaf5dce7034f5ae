#!/usr/bin/env bash
# Lint and tests, in the same environment as the quick start. Arguments go to pytest: bash tests/run.sh -k lora
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
source examples/environment.sh
ruff check .
ruff format --check .
mypy
# Most of the time goes into starting programs, which keep one core busy: two at a time, with one thread each.
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist worksteal "$@"
