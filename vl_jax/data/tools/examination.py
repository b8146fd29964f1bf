"""What is wrong with a dataset, and what it is like: looked for before anything is trained on it.

records of a source --read, encode--> lengths, faults by reason
                    '--> pictures that come twice, boxes that lie outside, answers one can guess blind
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image as PilImage

from vl_jax.data.config import DataConfig, ModelSpec, PackingConfig, find_source, opened
from vl_jax.data.encode import Encoder, make_encoder
from vl_jax.data.example import Example
from vl_jax.data.images.audio import SoundImage
from vl_jax.data.images.resolution import MOST, coarse, describe
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, BadSample, Box, Sample, Turn, pixels_digest
from vl_jax.data.stream import packed
from vl_jax.data.stream import padding as padding_lib
from vl_jax.data.stream.lengths import Measure, read
from vl_jax.data.stream.padding import WasteReport
from vl_jax.data.text.chat import Targets
from vl_jax.data.text.normalize import normalize
from vl_jax.data.tools.media_findings import MediaSeen
from vl_jax.data.tools.objects import PlacedLabels

# Examples that are kept of every finding, and the questions that are named as guessable.
_EXAMPLES, _QUESTIONS = 3, 8
_JOIN = "convert-data can join both: config.data.conversation.merge_turns"
COARSE_PICTURE = f"picture that loses more than {MOST:g}x of its resolution (see data.tiling)"
REPEATED_PICTURE = f"picture that an earlier record has ({_JOIN})"

# A question tells how well it is guessed if it was asked so often; and is guessable from this share on.
_OFTEN, _GUESSABLE = 5, 0.8
# The rows that are proposed where none are configured have room for so many of the longest samples.
_SAMPLES_A_ROW = 4


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with some records."""

    what: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Guess:
    """A question that has nearly always the same answer."""

    question: str
    answer: str
    share: float
    asked: int


@dataclass(frozen=True)
class Examination:
    """What was seen of one source; the lists have an entry for each record that can be used."""

    source: str
    num_records: int
    num_examined: int
    findings: tuple[Finding, ...]
    tokens: tuple[int, ...]  # of the whole sample, whether or not it fits a row
    tiles: tuple[int, ...]
    turns: tuple[int, ...]
    num_repeated: int  # turns whose question was asked often enough to say how well it is guessed
    blind: float | None  # share of those that their question's most frequent answer gets right
    guesses: tuple[Guess, ...] = ()

    @property
    def num_usable(self) -> int:
        return len(self.tokens)


@dataclass
class _Notes:
    """Findings by name, as they come up."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, what: str, example: str) -> None:
        self.counts[what] += 1
        if len(self.examples[what]) < _EXAMPLES:
            self.examples[what].append(example)

    def add_all(self, what: str, count: int, examples: Sequence[str]) -> None:
        self.counts[what] += count
        self.examples[what] = [*self.examples[what], *examples][:_EXAMPLES]

    def findings(self) -> tuple[Finding, ...]:
        return tuple(Finding(w, n, tuple(self.examples[w])) for w, n in self.counts.most_common())


def examine(
    config: DataConfig,
    spec: ModelSpec,
    source_name: str,
    *,
    targets: Targets = "answers",
    limit: int = 1000,
    progress: Callable[[Sequence[int]], Sequence[int]] = lambda records: records,
) -> Examination:
    """Looks at the records of a source, evenly spread if there are more than ``limit``.

    Args:
      progress: wraps the record numbers, to show how far it is.

    Raises:
      ValueError: the whole source is unusable, or the limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"examine={limit}: must be at least 1")
    source = opened(config, find_source(config, source_name))
    encoder = make_encoder(config, spec)
    measure = Measure(encoder, config.conversation.turns, targets)
    records = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int)).tolist()
    notes, pictures, ids = _Notes(), dict[bytes, str](), set[str]()
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    tokens, tiles, turns = [], [], []
    placed, media = PlacedLabels(config, encoder), MediaSeen(find_source(config, source_name), spec.media)
    for record in progress(records):
        sample = read(source, record)
        try:
            if isinstance(sample, BadSample):
                raise sample
            images = [image() for image in sample.images]
            both = zip(sample.images, images, strict=True)
            sizes = [picture.size for image, picture in both if not isinstance(image, SoundImage)]
            sample = replace(sample, images=tuple(lambda p=p: p for p in images))  # decoded once is enough
            media.look(sample, _use(encoder, sample, config, targets))
            odd = list(placed.look(sample, record))
        except BadSample as error:
            notes.add(f"cannot be used: {error.reason.replace('_', ' ')}", str(error))
            continue
        lengths = measure([sample])
        tokens.append(int(lengths.trunk.sum() + lengths.turns.sum()))
        tiles.append(int(lengths.tiles.sum()))
        turns.append(len(sample.turns))
        if tokens[-1] > config.max_tokens and config.conversation.max_turns is None:
            notes.add(f"longer than max_tokens={config.max_tokens}: its last turns are left out", sample.id)
        for size in coarse(sizes, config.tiling, num_images=len(images)):
            notes.add(COARSE_PICTURE, f"{sample.id}: {describe(size, config.tiling)}")
        _look(sample, images, notes, pictures, ids)
        for what, count, example in odd:
            notes.add_all(what, count, [example])
        for note in sample.notes:
            notes.add(f"left out: {note.reason.replace('_', ' ')}", str(note))
        for turn in filter(_is_said, sample.turns):
            answers[normalize(turn.question.replace("<image>", ""))][normalize(turn.answer)] += 1
    for what, count, example in (*placed.classes(), *media.missing(len(tokens))):
        notes.add_all(what, count, [example])
    for stray in getattr(source, "strays", ()):
        notes.add_all(f"left out: {stray.reason.replace('_', ' ')}", stray.count, stray.examples)
    repeated = {q: found for q, found in answers.items() if found.total() >= _OFTEN}
    asked = sum(found.total() for found in repeated.values())
    right = sum(found.most_common(1)[0][1] for found in repeated.values())
    return Examination(
        source=source_name,
        num_records=len(source),
        num_examined=len(records),
        findings=notes.findings(),
        tokens=tuple(tokens),
        tiles=tuple(tiles),
        turns=tuple(turns),
        num_repeated=asked,
        blind=right / asked if asked else None,
        guesses=_guesses(repeated),
    )


