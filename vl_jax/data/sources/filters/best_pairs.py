"""Pairs that a trained model finds alike: a source without the share of them that it finds least alike.

{"id": "a", "similarity": 0.41}      the records that the task ``Retrieval`` writes of a source,
{"id": "b", "similarity": -0.02}     eval/SOURCE/STEP.samples.jsonl; b is left out with drop=0.5
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from vl_jax.data.sample import BadSample, Sample, Source, Strays

LOW = "ill_matched"  # the reason of what is left out


class BestPairs:
    """The samples of a source whose scores are not among the lowest; each is read once to learn its id.

    What cannot be read stays, so that it is counted as it is elsewhere.
    """

    def __init__(self, source: Source, file: Path, drop: float):
        """Reads scores and ids.

        Raises:
          ValueError: the file is missing or no such file, or has no score of a sample.
        """
        self._source, scores = source, read_scores(file)
        ids = [_id(source, index) for index in range(len(source))]
        missing = next((name for name in ids if name is not None and name not in scores), None)
        if missing is not None:
            raise ValueError(
                f"{file}: has no similarity of sample {missing!r}; evaluate the whole source again"
            )
        scored = sorted(
            (i for i, name in enumerate(ids) if name is not None), key=lambda i: scores[str(ids[i])]
        )
        left_out = scored[: math.floor(drop * len(scored))]
        self._kept = sorted(set(range(len(ids))) - set(left_out))
        self.files: Sequence[Path] = (*getattr(source, "files", ()), file)
        own = (Strays(LOW, len(left_out), tuple(str(ids[i]) for i in left_out[:3])),) if left_out else ()
        self.strays: Sequence[Strays] = (*getattr(source, "strays", ()), *own)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return repr(self._source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a record that is kept; raises as the source does."""
        return self._source[self._kept[index]]


def read_scores(file: Path) -> dict[str, float]:
    """Similarities by id.

    Raises:
      ValueError: the file cannot be read, or a line of it has no id or no similarity that is a number.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    found: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            name, score = str(record["id"]), float(record["similarity"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{file}, line {number}: expected an object with id and similarity") from None
        if not math.isfinite(score) or name in found:
            rule = "no number" if name not in found else "of an id that stood before"
            raise ValueError(f"{file}, line {number}: a similarity {rule}: {name!r}")
        found[name] = score
    return found


def _id(source: Source, index: int) -> str | None:
    try:
        return source[index].id
    except BadSample:
        return None
