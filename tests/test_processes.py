"""How a training process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A thread inside of torch when the interpreter goes away, as gloo's may be; for certain here.
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
def test_a_thread_in_torch_does_not_change_how_a_process_ends(ending, code):
    program = THREAD_IN_TORCH.format(ending=ending)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "registered" in done.stdout
    assert ("error: wrong" in done.stderr) == (code == 2)
    assert done.returncode == code, done.stderr
