"""What every stream of training batches keeps: work in the background, its position, and what was skipped."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vl_jax.batch import Batch
from vl_jax.data.stream.background import Background

_log = logging.getLogger(__name__)

Position = TypeVar("Position")


@dataclass(frozen=True)
class Made(Generic[Position]):
    """A batch, the position behind it, and what was passed over on the way: (reason, message) by record."""

    batch: Batch
    ids: list[list[str]]  # of the samples in each row
    position: Position
    skipped: Mapping[str, tuple[str, str]]
    absent: frozenset[str]  # inputs that no row of the whole batch has, as every host knows of all rows


class BatchStream(Generic[Position]):
    """An endless iterator of batches whose position can be saved and restored exactly.

    A kind of stream says how batches are made from a position on (``_make``), and how a position is written
    down (``_save``, ``_load``).
    """

    def __init__(self, start: Position, *, prefetch: int):
        """Begins at a position; the work starts with the first batch that is asked for."""
        self._position, self._prefetch = start, prefetch
        self._skipped: dict[str, str] = {}
        self._producer: Background[Made[Position]] | None = None
        self.ids: list[list[str]] = []  # of the samples in each row of the last batch
        self.absent: frozenset[str] = frozenset()  # inputs that the last batch has on no host

    def _make(self, start: Position) -> Callable[[threading.Event], Iterator[Made[Position]]]:
        """The batches from a position on, until the event is set; must not hold on to the stream."""
        raise NotImplementedError

    def _save(self, position: Position) -> dict[str, Any]:
        """The position as JSON-able values."""
        raise NotImplementedError

    def _load(self, state: Mapping[str, Any]) -> Position:
        """Reads back what ``_save`` gave; raises ValueError."""
        raise NotImplementedError

    @property
    def skipped(self) -> dict[str, int]:
        """How many different records were skipped, by reason."""
        return dict(Counter(self._skipped.values()))

    @property
    def skipped_records(self) -> dict[str, str]:
        """The skipped records as ``source/record index`` with the reason of each."""
        return dict(self._skipped)

    def __iter__(self) -> BatchStream[Position]:
        return self

    def __next__(self) -> Batch:
        """The next batch of NumPy arrays.

        Raises:
          ValueError: a source gives nothing but bad samples, or has changed.
        """
        if self._producer is None:
            self._producer = Background(self._make(self._position), prefetch=self._prefetch)
            weakref.finalize(self, self._producer.stop)
        made = self._producer.next()
        for record, (reason, message) in made.skipped.items():
            if record not in self._skipped:
                self._skipped[record] = reason
                _log.warning("skipped %s: %s", record, message)
        self._position, self.ids, self.absent = made.position, made.ids, made.absent
        return made.batch

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch that was taken, as JSON-able values."""
        return {**self._save(self._position), "skipped": dict(self._skipped)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position that ``get_state`` gave, here or on another host.

        Raises:
          ValueError: this is not such a state.
        """
        position, skipped = self._load(state), state.get("skipped")
        if not isinstance(skipped, Mapping):
            raise ValueError(f"state={dict(state)}: expected skipped, as get_state gives")
        self.close()
        self._position, self._skipped = position, dict(skipped)

    def close(self) -> None:
        """Stops the background work; the next batch would start it again."""
        if self._producer is not None:
            self._producer.stop()
            self._producer = None
