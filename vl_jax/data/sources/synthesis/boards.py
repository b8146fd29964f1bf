"""Circuit boards with defects, each with its board without any: the six kinds of DeepPCB under its names.

A board is wires along a grid, in eight directions, with pads where they end and wide patches of copper. All
of it is whole numbers: the net that each pixel belongs to, 0 where there is no copper. A defect is tried at
random places until what it changes has to do with as many nets as its kind says.

Source of the kinds: Tang et al. 2019, "Online PCB defect detector on a new PCB defect dataset".
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image as PilImage

from vl_jax.data.images.difference import Difference
from vl_jax.data.images.spatial import Boxes, Instances, PixelMap
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Box, Image, Sample, Turn
from vl_jax.data.sources.synthesis.camera import CameraConfig, choose_shot, photograph
from vl_jax.data.sources.synthesis.wiring import Board, Defect, make_board, make_defects

DefectKind = Literal["open circuit", "short circuit", "mouse bite", "spur", "spurious copper", "pin hole"]
DEFECTS: tuple[DefectKind, ...] = (
    "open circuit", "short circuit", "mouse bite", "spur", "spurious copper", "pin hole",
)  # fmt: skip


@dataclass(frozen=True)
class SyntheticBoardsConfig:
    """A range of circuit boards."""

    name: str
    num_examples: int = 100_000
    seed: int = 0
    first: int = 0  # index of the first board: ranges that do not meet are held out from one another
    image_size: int = 128  # pixels, square
    pitch: tuple[int, int] = (12, 24)  # pixels from wire to wire, chosen for each board; DeepPCB has 20 to 60
    min_defects: int = 1  # as far as places are found for them
    max_defects: int = 5
    kinds: tuple[DefectKind, ...] = DEFECTS
    margin: float = 0.3  # around a defect in its box, in pitches: DeepPCB's boxes have one
    # Where the board without defects comes. "difference": in one picture with the board under test, whose
    # channels are this board, the one without defects and how far they differ.
    template: Literal["first", "second", "none", "difference"] = "second"
    shift: int = 0  # the most pixels, each way, by which the two boards do not lie on one another
    questions: bool = True  # without them, augmentation may crop boards and mirror them
    binary: bool = True  # whether pictures become black and white, as those of DeepPCB
    camera: CameraConfig = CameraConfig(lighting=0.0, blur=1.0, noise=24.0, compression=0.0)

    def __post_init__(self):
        if not self.name:
            raise ValueError("name='' of a source: must not be empty")
        least = {"num_examples": 1, "first": 0, "image_size": 48, "min_defects": 0, "shift": 0}
        for field, limit in least.items():
            if getattr(self, field) < limit:
                raise ValueError(
                    f"{field}={getattr(self, field)} of source {self.name!r}: must be at least {limit}"
                )
        if self.max_defects < self.min_defects:
            raise ValueError(
                f"max_defects={self.max_defects} of source {self.name!r}: must be at least min_defects="
                f"{self.min_defects}"
            )
        low, high = self.pitch
        if not 10 <= low <= high <= self.image_size // 4:
            raise ValueError(
                f"pitch={self.pitch} of source {self.name!r}: must be two numbers from 10 to a quarter of "
                f"image_size={self.image_size}, the lower one first"
            )
        if not self.kinds:
            raise ValueError(f"kinds of source {self.name!r}: must not be empty")
        if not 0 <= self.margin <= 2:
            raise ValueError(f"margin={self.margin} of source {self.name!r}: must lie in 0..2")

    def open(self, root: str, *, orientation: Orientation = "shown") -> SyntheticBoards:
        """The source; it reads no file, and its pictures have one orientation."""
        return SyntheticBoards(self)


class SyntheticBoards:
    """Random access to boards.

    Labels of a sample, all of the board under test: ``boxes`` (``Boxes``), ``instances`` (``Instances``: the
    pixels that differ from the template) and ``classes`` (``PixelMap``: 0, then the kinds in the order of
    ``DEFECTS``).
    """

    def __init__(self, config: SyntheticBoardsConfig):
        self._config = config

    def __len__(self) -> int:
        return self._config.num_examples

    def __getitem__(self, index: int) -> Sample:
        """The sample of one board; its pictures are drawn when they are asked for."""
        if not 0 <= index < len(self):
            raise IndexError(f"board {index} of {len(self)}")
        config, number = self._config, self._config.first + index
        pair = BoardPair(config, number)
        boxes, size = pair.boxes, (config.image_size, config.image_size)
        tested, whole = BoardImage(pair, whole=False), BoardImage(pair, whole=True)
        name = f"synthetic-board-{config.seed}-{number}"
        images: tuple[Image, ...] = {
            "first": (whole, tested),
            "second": (tested, whole),
            "none": (tested,),
            "difference": (Difference(tested, whole, f"sample {name}"),),
        }[config.template]
        lead = f"{IMAGE_PLACEHOLDER}\n" * len(images)
        return Sample(
            id=name,
            turns=_ask(boxes, lead) if config.questions else (Turn(lead, "", kind=TEXT),),
            images=images,
            labels={
                "boxes": Boxes(boxes, size),
                "classes": PixelMap(pair.classes, size, 255.0),
                "instances": Instances(boxes, pair.masks, size),
            },
        )


@dataclass(frozen=True)
class BoardPair:
    """A board without and with defects; what is drawn of it once is kept with it."""

    config: SyntheticBoardsConfig
    number: int

    @functools.cached_property
    def _made(self) -> tuple[Board, tuple[Defect, ...]]:
        config = self.config
        rng = random.Random(f"board/{config.seed}/{self.number}")
        board = make_board(config.image_size, rng.randint(*config.pitch), rng)
        count = rng.randint(config.min_defects, config.max_defects)
        margin = round(config.margin * board.pitch)
        return board, make_defects(board, [rng.choice(config.kinds) for _ in range(count)], margin, rng)

    def copper(self, *, whole: bool) -> Bool[np.ndarray, "h w"]:
        """Where there is copper, on the template or on the board under test."""
        board, defects = self._made
        copper = board.nets > 0
        for defect in () if whole else defects:
            copper[defect.rows, defect.columns] ^= defect.changed
        return copper

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The defects, with a margin."""
        return tuple(Box(defect.kind, defect.corners) for defect in self._made[1])

    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """The pixels that each defect changes."""
        size, defects = self.config.image_size, self._made[1]
        masks = np.zeros((len(defects), size, size), bool)
        for mask, defect in zip(masks, defects, strict=True):
            mask[defect.rows, defect.columns] = defect.changed
        return masks

    def classes(self) -> UInt8[np.ndarray, "h w"]:
        """0 where the board is as it should be, else the kind of defect, counted from 1."""
        classes = np.zeros((self.config.image_size, self.config.image_size), np.uint8)
        for defect in self._made[1]:
            classes[defect.rows, defect.columns][defect.changed] = 1 + [*DEFECTS].index(defect.kind)
        return classes


