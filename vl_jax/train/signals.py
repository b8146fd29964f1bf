"""What signals do to a run: the first asks it to save and stop, Ctrl-C after that ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vl_jax.runtime.hosts.joined import Hosts

# Of a terminal that was closed, of a scheduler or ``kill``, of Ctrl-C.
ASKING = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGTERM", "SIGINT") if hasattr(signal, name))
_SHOW_CURSOR = b"\x1b[?25h"  # a live progress line hides it


@contextlib.contextmanager
def noted(hosts: Hosts | None = None) -> Iterator[Callable[[], int | None]]:
    """Notes signals instead of dying of them; gives a function that tells the first one's number.

    On several hosts SIGTERM is jax's, which makes all of them stop after the same step; the other signals
    that ask are passed on as SIGTERM, and what they were is told to all.

    A closed terminal sends SIGHUP more than once, and schedulers repeat SIGTERM: only Ctrl-C ends a run that
    is stopping. ``nohup`` ignores SIGHUP, and it stays ignored. In a thread other than the main one, signals
    do what they did before.
    """
    first: list[int] = []

    def note(number: int, _: Any) -> None:
        if not first:
            first.append(number)
            if hosts is not None:
                hosts.ask(number)
                signal.raise_signal(signal.SIGTERM)
        elif number == signal.SIGINT:
            _end(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    theirs = {signal.SIGTERM} if hosts is not None else set()
    numbers = [n for n in ASKING if n not in theirs and not (ignored and n == signal.SIGHUP)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: first[0] if first else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int) -> None:
    """Ends the process, whatever it waits for; a session that a person types in goes on."""
    if hasattr(sys, "ps1"):
        raise KeyboardInterrupt
    screen = _screen()
    for stream in (1, screen):
        if os.isatty(stream):
            os.write(stream, _SHOW_CURSOR)
    # Not by print: this may run in the middle of one.
    os.write(screen, b"\nended at once, without saving; run again to resume from the last checkpoint\n")
    os._exit(128 + number)


def _screen() -> int:
    """Where messages go: on several hosts, what is written to 2 goes to a file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2
