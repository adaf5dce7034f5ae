# Sourced by the quick start and the tests: the active virtual environment, or .venv, with the requirements in it.
if [[ -z "${VIRTUAL_ENV:-}" && "${CONDA_DEFAULT_ENV:-base}" == base ]]; then
    [[ -x "$ROOT/.venv/bin/python" ]] || python3 -m venv "$ROOT/.venv"
    source "$ROOT/.venv/bin/activate"
fi
if ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, this is $(python --version)." >&2
    exit 2
fi
echo "Installing requirements.txt into $(python -c 'import sys; print(sys.prefix)') ..."
python -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
