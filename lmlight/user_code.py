"""Classes that a user names, as in `--model.net my.module.MyNet`, and exceptions in their code.

Other classes that flags and config files name, such as callbacks, are imported by jsonargparse.
"""

import importlib
import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lmlight import files
from lmlight.errors import UserError

T = TypeVar("T")
# folders of code that is not the user's, besides installed packages
LIBRARIES = Path(__file__).parent, sysconfig.get_path("stdlib")


def subclasses(base: type[T]) -> dict[str, type[T]]:
    """All imported classes derived from `base`, by full name. If several have the same name, the last one wins."""
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
    """Import a class derived from `base` that the user names.

    Args:
        flag: where it is named, for messages.
        name: `my.module.MyClass`, or the last part of the name of a class that has been imported.

    Raises:
        UserError: there is no such module or class, the module cannot be imported, or the class is not derived from `base`.
    """
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        known = {kind.__name__: kind for kind in (base, *subclasses(base).values()) if not inspect.isabstract(kind)}
        if name in known:
            return known[name]
        expected = " or ".join(sorted(known))
        raise UserError(f"{flag} {name}: expected {expected}, or a class's full name, such as my.module.{name}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            places = "in the current folder or among the installed packages"
            raise UserError(f"{flag} {name}: there is no module {error.name} {places}") from None
        raise UserError(f"{flag} {name} cannot be imported: {describe(error)}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        there = sorted(kind.__name__ for kind in subclasses(base).values() if kind.__module__ == module.__name__)
        instead = f"; it has {', '.join(there)}" if there else ""
        problem = f"is not derived from {base.__name__}" if found is not None else f"is not in {module_name}{instead}"
        raise UserError(f"{flag} {name}: {class_name} {problem}")
    return found


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise any exception in the block, which runs user code, as a `UserError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An exception in one line: its class, its message or the line that raised it, and where that is in the user's code."""
    frame = user_frame(error)
    place = error if isinstance(error, SyntaxError) else frame
    message = error.msg if isinstance(error, SyntaxError) else str(error) or (frame.line if frame else "")
    where = f" ({files.shown(place.filename or '')}, line {place.lineno})" if place else ""
    return f"{type(error).__name__}{message and ': '}{message}{where}"


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost traceback frame in user code; None if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        is_installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        if not (
            is_installed or any(path.is_relative_to(folder) for folder in LIBRARIES) or frame.filename.startswith("<")
        ):
            return frame
    return None
