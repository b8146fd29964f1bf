"""What the configs of media say, and what opening one of a record gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vl_jax.data.picture import Orientation
from vl_jax.data.sample import BadSample, Media, Note, path_in


@dataclass(frozen=True)
class RecordPlace:
    """Where a record stands, and where the files lie that it names."""

    folder: Path  # resolved; nothing outside it is opened
    where: str  # "sample ID (FILE, record N)", for messages
    orientation: Orientation = "shown"

    def path(self, value: Any, field: str, kind: str) -> Path:
        """The file or folder that a field names.

        Raises:
          BadSample: it is no path, or leads out of the folder.
        """
        if not isinstance(value, str) or not value:
            message = f"{self.where}: {field} must be a path, not {str(value)[:40]!r}"
            raise BadSample(f"bad_{kind}_field", message)
        return path_in(self.folder, value, self.where, kind=kind)


@dataclass(frozen=True)
class Opened:
    """The media of a record; files are read when they are called."""

    media: Mapping[str, Media] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()


@runtime_checkable
class MediumConfig(Protocol):
    """The config of one medium of a record, a frozen dataclass."""

    @property
    def name(self) -> str:
        """In ``Sample.media``."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that it reads; where the first is null, the record has no such medium."""
        ...

    def open(self, record: Mapping[str, Any], place: RecordPlace) -> Opened:
        """The medium of a record that has one.

        Raises:
          BadSample: the record says of it what cannot be.
        """
        ...


def named(name: str, field: str) -> tuple[str, ...]:
    """The field of a medium: that of its name, if no other is given.

    Raises:
      ValueError: the medium has no name.
    """
    if not name:
        raise ValueError("name='' of a medium: must not be empty")
    return (field or name,)


def number_of(record: Mapping[str, Any], field: str, where: str) -> float:
    """A number above 0 in a field of a record, or in a text as tables have it.

    Raises:
      BadSample: there is none.
    """
    value = record.get(field)
    try:
        found = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        found = float("nan")
    if isinstance(value, bool) or not 0 < found < 1e9:
        message = f"{where}: {field}={str(value)[:40]!r} must be a rate above 0, in Hz"
        raise BadSample("bad_rate", message)
    return found
