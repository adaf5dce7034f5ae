#!/usr/bin/env bash
# Lint, types and tests, in the environment that examples/environment.sh makes or finds.
#
#   bash tests/run.sh            every test that this machine can run
#   bash tests/run.sh --fast     without the tests marked slow: for every commit, under 3 minutes
#   bash tests/run.sh -k lora    other arguments go to pytest
set -euo pipefail
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$ROOT"
SELECTED=()
if [[ "${1:-}" == --fast ]]; then
    SELECTED=(-m "not slow")
    shift
fi
REQUIREMENTS=requirements-dev.txt
source examples/environment.sh
ruff check .
ruff format --check .
mypy
# Most tests start programs that keep one core busy, so two tests run at a time with one thread each.
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist worksteal "${SELECTED[@]}" "$@"
