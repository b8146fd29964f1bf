"""Encoders that read in chunks, and carry over what they need of those before.

    config.begin(rows) -> state        module.stream(chunk, state, valid) -> (Encoded, state)

Chunks said one after another are the tokens of the whole, ``delay`` steps late: the first ``delay / chunk``
tokens are not in the mask, and as many steps that are not valid bring the last ones.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class StreamingConfig(Protocol):
    """What the config of such an encoder has beside what every encoder's has."""

    @property
    def chunk(self) -> int:
        """What the number of steps of a chunk must be a multiple of."""
        ...

    @property
    def delay(self) -> int:
        """Steps that are read before the first token is said; a multiple of ``chunk``."""
        ...

    def begin(self, rows: int) -> Any:
        """The state before the first chunk.

        Raises:
          ValueError: this one needs the end before it can say anything.
        """
        ...
