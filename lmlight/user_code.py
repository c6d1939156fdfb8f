"""Classes that a user names: `--model.net my.module.MyNet`. Nothing else imports code from outside lmlight."""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from lmlight.errors import UserError

T = TypeVar("T")


def subclasses(base: type[T]) -> dict[str, type[T]]:
    """All classes derived from `base` that have been imported, by full name; of several with one name, the last."""
    found: dict[str, type[T]] = {}
    for kind in base.__subclasses__():
        found |= {full_name(kind): kind, **subclasses(kind)}
    return found


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_class_name(value: str | None) -> bool:
    """Whether a value is the name of a class, not a file."""
    if not value or value.endswith((".json", ".model", ".yaml", ".yml")) or not re.fullmatch(r"[\w.]+", value):
        return False
    return not Path(value).is_file()


def import_class(flag: str, name: str, base: type[T]) -> type[T]:
    """Import a class that the user names.

    Args:
        flag: where it is named, for messages.
        name: `my.module.MyClass`, or the last part of the name of a class that has been imported.
        base: what the class is derived from.

    Raises:
        UserError: there is no such module or class, the module cannot be imported, or the class is not derived from `base`.
    """
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        known = {kind.__name__: kind for kind in (base, *subclasses(base).values()) if not inspect.isabstract(kind)}
        if name in known:
            return known[name]
        raise UserError(f"{flag} {name}: expected {_one_of(known)}, or a class's full name, such as my.module.{name}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            places = "in the current folder or among the installed packages"
            raise UserError(f"{flag} {name}: there is no module {error.name} {places}") from None
        place = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        raise UserError(f"{flag} {name} cannot be imported: {type(error).__name__}: {error} ({where})") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        there = [kind.__name__ for kind in subclasses(base).values() if kind.__module__ == module.__name__]
        instead = f"; it has {_one_of(there)}" if there else ""
        problem = f"is not derived from {base.__name__}" if found is not None else f"is not in {module_name}{instead}"
        raise UserError(f"{flag} {name}: {class_name} {problem}")
    if inspect.isabstract(found):
        methods = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise UserError(f"{flag} {name}: {class_name} does not implement {methods}")
    return found


def _one_of(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))
