"""What is odd about the inputs of a source beside text and pictures, for ``examination`` to count.

sample --> an input of which its tower reads a part
all of them --> inputs of a tower that no record has, inputs of records that no tower reads
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vl_jax.data.config import RowField
from vl_jax.data.example import Example
from vl_jax.data.sample import Sample
from vl_jax.data.tools.objects import Oddity

UNUSED = "input that no tower reads"
ABSENT = "input of a tower that no record has"


@dataclass
class MediaSeen:
    """Looks at samples one after another, and remembers which inputs they have."""

    source: Any  # the config of the source
    fields: Sequence[RowField]  # what the model reads
    seen: Counter[str] = field(default_factory=Counter)

    def look(self, sample: Sample, example: Example) -> None:
        """Counts what a sample brings and what the model reads of it."""
        self.seen.update({*sample.media, *example.media})

    def missing(self, count: int) -> Iterator[Oddity]:
        """What all records lack, and what they bring for nothing.

        Args:
          count: of records that can be used.
        """
        read = {found.name for found in self.fields}
        for name in sorted(read - set(self.seen)) if count else ():
            yield Oddity(ABSENT, count, f"{name}; records have {', '.join(sorted(self.seen)) or 'none'}")
        for medium in getattr(self.source, "media", ()):
            name = getattr(medium, "name", None)
            if name is not None and name not in read and self.seen[name]:
                yield Oddity(
                    UNUSED, self.seen[name], f"{name}; towers read {', '.join(sorted(read)) or 'none'}"
                )
