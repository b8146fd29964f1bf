"""Parts of an experiment in files of one's own, named ``path/to/file.py:Name``.

A routing scheme, an encoder, a head, an objective, a metric: wherever a built-in part can be named, a part in
a user's file can be named too. The file is run once as a module; no file of the package is touched. It may
import its neighbours, as a Python script may.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import os
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Generic, TypeVar

from vl_jax.runtime import errors

T = TypeVar("T")
_PREFIX = "vl_jax_file:"  # of the names under which files are in ``sys.modules``


def find(spec: str, known: Iterable[str], *, kind: str, expected: str = "a class") -> Any:
    """What ``path/to/file.py:Name`` names.

    Args:
      known: the built-in names, for the message.
      kind: of the part, ``scheme`` for example, for the message.
      expected: what the name should stand for, for the message.

    Raises:
      ValueError: the spec has another form, there is no such file or name, or the file fails; one line.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        hint = f"write {spec}:name" if spec.endswith(".py") else near(spec, known)
        raise ValueError(f"{kind}={spec!r}: no built-in {kind}, and not path/to/file.py:name; {hint}")
    if not Path(path).is_file():
        raise ValueError(f"{kind}={spec!r}: no file {path}")
    found = getattr(load_file(Path(path), where=f"{kind}={spec!r}"), name, None)
    if found is None:
        raise ValueError(f"{kind}={spec!r}: expected {expected}, found nothing of that name")
    return found


def load_file(path: Path, *, where: str) -> ModuleType:
    """A file run as a module, once; it may itself build configs that name its parts.

    Args:
      where: what names the file, for messages.

    Raises:
      ValueError: the file raises an error; one line with its place.
    """
    path = path.resolve()
    before = sys.modules.get(f"{_PREFIX}{path}") or _imported(path)
    if before is not None:
        return before
    try:
        return run_file(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: {errors.in_file(path, error, name=errors.shown(path))}") from error


def run_file(path: Path) -> ModuleType:
    """Runs a file as a module that ``spec_of`` and ``find`` know; raises whatever the file raises."""
    name = f"{_PREFIX}{path.resolve()}"
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # behind all others: its neighbours hide nothing
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    before = sys.modules.get(name)
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def _imported(path: Path) -> ModuleType | None:
    """The module that another file has imported from this one by its plain name."""
    name = str(path)
    return next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == name), None)


def spec_of(part: Any) -> str:
    """The name of a built-in class or function; ``path/to/file.py:Name`` of one in a user's file.

    The path is relative to the current folder where the file lies in it.
    """
    module = part.__module__
    if module.startswith(_PREFIX):
        path = module.removeprefix(_PREFIX)
    elif module.partition(".")[0] == __name__.partition(".")[0]:
        return part.__qualname__
    else:
        path = getattr(sys.modules.get(module), "__file__", None)
        if path is None:  # of a notebook
            return part.__qualname__
    here = os.path.relpath(path)
    return f"{path if here.startswith('..') else here}:{part.__qualname__}"


class Portable(Generic[T]):
    """A value on its way to another process, which first runs the files that the value needs.

    Pickle knows a class by its module, and a process that has just begun has none of a user's files.
    """

    def __init__(self, value: T):
        """Takes the value, which is ``.value`` on the other side too."""
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        noting = _NotingFiles(buffer)
        noting.dump(self.value)
        return _arrive, (tuple(sorted(noting.files)), buffer.getvalue())


class _NotingFiles(pickle.Pickler):
    """Notes the users' files in which what it writes is defined."""

    def __init__(self, buffer: io.BytesIO):
        super().__init__(buffer)
        self.files: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        module = getattr(obj, "__module__", None)
        if isinstance(obj, type | FunctionType) and isinstance(module, str) and module.startswith(_PREFIX):
            self.files.add(module.removeprefix(_PREFIX))
        return NotImplemented


def _arrive(files: tuple[str, ...], pickled: bytes) -> Portable[Any]:
    for file in files:
        load_file(Path(file), where=file)
    return Portable(pickle.loads(pickled))


def near(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}there are: {', '.join(known)}"