def _use(encoder: Encoder, sample: Sample, config: DataConfig, targets: Targets) -> Example:
    """The sample as training encodes it, with the errors that it raises."""
    conversation = config.conversation
    if conversation.max_turns is not None and len(sample.turns) > conversation.max_turns:
        sample = sample.select(list(range(conversation.max_turns)))
    return encoder.example(sample, turns=conversation.turns, targets=targets)


def _look(
    sample: Sample,
    images: Sequence[PilImage.Image],
    notes: _Notes,
    pictures: dict[bytes, str],
    ids: set[str],
) -> None:
    """Notes what no error is raised for."""
    if sample.id in ids:
        notes.add("id that an earlier record has", sample.id)
    ids.add(sample.id)
    for image in images:
        digest = pixels_digest(image)
        if pictures.setdefault(digest, sample.id) != sample.id:
            notes.add(REPEATED_PICTURE, f"{sample.id} and {pictures[digest]}")
    for turn in filter(_is_said, sample.turns):
        if not turn.answer.strip():
            notes.add("empty answer", f"{sample.id}: {turn.question!r}")
        for box in turn.boxes:
            if len(images) == 1 and (wrong := _wrong(box, images[0].size)):
                notes.add(wrong, f"{sample.id}: {box.label!r} {box.corners} on {images[0].size}")


def _is_said(turn: Turn) -> bool:
    """Whether anything is; a picture with labels alone has a turn without words."""
    return turn.kind != TEXT or bool(turn.answer or turn.question.replace(IMAGE_PLACEHOLDER, "").strip())


def _wrong(box: Box, size: tuple[int, int]) -> str:
    """What is wrong with a box, or nothing."""
    x0, y0, x1, y1 = box.corners
    if not all(map(math.isfinite, box.corners)) or x1 <= x0 or y1 <= y0:
        return "box without an area"
    if x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]:
        return "box that reaches over the picture"
    return ""


def _guesses(repeated: dict[str, Counter[str]]) -> tuple[Guess, ...]:
    """The questions that are guessed best, those asked most often first."""
    best = {q: found.most_common(1)[0] for q, found in repeated.items()}
    guesses = [
        Guess(q, answer, count / repeated[q].total(), repeated[q].total())
        for q, (answer, count) in best.items()
        if count >= _GUESSABLE * repeated[q].total()
    ]
    return tuple(sorted(guesses, key=lambda g: -g.asked)[:_QUESTIONS])


def padding(
    config: DataConfig,
    spec: ModelSpec,
    *,
    sources: dict[str, float],
    targets: Targets,
    window: int = 1000,
) -> tuple[PackingConfig, WasteReport]:
    """What of the rows would be padding: with the packing of the config, or with one that suits the data.

    Args:
      sources: names and weights, as for a stage.
      window: draws that are counted if the config has no packing.

    Raises:
      ValueError: no sample can be used.
    """

    def predict(row: PackingConfig) -> WasteReport:
        packing = replace(config, packing=row)
        planner, reader = packed.open_planner(packing, spec, sources=sources, targets=targets)
        return padding_lib.predict(planner, packing, sources=reader.sources)

    if config.packing is not None:
        return config.packing, predict(config.packing)
    room = max(PackingConfig.max_tokens, _SAMPLES_A_ROW * config.max_tokens)
    # First with room for any number of tiles: how many does a row full of tokens have?
    row = PackingConfig(max_tokens=room, max_tiles=room * config.max_tiles, window=window)
    tiles = max(config.max_tiles, math.ceil(predict(row).tiles_per_row))
    row = replace(row, max_tiles=tiles)
    return row, predict(row)
