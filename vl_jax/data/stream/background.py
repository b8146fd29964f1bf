"""Work ahead of its use: a thread that fills a queue, and a watch over sources that give nothing usable."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from vl_jax.data.reasons import in_words

T = TypeVar("T")
_MAX_BAD_RUN = 2000
DATA_THREAD = "data"  # what the names of threads begin with that read data
_GLANCE = 5.0  # seconds between looks at whether the thread is there
_PATIENCE = 30.0  # seconds that a thread which is told to stop may take
_log = logging.getLogger(__name__)


class DataFailure(ValueError):
    """What ended the work on data and is no ordinary error, such as a panic in a library; in one line."""

    @classmethod
    def of(cls, error: BaseException, where: str) -> DataFailure:
        """Says what was raised, and where."""
        said = " ".join(str(error).split())
        return cls(f"{where}: {type(error).__name__}: {said}" if said else f"{where}: {type(error).__name__}")


class Background(Generic[T]):
    """Runs an iterator in a thread, a few items ahead."""

    def __init__(self, make: Callable[[threading.Event], Iterator[T]], *, prefetch: int):
        """Starts at once.

        Args:
          make: gives the iterator; between two items it should end when the event is set.
        """
        self._queue: queue.Queue[T | Exception] = queue.Queue(prefetch)
        self._stop = threading.Event()
        arguments = (make, self._queue, self._stop)
        self._thread = threading.Thread(target=_run, args=arguments, name=DATA_THREAD, daemon=True)
        self._thread.start()

    def next(self) -> T:
        """The next item; raises what the iterator raised, again and again.

        Raises:
          DataFailure: what it raised is no ``Exception``, such as the panic of a tokenizer.
        """
        item = self._next()
        if isinstance(item, Exception):
            self._queue.put(item)  # Whoever asks again is told again.
            raise item
        return item

    def _next(self) -> T | Exception:
        """Waits as long as the thread lives; how long that may be is the watchdog's."""
        while True:
            try:
                return self._queue.get(timeout=_GLANCE)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    return DataFailure("the thread that reads data has ended without a word")

    def stop(self) -> None:
        """Ends the work and waits for it; a thread that is stuck is left alone after a while."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            self._queue.get_nowait()  # So that the thread does not wait for room.
        if threading.current_thread() is not self._thread:  # Garbage collection may call from anywhere.
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                _log.warning("the data thread is stuck and has not ended for %g s", _PATIENCE)


def _run(
    make: Callable[[threading.Event], Iterator[T]], out: queue.Queue[T | Exception], stop: threading.Event
) -> None:
    """Fills the queue until told to stop; an error becomes the last thing in it."""
    try:
        for item in make(stop):
            _put(out, item, stop)
            if stop.is_set():
                return
    except Exception as error:
        _put(out, error, stop)
    except BaseException as error:  # The thread ends here; nobody else would ever hear of it.
        _put(out, DataFailure.of(error, "while data was read"), stop)


def _put(out: queue.Queue[T | Exception], item: T | Exception, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            out.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


class BadRuns:
    """Notices a source that gives nothing but bad samples."""

    def __init__(self, sizes: Mapping[str, int]):
        """Takes the number of records of each source."""
        # Two passes over the records without a good one, or very many in a row.
        self._limits = {name: min(2 * size, _MAX_BAD_RUN) for name, size in sizes.items()}
        self._runs: dict[str, list[tuple[str, str]]] = {name: [] for name in sizes}

    def good(self, source: str) -> None:
        """Notes a usable record."""
        self._runs[source].clear()

    def bad(self, source: str, reason: str, message: str) -> None:
        """Notes a record that cannot be used.

        Raises:
          ValueError: there were too many of them one after the other.
        """
        run = self._runs[source]
        run.append((reason, message))
        if len(run) >= self._limits[source]:
            counts = Counter(reason for reason, _ in run)
            reasons = ", ".join(f"{n} {reason}" for reason, n in counts.items())
            raise ValueError(
                f"source {source!r}: no usable record among {len(run)} in a row ({reasons}); "
                f"first: {run[0][1]}; {in_words(counts.most_common(1)[0][0])}"
            )
