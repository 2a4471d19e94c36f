"""Imports by name, whole files and printed lines, for every part. Standard library alone."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class MissingExtra(ImportError):
    """A package of an extra is not installed."""


def require(module: str, *packages: str) -> None:
    """Raise MissingExtra where packages of the extra `train` are not there; load none of them."""
    missing = [package for package in packages if not _found(package)]
    if missing:
        lacks = f"got no {', '.join(missing)}, expected the extra `train`"
        raise MissingExtra(f"{module}: {lacks}; pip install 'dgrpo[train]'")


def _found(package: str) -> bool:
    with suppress(ImportError, ValueError):  # of an import hook that blocks it, or a broken one
        return importlib.util.find_spec(package) is not None
    return False


def load_function(setting: str, path: str, home: str = "") -> Callable[..., Any]:
    """Import the function that a setting names.

    Args:
        path: "package.module:name" (installed, or in the current folder) or "folder/file.py:name".
        home: the module of a bare "name".

    Raises:
        ValueError: no such module, file or function; an error during its import.
    """
    where, _, name = path.rpartition(":")
    where = where or home
    if not where:
        raise ValueError(f'{setting}: got {path!r}, expected a known name or "module:function"')
    try:
        if where.endswith(".py"):
            module = _from_file(Path(where))
        else:
            if os.getcwd() not in sys.path:  # absent where the program is an installed command
                sys.path.append(os.getcwd())
            module = importlib.import_module(where)
    except Exception as error:
        text = "" if _absent(error, where) else "\n" + traceback.format_exc(limit=-3)
        what = f"but importing {where} failed: {error}{text}"
        raise ValueError(f"{setting}: got {path!r}, {what}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and n[0] != "_"]
        known = sorted(getattr(module, "__all__", known))
        what = f"but {where} has no function {name!r}"
        raise ValueError(f"{setting}: got {path!r}, {what}, expected one of {known}")
    return function


def _absent(error: Exception, where: str) -> bool:
    """Whether the module or file itself does not exist, so that no traceback is needed."""
    if where.endswith(".py"):
        return isinstance(error, OSError) and Path(error.filename or "") == Path(where).resolve()
    return isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}.")


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_from_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path to write to, which then takes the place of `path`: a kill leaves no half."""
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    os.replace(temporary, path)


def say(text: str) -> None:
    """Print a line at once, on rank 0. A terminal or a pipe that is gone is no error."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print(text, flush=True)