@dataclass(frozen=True)
class BoardImage:
    """One of the two pictures of a board."""

    pair: BoardPair
    whole: bool  # the one without defects

    def __call__(self) -> PilImage.Image:
        """The RGB picture: copper is dark, as it is in DeepPCB."""
        config = self.pair.config
        rng = random.Random(f"picture {self.whole}/{config.seed}/{self.pair.number}")
        copper = self.pair.copper(whole=self.whole)
        if self.whole and config.shift:
            copper = _shifted(copper, config.shift, rng)
        light = np.where(copper, np.float32(20), np.float32(235))
        pixels = photograph(np.repeat(light[..., None], 3, -1), choose_shot(config.camera, rng), rng)
        if config.binary:
            pixels = np.repeat(np.where(pixels[..., 1:2] < 128, np.uint8(0), np.uint8(255)), 3, -1)
        return PilImage.fromarray(pixels)

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pair.config.image_size, self.pair.config.image_size


def _shifted(copper: Bool[np.ndarray, "h w"], most: int, rng: random.Random) -> Bool[np.ndarray, "h w"]:
    """The board a few pixels off; what comes in at a side is as the side is."""
    height, width = copper.shape
    down, right = (rng.randint(0, 2 * most) for _ in range(2))
    return np.pad(copper, most, "edge")[down : down + height, right : right + width]


def _ask(boxes: tuple[Box, ...], lead: str) -> tuple[Turn, ...]:
    """Which kinds there are, and how many defects."""
    kinds = [kind for kind in DEFECTS if any(box.label == kind for box in boxes)]
    return (
        Turn(f"{lead}which defects does the board have?", ", ".join(kinds) or "none", "defect", "en", boxes),
        Turn("how many defects are there?", str(len(boxes)), "count", "en", boxes),
        Turn("电路板上有几处缺陷？", str(len(boxes)), "count", "zh", boxes),
    )
