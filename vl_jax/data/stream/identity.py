"""What tells two hosts that they read the same data, without reading all of it."""

from __future__ import annotations

import hashlib

import numpy as np

from vl_jax.data.sample import BadSample, Source

_LOOKED_AT = 16  # records, spread over the source
_PLAIN = (str, int, float, bool)


def identity(source: Source) -> str:
    """The number of records, and a digest of some of them, pictures and all."""
    count, found = len(source), hashlib.sha256()
    for index in np.unique(np.linspace(0, max(0, count - 1), min(count, _LOOKED_AT)).astype(int)):
        try:
            sample = source[int(index)]
            labels = {name: value for name, value in sample.labels.items() if isinstance(value, _PLAIN)}
            found.update(repr((sample.id, sample.turns, sorted(labels.items()))).encode())
            for image in sample.images:
                picture = image()
                found.update(repr(picture.size).encode() + picture.tobytes())
        except BadSample as error:
            found.update(error.reason.encode())
    return f"{count} records, digest {found.hexdigest()[:12]}"
