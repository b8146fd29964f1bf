"""A watch over a run that stands still: it writes down where every thread is, and in the end ends the run."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import threading
import time
from pathlib import Path
from typing import TextIO

from vl_jax.runtime.hosts import log
from vl_jax.runtime.hosts.joined import Hosts, end_at_once

logger = logging.getLogger(__name__)

STACKS_FILE = "stacks.txt"
EXIT_STATUS = 124  # as of timeout(1)
_MOST_BETWEEN_LOOKS = 5.0  # seconds
_SUSPENDED = 60.0  # seconds without a look: the whole process was suspended, which is nobody's fault


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long a run may stand still, in seconds; 0: for ever."""

    warn_after: float = 900.0  # then the stacks of all threads are written to logs/stacks.txt
    end_after: float = 3600.0  # then the run ends, with exit status 124
    compile_allowance: float = 3600.0  # more of both for whatever may have to be compiled first
    silent_after: float = 100.0  # of several hosts: all end where one gives no sign of life for so long

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be >= 0; 0 is no bound")
        if self.silent_after < 1:
            raise ValueError(f"silent_after={self.silent_after} must be >= 1: signs of life come in between")
        if 0 < self.end_after < self.warn_after:
            raise ValueError(
                f"end_after={self.end_after} is below warn_after={self.warn_after}: nobody would see why"
            )


@dataclasses.dataclass
class _Task:
    """What a run is doing, since when, and how much longer than usual it may take."""

    name: str
    since: float
    allowance: float
    warned: bool = False


class Watchdog:
    """Watches from a thread of its own, as a context; ``alive`` has to be called again and again.

    A thread cannot look while another one keeps Python's lock for ever. Then ``faulthandler`` ends the run,
    which needs no lock.
    """

    def __init__(self, config: WatchdogConfig, logs: Path, *, hosts: Hosts | None = None):
        """Takes the folder of its file, which is made when it is needed.

        Args:
          hosts: of a run on several; all processes but the first have a file of their own.
        """
        process, self._hosts = hosts.number if hosts else 0, hosts
        self._config = config
        self._path = logs / (f"{process}.{STACKS_FILE}" if process else STACKS_FILE)
        self._task: _Task | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._hosts is not None:
            self._hosts.pulse.silent_after = self._config.silent_after
        if self._config.warn_after or self._config.end_after:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(_MOST_BETWEEN_LOOKS)

    def alive(self, task: str, *, compiles: bool = False) -> None:
        """Says that the run has moved, and what it does next.

        Args:
          compiles: whether that may have to be compiled first.
        """
        allowance = self._config.compile_allowance if compiles else 0.0
        self._task = _Task(task, time.monotonic(), allowance)
        if self._hosts is not None:
            self._hosts.pulse.move(task)

    def rest(self) -> None:
        """Says that nothing is to be watched for now."""
        self._task = None

    def _watch(self) -> None:
        config = self._config
        bounds = [bound for bound in (config.warn_after, config.end_after) if bound]
        pause = min(_MOST_BETWEEN_LOOKS, min(bounds) / 10)
        looked = time.monotonic()
        timer = self._open() if config.end_after else None
        try:
            while not self._done.wait(pause):
                now, task = time.monotonic(), self._task
                if task is not None and now - looked > max(_SUSPENDED, 2 * pause):
                    task.since += now - looked
                looked = now
                if task is None:
                    faulthandler.cancel_dump_traceback_later()
                    continue
                if timer is not None:
                    last = config.end_after + task.allowance + _SUSPENDED
                    faulthandler.dump_traceback_later(last, exit=True, file=timer)
                self._look(task, now - task.since - task.allowance)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if timer is not None:
                timer.close()
                if not self._path.stat().st_size:
                    self._path.unlink()
                    with contextlib.suppress(OSError):  # Others write there too.
                        self._path.parent.rmdir()

    def _look(self, task: _Task, still: float) -> None:
        config = self._config
        if config.end_after and still > config.end_after:
            where = self._dump(task)
            line = (
                f"nothing has moved for {_seconds(still, task)} ({task.name}){self._behind()}; the run ends, "
                f"run again to resume; {where} (config.loop.watchdog.end_after={config.end_after:g})"
            )
            log.say(f"error: {line}")
            if self._hosts is not None:
                self._hosts.fail(line, EXIT_STATUS)
            end_at_once(EXIT_STATUS)
        if config.warn_after and still > config.warn_after and not task.warned:
            task.warned = True
            where = self._dump(task)
            name = task.name + self._behind()
            logger.warning("nothing has moved for %s (%s); %s", _seconds(still, task), name, where)

    def _behind(self) -> str:
        """Of several hosts, the one that the others wait for."""
        found = self._hosts.pulse.behind() if self._hosts is not None else ""
        return f"; {found}" if found else ""

    def _open(self) -> TextIO | None:
        """The file of stacks, at its end; None where it cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return self._path.open("a", encoding="utf-8")
        except OSError as error:
            logger.warning("no stacks will be written: %s", error)
            return None

    def _dump(self, task: _Task) -> str:
        """Adds the stacks of all threads to the file; says where they are."""
        file = self._open()
        if file is None:
            return "its stacks could not be written"
        with file:
            file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {task.name}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return f"what its threads do is in {self._path}"


def _seconds(still: float, task: _Task) -> str:
    return f"{still + task.allowance:.0f} s"
