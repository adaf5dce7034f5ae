# Sourced by the quick start and the tests. Activates an environment (the current one, or .venv, which is created if
# needed) and installs the requirements. REQUIREMENTS names the file; default: requirements.txt.
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
    echo "error: Python 3.11 or newer is needed, this is $(python --version). If .venv was created with it, remove .venv." >&2
    exit 2
fi
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
echo "Installing $REQUIREMENTS into $(python -c 'import sys; print(sys.prefix)') ..."
if python -m pip --version >/dev/null 2>&1; then
    python -m pip install --quiet --disable-pip-version-check -r "$ROOT/$REQUIREMENTS"
elif command -v uv >/dev/null; then  # makes environments without pip
    uv pip install --quiet --python "$(command -v python)" -r "$ROOT/$REQUIREMENTS"
else
    echo "error: this environment has no pip. Run 'python -m ensurepip', or activate another environment." >&2
    exit 2
fi
