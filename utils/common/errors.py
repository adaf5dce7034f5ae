"""User errors: complete sentences, without a traceback, reported together, with exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

EXIT_CODE = 2


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


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints the messages of a `UserError` to stderr and exits with code 2."""
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("LOCAL_RANK", "0"))  # one rank per machine prints a shared error
        if rank == 0 or not error.on_every_rank:
            for message in error.errors:
                print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
