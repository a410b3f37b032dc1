"""Settings of methods from text: "kd.distill.temperature=4" changes one value of one method."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from pycdgkd.errors import InputError

from .catalogue import find_method
from .method import Method


def chosen_methods(names: Sequence[str], overrides: Sequence[str]) -> tuple[Method, ...]:
    """Methods by name, their settings changed by "METHOD.KEY=VALUE".

    Raises ``InputError`` for an unknown method or key, naming the nearest, and for a value of
    another type than the default's.
    """
    methods = {name: find_method(name) for name in names}
    for text in overrides:
        path, sign, value = text.partition("=")
        name, dot, key = path.strip().partition(".")
        if not (sign and dot and key):
            raise InputError(
                "a setting must read METHOD.KEY=VALUE, as in kd.distill.temperature=4; "
                f"got '{text}'"
            )
        if name not in methods:
            find_method(name)
            raise InputError(
                f"'{text}' is a setting of {name}, which is not run; expected one of "
                f"{', '.join(methods)}; remedy: add it to --methods"
            )
        method = methods[name]
        settings = _changed(method.settings, key.split("."), value.strip(), text)
        methods[name] = dataclasses.replace(method, settings=settings)
    return tuple(methods.values())


def _changed(settings: Any, keys: Sequence[str], value: str, text: str) -> Any:
    known = [field.name for field in dataclasses.fields(settings)]
    if keys[0] not in known:
        near = difflib.get_close_matches(keys[0], known, n=1, cutoff=0.0) or ["none"]
        raise InputError(f"'{text}': unknown key '{keys[0]}'; nearest known: '{near[0]}'")
    default = getattr(settings, keys[0])
    if dataclasses.is_dataclass(default):
        if len(keys) == 1:
            raise InputError(f"'{text}': {keys[0]} has keys of its own; expected {text} with one")
        return dataclasses.replace(settings, **{keys[0]: _changed(default, keys[1:], value, text)})
    return dataclasses.replace(settings, **{keys[0]: _value(default, value, text)})


def _value(default: object, text: str, whole: str) -> object:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.casefold()]
        if isinstance(default, int | float | str):
            return type(default)(text)
    except (KeyError, ValueError):
        pass
    raise InputError(f"'{whole}': expected a value like {default!r}; got '{text}'")
