"""Errors that a user can put right, and the line of the user's own file that led to one.

The command line prints them as one line; the functions of the package raise them as ``UserError``.
"""

from __future__ import annotations

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = os.path.realpath(Path(__file__).parent.parent)
_LIBRARIES = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")})
_INSTALLED = {"site-packages", "dist-packages"}
_LONGEST = 2000  # characters of a line; libraries put whole listings into a message


class UserError(ValueError):
    """What a user can put right: the message is one line that says what is wrong and what is allowed."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What goes wrong within by a user's value or in a user's file is raised as ``UserError``.

    Faults of the package itself pass as they are.

    Raises:
      UserError: the one line that ``one_line`` makes.
    """
    try:
        yield
    except Exception as error:
        text = one_line(error)
        if text is None:
            raise
        raise UserError(text) from error


def one_line(error: BaseException) -> str | None:
    """What the user is told of an error; None where the error is a fault of the package.

    If a file of the user's own is involved, the line begins with the place in that file.
    """
    place, text = place_of(error), " ".join(str(error).split())[:_LONGEST]
    if place is not None:
        file, line = place
        if f"{Path(file).name}:{line}" in text:
            return text
        return f"{shown(file)}:{line}: {described(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package != "vl_jax":
            return f"{text}: install it, with pip install {package.replace('_', '-')}"
    return (text or type(error).__name__) if isinstance(error, (ValueError, OSError)) else None


def described(error: BaseException) -> str:
    """Kind and message of an error in one line; a message made for users stands alone."""
    text = " ".join(str(error).split())[:_LONGEST]
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_of(error: BaseException) -> tuple[str, int] | None:
    """File and line in a file of the user's own, the one nearest to where the error arose.

    Where the error itself did not pass through such a file, the error that it was made of is looked at.
    """
    seen: set[int] = set()
    chained: BaseException | None = error
    while chained is not None and id(chained) not in seen:
        seen.add(id(chained))
        if isinstance(chained, SyntaxError) and chained.lineno and _is_own(chained.filename or ""):
            return chained.filename or "", chained.lineno
        frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(chained.__traceback__)]
        own = [(file, line) for file, line in frames if _is_own(file)]
        if own:
            return own[-1]
        chained = chained.__cause__ or chained.__context__
    return None


def in_file(path: str | Path, error: BaseException, *, name: str) -> str:
    """A file of the user's, the line of it that led to an error, and the error.

    Where another file of the user's is nearer to where the error arose, that place is said.

    Args:
      name: the path of the file as the message should have it.
    """
    text, place = described(error), place_of(error)
    if place is None:
        return f"{name}: {text}"
    file, line = place
    if os.path.realpath(file) == os.path.realpath(path):
        return f"{name}:{line}: {text}"
    known = f"{Path(file).name}:{line}" in text
    return f"{name}: {text}" if known else f"{name}: {shown(file)}:{line}: {text}"


def shown(file: str | Path) -> str:
    """The path of a file for messages: relative to the current folder where the file lies in it."""
    here = os.path.relpath(os.path.realpath(file), os.path.realpath(os.curdir))
    return os.path.realpath(file) if here.startswith(os.pardir) else here


def _is_own(file: str) -> bool:
    """Whether a file is the user's: neither of this package, nor of Python, nor installed."""
    if file.startswith("<") or not os.path.isfile(file):
        return False
    real = os.path.realpath(file)
    if any(real.startswith(folder + os.sep) for folder in (_PACKAGE, *_LIBRARIES)):
        return False
    return not _INSTALLED & {*Path(real).parts, *Path(os.path.abspath(file)).parts}
