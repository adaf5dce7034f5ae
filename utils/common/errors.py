"""User errors: complete sentences, without a traceback, reported together, with exit code 2."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from safetensors import SafetensorError

from utils.common.encoding import use_utf8

EXIT_CODE = 2
# Errors of the system that the user can resolve, wherever they occur.
SYSTEM_ERRORS = {
    errno.EACCES: "this user has no permission",
    errno.EPERM: "this user has no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOSPC: "no space is left on the disk; free some, or give a folder on another disk",
    errno.ENOMEM: "the host memory does not suffice",
    errno.EDQUOT: "the disk quota is used up; free some space, or give a folder on another disk",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """One or more messages for the user. Each names the flag, or the file and line, with its value and the fix.

    Args:
        errors: one message or several.
        on_every_rank: whether every rank raises the same error, so that one rank per machine prints it. False for
            errors of a single rank, such as a loss that is not finite.
    """

    def __init__(self, errors: str | Iterable[str], on_every_rank: bool = True) -> None:
        self.errors = [errors] if isinstance(errors, str) else list(errors)
        self.on_every_rank = on_every_rank
        super().__init__("\n".join(self.errors))


Result = TypeVar("Result")


@dataclass
class CheckReport:
    """Collects the results of several checks: errors, which stop the run, and notes, which do not."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, check: Callable[..., Result], *args: Any) -> Result | None:
        """Returns the result of a check. If the check raises a UserError, adds its errors and returns None."""
        try:
            return check(*args)
        except UserError as error:
            self.errors.extend(error.errors)
            return None


def details_of(error: OSError | SafetensorError) -> tuple[int, str | None]:
    """Returns the errno of an error, or 0, and the path that it concerns, or None."""
    if isinstance(error, OSError):
        path = error.filename2 or error.filename  # in rare cases a file descriptor, not a path
        return error.errno or 0, None if path is None else str(path)
    hidden = re.search(r"\(os error (\d+)\)", str(error))  # safetensors puts the errno into the text
    return int(hidden[1]) if hidden else 0, None


def describe_system_error(error: OSError | SafetensorError) -> str | None:
    """Returns a sentence about an error in `SYSTEM_ERRORS`; None for all others."""
    number, path = details_of(error)
    message = SYSTEM_ERRORS.get(number)
    if message is None or (path is None and number not in (*DISK_FULL, errno.ENOMEM)):
        return None
    return f"{path}: {message}." if path else f"{message[0].upper()}{message[1:]}."


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints the messages of a `UserError`, or of an error in `SYSTEM_ERRORS`, to stderr and exits with code 2.

    Every program runs inside this context, so it also sets the encoding of text.
    """
    use_utf8()
    threading.excepthook = _report_thread_error
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caption may hold characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        with _system_errors_as_user_errors():
            yield
    except UserError as error:
        rank = int(os.environ.get("LOCAL_RANK", "0"))  # one rank per machine prints a shared error
        if rank == 0 or not error.on_every_rank:
            for message in error.errors:
                print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)


def _report_thread_error(args: threading.ExceptHookArgs) -> None:
    """Prints an error in `SYSTEM_ERRORS` of a thread, such as that of TensorBoard, as a sentence."""
    if isinstance(args.exc_value, OSError) and (message := describe_system_error(args.exc_value)):
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        threading.__excepthook__(args)


@contextmanager
def _system_errors_as_user_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (message := describe_system_error(error)) is None:
            raise
        raise UserError(message, on_every_rank=False) from error
