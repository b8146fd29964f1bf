"""How long every sample is before it is encoded: what a plan of packed rows is made from.

A sample is a trunk and turns, and their lengths add up: a draw of some of the turns costs the trunk and
those turns (in the *dialogue* form a draw takes the first few, and the trunk belongs to the first). So a
record needs a few small numbers, most of them of one byte, and a million records some tens of megabytes::

    trunk[r]  tiles[r]  fault[r]    offsets[r] .. offsets[r + 1]  -->  turns[...]  targets[...]  answers[...]

The numbers of a source are measured once and memory-mapped from then on (``open_index``), or measured for the
records of one window after another (``Measuring``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vl_jax.data.encode import Encoder
from vl_jax.data.files.shards import temporary_name
from vl_jax.data.sample import BadSample, Sample, Source, image_size
from vl_jax.data.sources.build import SourceConfig
from vl_jax.data.text import chat
from vl_jax.data.text.bounded import bounded
from vl_jax.data.text.written import encode_written

_log = logging.getLogger(__name__)
_PART = 20_000  # records measured between two files of progress
_PER_RECORD = ("trunk", "trunk_targets", "tiles", "fault")
_PER_TURN = ("turns", "targets", "answers")


@dataclass(frozen=True)
class Lengths:
    """The lengths of records, in the order asked for; whole numbers of any width, as small as they come."""

    trunk: np.ndarray  # [n] tokens that every draw of the record has
    trunk_targets: np.ndarray  # [n] those of them that are predicted
    tiles: np.ndarray  # [n]
    fault: np.ndarray  # [n] 0, or 1 + the place in ``reasons`` of why the record cannot be used
    offsets: np.ndarray  # i64[n + 1] where the record's turns begin in the arrays below
    turns: np.ndarray  # [m] tokens
    targets: np.ndarray  # [m] predicted tokens
    answers: np.ndarray  # [m] the first of the record's turns that has the same answer
    reasons: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.trunk)

    def take(self, records: np.ndarray) -> Lengths:
        """The lengths of some records."""
        starts, counts = self.offsets[records], self.offsets[records + 1] - self.offsets[records]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        chosen = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        parts = {name: np.asarray(getattr(self, name)[records], np.int32) for name in _PER_RECORD}
        parts |= {name: np.asarray(getattr(self, name)[chosen], np.int32) for name in _PER_TURN}
        return Lengths(**parts, offsets=offsets, reasons=self.reasons)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, each of the smallest type that holds its numbers."""
        small = {name: getattr(self, name) for name in (*_PER_RECORD, *_PER_TURN)}
        small = {name: x.astype(np.min_scalar_type(x.max(initial=0))) for name, x in small.items()}
        return {**small, "offsets": self.offsets}

    @property
    def faults(self) -> dict[int, str]:
        """The records that cannot be used, and why."""
        return {int(r): self.reasons[self.fault[r] - 1] for r in np.flatnonzero(self.fault)}


def concatenate(parts: Sequence[Lengths]) -> Lengths:
    """The lengths of one list of records after the other."""
    reasons = tuple(dict.fromkeys(reason for part in parts for reason in part.reasons))
    codes = [np.array([0, *(1 + reasons.index(r) for r in part.reasons)], np.int32) for part in parts]
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (*_PER_RECORD, *_PER_TURN)
        if name != "fault"
    }
    fault = np.concatenate([code[part.fault] for code, part in zip(codes, parts, strict=True)])
    ends = np.concatenate([*offsets, starts[-1:]]).astype(np.int64)
    return Lengths(**arrays, fault=fault, offsets=ends, reasons=reasons)


@dataclass(frozen=True)
class Measure:
    """What lengths depend on besides the record; a function from samples to lengths."""

    encoder: Encoder
    turns: chat.Turns
    targets: chat.Targets
    blind: bool = False  # the images are withheld
    verify: bool = False  # pixels are decoded, so that a broken image is found now and not in training

    def __call__(self, samples: Sequence[Sample | BadSample]) -> Lengths:
        """The lengths of samples; one that cannot be used has a fault and no turns."""
        rows, faults = [], []
        for sample in samples:
            try:
                rows.append(self._one(sample))
                faults.append("")
            except BadSample as error:
                rows.append((0, 0, 0, [], [], []))
                faults.append(error.reason)
        reasons = tuple(sorted({reason for reason in faults if reason}))
        trunk, trunk_targets, tiles, turns, targets, answers = zip(*rows, strict=True) if rows else [()] * 6
        return Lengths(
            trunk=np.array(trunk, np.int32),
            trunk_targets=np.array(trunk_targets, np.int32),
            tiles=np.array(tiles, np.int32),
            fault=np.array([1 + reasons.index(f) if f else 0 for f in faults], np.int32),
            offsets=np.cumsum([0, *(len(t) for t in turns)], dtype=np.int64),
            turns=np.array([t for row in turns for t in row], np.int32),
            targets=np.array([t for row in targets for t in row], np.int32),
            answers=np.array([a for row in answers for a in row], np.int32),
            reasons=reasons,
        )

    def _one(self, sample: Sample | BadSample) -> tuple[int, int, int, list[int], list[int], list[int]]:
        if isinstance(sample, BadSample):
            raise sample
        sizes = [image().size if self.verify else image_size(image) for image in sample.images]
        if self.blind:
            sample, sizes = sample.without_images(), []
        tiles, visual = self.encoder.room_of(sizes)
        sample = bounded(sample, self.encoder.tokenizer, self.encoder.max_tokens)
        if self.encoder.spec.reads == "text":
            text = encode_written(sample, self.encoder.tokenizer, max_tokens=self.encoder.max_tokens)
            return len(text.tokens), 0, tiles, [0], [0], [0]
        # Every image takes one place here; what it takes beyond that is added where it stands.
        dialogue = chat.encode_dialogue(
            sample,
            self.encoder.tokenizer,
            image_lengths=[1] * len(sizes),
            turns=self.turns,
            targets=self.targets,
        )
        predicted = np.append(0, dialogue.loss_weights[:-1]) > 0
        if self.turns == "independent":
            part = dialogue.branch_ids
        else:
            ends = [run.stop for run in dialogue.answer_runs]
            part = 1 + np.searchsorted(ends, np.arange(len(dialogue.tokens)), side="right")
        count = 1 + dialogue.num_turns
        tokens = np.bincount(part, minlength=count)
        targets = np.bincount(part, weights=predicted, minlength=count).astype(np.int64)
        for run, length in zip(dialogue.visual_runs, visual, strict=True):
            tokens[part[run.start] if self.turns == "dialogue" else 0] += length - run.length
        texts = [t.answer.strip().lower() for t in sample.turns]
        first = {text: turn for turn, text in reversed(list(enumerate(texts)))}
        answers = [first[text] for text in texts]
        head = (int(tokens[0]), int(targets[0]), tiles)
        return (*head, tokens[1:].tolist(), targets[1:].tolist(), answers)


