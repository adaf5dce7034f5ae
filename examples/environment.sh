# Sourced by the quick start and the tests. Uses the active virtual environment, or makes .venv, and installs the file
# named by REQUIREMENTS into it: requirements.txt unless the caller sets another.
if [[ -z "${VIRTUAL_ENV:-}" && "${CONDA_DEFAULT_ENV:-base}" == base ]]; then
    if [[ ! -x "$ROOT/.venv/bin/python" ]]; then
        for PYTHON in python3 python3.11 python3.12 python3.13; do
            command -v "$PYTHON" >/dev/null && "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && break
        done
        "$PYTHON" -m venv "$ROOT/.venv"
    fi
    source "$ROOT/.venv/bin/activate"
fi
if ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, this is $(python --version); remove .venv if it was made with it." >&2
    exit 2
fi
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
echo "Installing $REQUIREMENTS into $(python -c 'import sys; print(sys.prefix)') ..."
python -m pip install --quiet --disable-pip-version-check -r "$ROOT/$REQUIREMENTS"
