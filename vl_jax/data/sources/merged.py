"""Records about the same pictures as one sample with all their questions.

record 0   picture a, question 1        sample 0   picture a, questions 1 and 2
record 1   picture b, question 1   -->  sample 1   picture b, question 1
record 2   picture a, question 2

Most question files ask once a record. Merged, the questions of a picture share its tokens and one pass of
the encoder (as conversations of LLaVA-1.5 do, arXiv 2310.03744), and with independent turns each is still
read as if it had been asked alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vl_jax.data.sample import (
    TEXT,
    BadSample,
    Image,
    Sample,
    Source,
    image_key,
    opening,
    pixels_digest,
    standalone_questions,
)

_AHEAD = 64  # records read while others are compared


class MergedSource:
    """A source's samples, with every one about pictures seen before added to the first about them.

    Two samples become one if their pictures have the same pixels and all that stands before the questions is
    the same, labels too. What cannot be read, has no picture, or asks before it shows stays as it is.
    """

    def __init__(
        self,
        source: Source,
        *,
        max_turns: int,
        num_threads: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """Reads every record, and every picture once.

        Args:
          max_turns: no more than so many are put together.
          progress: called with the number of records that are done and of all.
        """
        self.files: Sequence[Path] = getattr(source, "files", ())
        self._source = source
        self._groups = _group(source, max_turns, num_threads, progress)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a group of records; raises as the source does."""
        return merge([self._source[record] for record in self._groups[index]])


def merge(samples: Sequence[Sample]) -> Sample:
    """The first sample with the turns of all of them, which must have the same pictures and opening."""
    first, *others = samples
    turns = list(first.turns)
    for other in others:
        start = len(opening(other))
        questions = standalone_questions(other)
        turns += [
            dataclasses.replace(turn, question=question[start:])
            for turn, question in zip(other.turns, questions, strict=True)
        ]
    notes = tuple(note for sample in samples for note in sample.notes)
    return dataclasses.replace(first, turns=tuple(turns), notes=notes)


def _group(
    source: Source, max_turns: int, num_threads: int, progress: Callable[[int, int], None]
) -> list[list[int]]:
    """The records that become one sample each, in the order of their first."""
    digests: dict[Hashable, bytes] = {}  # of pictures that may come again, by what their pixels follow from
    groups: list[list[int]] = []
    last: dict[bytes, tuple[int, int]] = {}  # the group a record may still be added to, and its turns
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(source), _AHEAD):
            chunk = range(start, min(start + _AHEAD, len(source)))
            signatures = pool.map(lambda record: _signature(source, record, digests), chunk)
            for record, (signature, turns) in zip(chunk, signatures, strict=True):
                group, held = last.get(signature, (-1, max_turns))
                if signature and held + turns <= max_turns:
                    groups[group].append(record)
                    last[signature] = (group, held + turns)
                else:
                    groups.append([record])
                    last[signature] = (len(groups) - 1, turns)
            progress(chunk.stop, len(source))
    return groups


def _signature(source: Source, record: int, digests: dict[Hashable, bytes]) -> tuple[bytes, int]:
    """What records that may be merged have in common, empty if with none; and the number of turns."""
    try:
        sample = source[record]
        if not sample.images:
            return b"", len(sample.turns)
        texts = {turn.kind == TEXT for turn in sample.turns}  # these have no mark before their pictures
        pictures = [_digest(image, digests) for image in sample.images]
        labels = sorted(sample.labels.items())
        common = repr((pictures, opening(sample), sample.system, texts, labels)).encode()
    except BadSample:
        return b"", 0  # It is counted and listed when it is read again.
    return hashlib.blake2b(common, digest_size=16).digest(), len(sample.turns)


def _digest(image: Image, digests: dict[Hashable, bytes]) -> bytes:
    key = image_key(image)
    digest = digests.get(key) if key is not None else None
    if digest is None:
        digest = pixels_digest(image())
        if key is not None:
            digests[key] = digest
    return digest