@runtime_checkable
class Measured(Protocol):
    """Something that knows the lengths of a source's records."""

    def take(self, records: np.ndarray, /) -> Lengths: ...


class Measuring:
    """Lengths of a source without an index: measured whenever they are asked for."""

    def __init__(self, source: Source, measure: Measure):
        self._source, self._measure = source, measure

    def take(self, records: np.ndarray) -> Lengths:
        """Reads and measures some records."""
        return self._measure([read(self._source, int(r)) for r in records])


def read(source: Source, record: int) -> Sample | BadSample:
    """A record, or why it cannot be read."""
    try:
        return source[record]
    except BadSample as error:
        return error


def open_index(
    folder: Path,
    config: SourceConfig,
    source: Source,
    measure: Measure,
    *,
    stamp: str = "",
    num_threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Lengths:
    """The memory-mapped index of a source; made first if the folder has none for this very measure.

    Measuring that was interrupted goes on where it was.

    Args:
      stamp: of the source's files; another stamp is another index.
      progress: called with the number of records measured and of all.
    """
    key = _key(config, measure, stamp, len(source))
    place = folder / f"{config.name}-{key}"
    if not (place / "index.json").is_file():
        _build(place, source, measure, num_threads, progress)
    reasons = tuple(json.loads((place / "index.json").read_text(encoding="utf-8"))["reasons"])
    names = (*_PER_RECORD, "offsets", *_PER_TURN)
    return Lengths(**{n: np.load(place / f"{n}.npy", mmap_mode="r") for n in names}, reasons=reasons)


def _build(
    place: Path, source: Source, measure: Measure, num_threads: int, progress: Callable[[int, int], None]
) -> None:
    place.mkdir(parents=True, exist_ok=True)
    total, parts = len(source), []
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, total, _PART):
            file = place / f"part-{start}.npz"
            if not file.is_file():
                chunks = np.array_split(np.arange(start, min(start + _PART, total)), 4 * num_threads)
                measured = pool.map(Measuring(source, measure).take, chunks)
                _save_part(file, concatenate(list(measured)))
            parts.append(_load_part(file))
            progress(min(start + _PART, total), total)
    whole = concatenate(parts) if parts else measure([])
    for name, array in whole.arrays().items():
        _write(place / f"{name}.npy", lambda out, array=array: np.save(out, array))
    counts = {reason: int((whole.fault == 1 + i).sum()) for i, reason in enumerate(whole.reasons)}
    text = json.dumps({"records": total, "reasons": list(whole.reasons), "faults": counts}, indent=1)
    _write(place / "index.json", lambda out: out.write(text.encode()))
    for file in place.glob("part-*.npz"):
        file.unlink(missing_ok=True)  # Another process may have been faster.
    _log.info("index of %d records written to %s", total, place)


def _save_part(file: Path, lengths: Lengths) -> None:
    arrays: dict[str, Any] = {**lengths.arrays(), "reasons": np.array(lengths.reasons, np.str_)}
    _write(file, lambda out: np.savez(out, **arrays))


def _load_part(file: Path) -> Lengths:
    with np.load(file) as found:
        arrays = {name: found[name] for name in (*_PER_RECORD, "offsets", *_PER_TURN)}
        return Lengths(**arrays, reasons=tuple(map(str, found["reasons"])))


def _write(file: Path, write: Callable[[Any], object]) -> None:
    """Writes a file that is either whole or not there, whoever else writes it."""
    temporary = temporary_name(file)
    with temporary.open("wb") as out:
        write(out)
    os.replace(temporary, file)


def _key(config: SourceConfig, measure: Measure, stamp: str, records: int) -> str:
    """A name for all that the lengths follow from."""
    encoder = measure.encoder
    facts: Mapping[str, Any] = {
        "source": dataclasses.asdict(config),
        "stamp": stamp,
        "records": records,
        "tokenizer": encoder.tokenizer.fingerprint,
        "tiling": dataclasses.asdict(encoder.tiling),
        "tile_tokens_side": encoder.spec.tile_tokens_side,
        "fusion": encoder.spec.fusion,
        "measure": [measure.turns, measure.targets, measure.blind, measure.verify],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
