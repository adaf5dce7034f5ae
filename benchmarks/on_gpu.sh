#!/usr/bin/env bash
# Tests and measures everything on one NVIDIA GPU, in at most eight minutes. Each result is saved as soon as it is there.
#
#   bash benchmarks/on_gpu.sh                      what is not in the results yet, in the order of its worth
#   bash benchmarks/on_gpu.sh row/5b-lora --again  only items whose names contain row/5b-lora, even if they are there
#   bash benchmarks/on_gpu.sh --rehearse           the same on a CPU, with tiny models
#
# The results are in benchmarks/results/<GPU>/results.jsonl and tests.log; --results names another folder. Failed items
# keep their traceback there and are repeated once the commit has changed. COMMIT names the commit outside of a git
# checkout. PyTorch and the packages of requirements-dev.txt must be installed for python3; what is missing is named at
# the start. Then:
#
#   python -m benchmarks.decide     prints the constants that follow from the results
#   python -m benchmarks.tables     writes the tables of the documentation
set -euo pipefail
if ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "python3 ($(command -v python3)) has no PyTorch. Install PyTorch and requirements-dev.txt for it." >&2
    exit 1
fi
if [[ -n "${PYTHONPATH:-}" ]]; then  # its relative folders are those of the caller
    PYTHONPATH=$(python3 -c 'import os; print(os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(":"))))')
    export PYTHONPATH
fi
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
export MISSING_REQUIREMENTS_NAMED=true  # by on_gpu; an item that lacks one fails by itself
exec python3 -m benchmarks.on_gpu "$@"
