"""How fast a run goes: what is logged of its speed, and the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from vl_jax.batch import Batch

_STARTING = 2  # steps at the beginning of a stage that may compile
_REMEMBERED = 200  # steps


class Clock:
    """Tokens per second and milliseconds waited for data, since the last reading."""

    def __init__(self, peak: float | None = None):
        """Takes the operations a second of all devices at best; None: not known."""
        self._peak = peak
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._tokens = self._samples = 0
        self._flops = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for the batch of a step."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def count(self, batch: Batch, flops: float = 0.0) -> None:
        """Counts what a step reads, and the operations that the model needs for it; 0: not known."""
        self._flops += flops
        self._tokens += int(np.count_nonzero(batch.segment_ids))
        # A row without words is a sample too, if it has anything else.
        here = [(batch.visual_index >= 0).any(axis=1), *(given.present for given in batch.media.values())]
        self._samples += int(np.maximum(batch.segment_ids.max(axis=1), np.any(here, axis=0)).sum())

    def read(self) -> dict[str, float]:
        """The figures by the names they are logged with."""
        elapsed = time.perf_counter() - self._start
        result = {
            "tokens_per_second": self._tokens / elapsed,
            "samples_per_second": self._samples / elapsed,
            "data_wait_ms": 1000 * self._waited / max(1, self._steps),
            "step_ms": 1000 * elapsed / max(1, self._steps),
        }
        if self._peak and self._flops:
            result["mfu"] = self._flops / (elapsed * self._peak)
        self._reset()
        return result


class Pace:
    """The time that the rest of a run takes, by its steady steps: those that compile do not count."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._last = now, now()
        self._starting = 0
        self._steady: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of each step

    def begin(self) -> None:
        """Notes that a stage begins; its first steps compile."""
        self._starting, self._last = _STARTING, self._now()

    def step(self) -> None:
        """Notes that a step has ended."""
        now = self._now()
        if self._starting:
            self._starting -= 1
        else:
            self._steady.append(now - self._last)
        self._last = now

    def remaining(self, steps: int) -> float | None:
        """Seconds that so many steps take; None before there was a steady one."""
        return steps * sum(self._steady) / len(self._steady) if self._steady else None
