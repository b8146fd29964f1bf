"""A bucket that is mounted, as far as its files show it: no folder can be renamed there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def refuse(monkeypatch, error: int) -> None:
    """From now on folders cannot be renamed, as where a bucket is mounted; files can."""
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def renamed(source, target, *rest, original=original, **more):
            if os.path.isdir(source):
                raise OSError(error, os.strerror(error), str(source))
            return original(source, target, *rest, **more)

        monkeypatch.setattr(os, name, renamed)


@contextmanager
def refusing(error: int) -> Iterator[None]:
    """``refuse`` for as long as the context lasts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        refuse(monkeypatch, error)
        yield
