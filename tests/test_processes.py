"""The end of a training process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A thread that is still inside of torch when the interpreter exits, as a gloo thread may be.
THREAD_IN_TORCH = """
import atexit, sys, threading, torch
from utils.common.errors import UserError, exit_on_user_error
from utils.common.processes import exit_without_teardown

def add():
    tensor = torch.ones(100)
    while True:
        tensor + tensor

threading.Thread(target=add, daemon=True).start()
atexit.register(print, "registered")
with exit_without_teardown(), exit_on_user_error():
    {ending}
"""


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("raise UserError('wrong')", 2)])
def test_thread_in_torch_does_not_change_the_exit_code(ending, code):
    program = THREAD_IN_TORCH.format(ending=ending)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "registered" in result.stdout
    assert ("error: wrong" in result.stderr) == (code == 2)
    assert result.returncode == code, result.stderr
