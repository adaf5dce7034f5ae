"""Captions and paths are UTF-8, whatever the locale. The launcher runs this file before it imports anything heavy."""

from __future__ import annotations

import os
import sys


def use_utf8() -> None:
    """Starts this program again in Python's UTF-8 mode if the locale has another encoding. Child processes use it too.

    The command line and every file without an explicit encoding are read as UTF-8 then.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for child processes; python -E ignores it
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
