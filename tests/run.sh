#!/usr/bin/env bash
# Lint and tests, in the same environment as the quick start. Arguments go to pytest: bash tests/run.sh -k lora
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
source examples/environment.sh
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
