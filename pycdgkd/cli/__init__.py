"""The command ``pycdgkd``: one line per error, never a traceback for what a user can mend.

Exit status: 0 done, 2 bad input (files, options, configuration, missing extras), 130 interrupted by
Ctrl-C, 143 by SIGTERM; ``doctor`` exits with 1 if the core does not work. A defect of the program
itself keeps its traceback. This package imports neither torch nor numpy; each command imports what
it needs.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pycdgkd.errors import InputError

from .parser import parse_arguments

__all__ = ["main"]

_INPUT_STATUS = 2
_INTERRUPT_STATUS = 130
_TERMINATED_STATUS = 143

# What the operating system says about files that the user named, and what the user can do.
_FILE_REMEDIES = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "a folder was expected here; check the path",
    errno.EISDIR: "a file was expected here, but this is a folder; check the path",
    errno.EACCES: "permission denied; choose another path or change its permissions",
    errno.EROFS: "this file system cannot be written; choose another path",
    errno.ENOSPC: "no space left on the device; free some, then run the same command again",
}


def _fail(message: str) -> int:
    print(f"pycdgkd: error: {' '.join(message.split())}", file=sys.stderr)
    return _INPUT_STATUS


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the same order as Ctrl-C does."""


@contextmanager
def _orderly_termination() -> Iterator[None]:
    """Let SIGTERM raise; only a main thread can, and a signal that is ignored stays so."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before != signal.SIG_DFL:
        yield
        return

    def terminate(_signal: int, _frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (``argv`` defaults to the process's arguments) and return its exit status."""
    hint = "run the same command again"
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        hint = arguments.after_interrupt
        with _orderly_termination():
            status: int = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(f"\npycdgkd: interrupted; {hint}", file=sys.stderr)
        return _TERMINATED_STATUS if isinstance(interrupt, _Terminated) else _INTERRUPT_STATUS
    except BrokenPipeError:
        # The reader (head, less) has gone; without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _FILE_REMEDIES or error.filename is None:
            raise
        return _fail(f"{error.filename}: {_FILE_REMEDIES[error.errno]}")
