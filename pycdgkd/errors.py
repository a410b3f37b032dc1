"""The error that the command line shows as one line, and the door to optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Bad input from outside (a file, an option, a data set), told in one line.

    The message names what is wrong, what was expected, what was found and the remedy. The command
    line prints it without a traceback and exits with status 2.
    """


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise an ``InputError`` naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise InputError(
            f"this needs the package '{module.split('.')[0]}', which is not installed; "
            f'remedy: pip install "pycdgkd[{extra}]"'
        ) from error
