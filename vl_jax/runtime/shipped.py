"""The experiments that come with the package, by name: in a checkout, and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """Where their files are: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / "experiments"
    return inside if inside.is_dir() else _PACKAGE.parent / "experiments"


def names() -> tuple[str, ...]:
    """Their names, such as ``quickstart`` and ``ablations/balance``; none if the files are not there."""
    found = [path for pattern in ("*.py", "*/*.py") for path in folder().glob(pattern)]
    names = (path.relative_to(folder()).with_suffix("").as_posix() for path in found)
    return tuple(sorted(name for name in names if not name.endswith("__init__")))


def path_of(name: str) -> Path:
    """The file of an experiment; it need not exist."""
    return folder() / f"{name}.py"
