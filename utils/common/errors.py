"""Mistakes of the user, told in sentences: no traceback, exit code 2, everything that is wrong in one go."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

EXIT_CODE = 2


class UserError(ValueError):
    """One or more sentences for the user; each names the flag or the file and line, what was found, what is right.

    Args:
        errors: the sentence, or all of them.
        on_every_rank: every process finds the same errors, so that one need speak. False for what only one
            process can see, such as a loss that is not finite.
    """

    def __init__(self, errors: str | Iterable[str], on_every_rank: bool = True) -> None:
        self.errors = [errors] if isinstance(errors, str) else list(errors)
        self.on_every_rank = on_every_rank
        super().__init__("\n".join(self.errors))


Result = TypeVar("Result")


@dataclass
class CheckReport:
    """What a series of checks has found: errors, which end the run, and notes, which do not."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, check: Callable[..., Result], *args: Any) -> Result | None:
        """The result of a check, or None with its errors added."""
        try:
            return check(*args)
        except UserError as error:
            self.errors.extend(error.errors)
            return None


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` into its sentences on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("LOCAL_RANK", "0"))  # once a machine
        if rank == 0 or not error.on_every_rank:
            for fault in error.errors:
                print(f"error: {fault}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
