"""Folders in buckets that a command was given: they are brought here for it, and what it wrote is sent."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vl_jax.runtime.storage import buckets, mirror

_RUNS = ("workdir",)  # options that name the folder of a run
_READ = ("model", "source")  # those that name what is only read
_MANY = ("sweep",)  # commands whose folders hold many runs


@contextlib.contextmanager
def brought(arguments: argparse.Namespace, lead: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Puts folders here into the arguments, in the place of those in buckets, while the context lasts.

    Args:
      lead: whether this is the process that writes.

    Raises:
      ValueError: the command cannot write into a bucket.
      OSError: a bucket cannot be reached.
    """
    given = {
        name: buckets.address(value) for name, value in vars(arguments).items() if isinstance(value, Path)
    }
    found = {name: place for name, place in given.items() if place is not None}
    with contextlib.ExitStack() as stack:
        for name, place in found.items():
            if arguments.command in _MANY or name not in (*_RUNS, *_READ):
                raise ValueError(
                    f"--{name.replace('_', '-')}={place}: {arguments.command} takes no folder in a bucket "
                    "here: mount the bucket, or copy afterwards"
                )
            setattr(arguments, name, _brought(place, stack, lead) if name in _RUNS else buckets.here(place))
        yield


def _brought(place: str, stack: contextlib.ExitStack, lead: Callable[[], bool]) -> Path:
    return stack.enter_context(mirror.folder_of(place, lead=lead()))
