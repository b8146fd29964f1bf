"""Signs of life: each process gives one every few seconds, and one that gives none ends the run of all.

    every process   writes its count of moves, and what it does; reads whether anybody told of an end
    the first       reads all of them, and tells of an end where one has not changed for too long

A process that was killed, one that was stopped and one whose machine is gone look the same: its count stands
still. One that is alive and stuck goes on counting, but makes no moves: ``behind`` names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

SILENT_AFTER = 100.0  # seconds without a sign of life
_INTERVAL = 2.0
_PULSES, _ENDS, _GONE = "vl_jax/pulse/", "vl_jax/end/", "vl_jax/gone/"
LOST = 75  # exit status where another process is gone or stands still; as EX_TEMPFAIL, "try again"


@dataclasses.dataclass
class _Sign:
    """The last sign of a process, and when it changed."""

    sign: str = ""
    at: float = dataclasses.field(default_factory=time.monotonic)


class Pulse:
    """Gives the signs of this process, and watches those of the others, from threads of its own."""

    def __init__(self, store: Any, number: int, names: list[str], leave: Callable[[str, int], None]):
        """Takes the store of the coordination service.

        Args:
          number: of this process among the names.
          leave: ends this process with a line and a status.
        """
        self._store, self._number, self._names, self._leave = store, number, names, leave
        self.silent_after = SILENT_AFTER
        self._task, self._moves = "starting", 0
        self._stop, self._told = threading.Event(), threading.Event()
        self._answered = time.monotonic()  # when the store last did
        self._threads = [
            threading.Thread(target=f, name="pulse", daemon=True) for f in (self._beat, self._watch)
        ]

    @property
    def _pause(self) -> float:
        return min(_INTERVAL, self.silent_after / 5)

    def start(self) -> None:
        """Begins to give and to watch signs."""
        self._answered = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop_soon(self) -> None:
        """Gives no more signs, and watches none."""
        self._stop.set()

    def stop(self) -> None:
        """The same; returns when nothing is under way, or after a while."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * _INTERVAL)

    def move(self, task: str) -> None:
        """Says that this process has moved, and what it does next."""
        self._task, self._moves = task, self._moves + 1

    def behind(self) -> str:
        """The process that has moved least, in words; empty if that is not known."""
        signs: dict[int, str] = {}
        self._try(lambda: signs.update(self._signs()))
        moves = {number: json.loads(sign)[1:] for number, sign in signs.items()}
        if len({count for count, _ in moves.values()}) < 2:
            return ""
        last = min(moves, key=lambda number: moves[number][0])
        return f"furthest behind is {self._names[last]}: {moves[last][1]}"

    def tell(self, line: str, status: int) -> None:
        """Tells all processes that the run ends, and why."""
        self._told.set()
        end = json.dumps([line, status])
        self._try(lambda: self._store.key_value_set(f"{_ENDS}{self._number}", end, True))

    def let_go(self) -> None:
        """Before this process ends: notes that it does; the first waits a moment until the others have."""
        self._stop.set()
        until = time.monotonic() + 4 * self._pause

        def leave() -> None:
            self._store.key_value_set(f"{_GONE}{self._number}", "", True)
            while not self._number and time.monotonic() < until:
                if len(self._store.key_value_dir_get(_GONE)) == len(self._names):
                    return
                time.sleep(0.1)

        self._try(leave)

    def _try(self, work: Callable[[], None]) -> None:
        """Does something with the store, unless it takes too long: where the first is stopped, for ever."""

        def do() -> None:
            with contextlib.suppress(Exception):  # Nobody is there any more.
                work()

        thread = threading.Thread(target=do, name="pulse", daemon=True)
        thread.start()
        thread.join(5 * self._pause)

    def wait_for_news(self) -> None:
        """Waits until the end of another process would be known, or is."""
        self._stop.wait(self.silent_after + 4 * self._pause)

    def _signs(self) -> dict[int, str]:
        return {int(path.rpartition("/")[2]): sign for path, sign in self._store.key_value_dir_get(_PULSES)}

    def _beat(self) -> None:
        """Writes the signs of this process and reads what is told, which hangs where the first is stopped."""
        beats, seen = 0, {number: _Sign() for number in range(len(self._names))}
        looked = time.monotonic()
        while not self._stop.wait(self._pause):
            beats += 1
            try:
                sign = json.dumps([beats, self._moves, self._task])
                self._store.key_value_set(f"{_PULSES}{self._number}", sign, True)
                ends = dict(self._store.key_value_dir_get(_ENDS))
                signs = self._signs() if self._number == 0 else {}
            except Exception:  # ``_watch`` counts how long nobody has answered.
                continue
            now = self._answered = time.monotonic()
            if ends and not self._told.is_set():
                self._leave(*json.loads(ends[min(ends)]))
                return
            if self._number == 0 and not self._told.is_set():
                slept, looked = now - looked > max(self.silent_after / 2, 5 * self._pause), now
                self._look(seen, signs, now, slept=slept)

    def _look(self, seen: dict[int, _Sign], signs: dict[int, str], now: float, *, slept: bool) -> None:
        """Tells of the end where a process has given no sign for too long."""
        for number, sign in signs.items():
            if sign != seen[number].sign:
                seen[number] = _Sign(sign, now)
        if slept:  # This process was suspended, and has not looked at the others.
            for one in seen.values():
                one.at = now
        silent = [number for number, one in seen.items() if now - one.at > self.silent_after]
        if not silent:
            return
        names = ", ".join(self._names[number] for number in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        last = seen[silent[0]].sign
        doing = f" (last: {json.loads(last)[2]})" if last else ""
        line = f"{names}{more}: no sign of life for {self.silent_after:g} s{doing}"
        self.tell(line + _REMEDY, LOST)
        self._leave(line + _REMEDY, LOST)

    def _watch(self) -> None:
        """Ends this process where the first, which holds the store, has not answered for too long."""
        looked = time.monotonic()
        while not self._stop.wait(self._pause):
            now = time.monotonic()
            if now - looked > max(self.silent_after / 2, 5 * self._pause):
                self._answered = now
            looked = now
            if now - self._answered > self.silent_after + self._pause:
                line = f"{self._names[0]}: no sign of life for {self.silent_after:g} s, and no answer"
                self._leave(line + _REMEDY, LOST)
                return


_REMEDY = "; it was killed, is stopped, or its machine or network is gone; launch the run again to go on"
