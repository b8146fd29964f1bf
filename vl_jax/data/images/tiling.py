"""Images to tiles, and the layout of an image's visual tokens in the sequence (DeepSeek-VL2).

A picture is seen twice: whole (the *global* view, one tile) and in detail (the *local* view, a grid of
``tw x th`` tiles whose shape suits the picture). With ``h x h`` tokens a tile, reading order is::

    global: h rows, each ended by a newline     . . n        (h = 2)
                                                . . n
    separator                                   s
    local: one mosaic of (th*h) x (tw*h), rows  . . . . n    (grid 2 x 1)
           span tiles and end in a newline      . . . . n

A model may also read the local view first; the tiles themselves always begin with the global view.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps

from vl_jax.data.images.spatial import Cut
from vl_jax.data.picture import Orientation

Grid = tuple[int, int]  # tiles across, tiles down
Views = Literal["global_local", "local_global", "global"]  # what a picture shows, in reading order
Fit = Literal["pad", "crop", "stretch"]  # how a picture of another shape becomes a view

# The order decides exact ties only; it is that of the published processor.
DEFAULT_GRIDS: tuple[Grid, ...] = (
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1),
    (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
)  # fmt: skip


@dataclass(frozen=True)
class TilingConfig:
    """How a picture becomes square tiles."""

    tile_size: int = 384  # pixels
    candidates: tuple[tuple[int, int], ...] = DEFAULT_GRIDS  # grids (across, down)
    max_tiled_images: int = 2  # a sample with more images keeps each in a single tile
    views: Views = "global_local"
    padding_colour: tuple[int, int, int] = (127, 127, 127)  # int(255 * mean of the normalisation)
    fit: Fit = "pad"  # whole with a margin; cut around its centre (CLIP); or out of proportion (SigLIP)
    orientation: Orientation = "shown"  # as EXIF turns it and people see it; or as its pixels are stored

    def __post_init__(self):
        if self.tile_size < 1:
            raise ValueError(f"tile_size={self.tile_size}: must be at least 1")
        if not self.candidates or any(w < 1 or h < 1 for w, h in self.candidates):
            raise ValueError(f"candidates={self.candidates}: needs pairs of at least (1, 1)")
        if self.max_tiled_images < 0:
            raise ValueError(f"max_tiled_images={self.max_tiled_images}: must not be negative")
        if self.orientation not in ("shown", "stored"):
            raise ValueError(f"orientation={self.orientation!r}: must be 'shown' or 'stored'")
        if any(not 0 <= level <= 255 for level in self.padding_colour):
            raise ValueError(f"padding_colour={self.padding_colour}: grey levels must lie in 0..255")


def best_grid(width: int, height: int, config: TilingConfig, *, num_images: int = 1) -> Grid:
    """The grid that keeps most of the picture's pixels, then wastes least, then comes first.

    Args:
      width, height: size of the picture in pixels.
      num_images: images in the whole sample; above ``max_tiled_images`` the grid is (1, 1).
    """
    if config.views == "global" or num_images > config.max_tiled_images:
        return (1, 1)
    return _best_grid(width, height, config.tile_size, config.candidates)


@functools.lru_cache(maxsize=4096)
def _best_grid(width: int, height: int, tile_size: int, candidates: tuple[Grid, ...]) -> Grid:
    def merit(grid: Grid) -> tuple[int, int]:
        across, down = grid[0] * tile_size, grid[1] * tile_size
        scale = min(across / width, down / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - across * down

    return max(candidates, key=merit)


def num_views_tiles(grid: Grid, views: Views) -> int:
    """How many tiles one picture takes."""
    return 1 if views == "global" else 1 + grid[0] * grid[1]


def make_tiles(image: PilImage.Image, *, grid: Grid, config: TilingConfig, quick: bool = False) -> np.ndarray:
    """The tiles of an RGB picture, global view first, then the grid row by row: ``u8[m, tile, tile, 3]``.

    Each view is the picture resized (bicubic) to fit as ``config.fit`` says; margins are ``padding_colour``.

    Args:
      quick: where the grid is as wide as high, the global view is made from the local one, by averages (which
        may shift it by half a pixel).
    """
    size = config.tile_size
    if config.views == "global":
        return np.asarray(_fit(image, (size, size), config))[None]
    across, down = grid
    mosaic = _fit(image, (across * size, down * size), config)
    if quick and across == down:
        overview = mosaic.reduce(across) if across > 1 else mosaic
    else:
        overview = _fit(image, (size, size), config)
    local = np.asarray(mosaic).reshape(down, size, across, size, 3).swapaxes(1, 2)
    return np.concatenate([np.asarray(overview)[None], local.reshape(-1, size, size, 3)])


def shown(size: tuple[int, int], config: TilingConfig) -> Cut:
    """What the global view, the first tile, shows of a picture of that width and height."""
    (width, height), side = size, config.tile_size
    across, down = float(width), float(height)  # of the picture, in the whole tile
    left = top = 0.0
    if config.fit == "pad":
        # As ``ImageOps.pad``: one side fits, the other is rounded, and the margins are as even as can be.
        drawn = (side, side)
        if width > height:
            drawn = side, max(round(height / width * side), 1)
        elif height > width:
            drawn = max(round(width / height * side), 1), side
        offset = round((side - drawn[0]) * 0.5), round((side - drawn[1]) * 0.5)
        across, down = side * width / drawn[0], side * height / drawn[1]
        left, top = -offset[0] * width / drawn[0], -offset[1] * height / drawn[1]
    elif config.fit == "crop" and (width, height) != (side, side):
        shorter = min(width, height)
        drawn = side * width // shorter, side * height // shorter
        across, down = side * width / drawn[0], side * height / drawn[1]
        left = (drawn[0] - side) // 2 * width / drawn[0]
        top = (drawn[1] - side) // 2 * height / drawn[1]
    return Cut((left, top, left + across, top + down), (side, side))


def visual_sources(num_tiles: int, tile_tokens: int) -> tuple[int, int]:
    """Rows of the table drawn in ``batch`` that hold the newline and the separator vector."""
    return num_tiles * tile_tokens, num_tiles * tile_tokens + 1


@functools.lru_cache(maxsize=4096)
def layout(grid: Grid, *, tile_tokens_side: int, views: Views, first_tile: int, num_tiles: int) -> np.ndarray:
    """Where each visual token of one picture comes from, in reading order: ``i32[s]``.

    Args:
      grid: tiles across and down of the local view.
      tile_tokens_side: ``h``, so that a tile has ``n = h * h`` tokens.
      first_tile: index of the picture's first tile among the tiles of the row.
      num_tiles: static number of tiles of a row, which places newline and separator in the table.

    Returns:
      ``n * tile + h * row + column`` for a token of a tile, else the newline's or separator's index
      (``visual_sources``).
    """
    n = tile_tokens_side**2
    newline, separator = visual_sources(num_tiles, n)
    tokens = np.arange(n, dtype=np.int32).reshape(tile_tokens_side, tile_tokens_side)
    parts = [_end_rows(tokens + first_tile * n, newline)]
    if views != "global":
        across, down = grid
        tiles = (first_tile + 1 + np.arange(across * down, dtype=np.int32)).reshape(down, 1, across, 1)
        mosaic = (tiles * n + tokens[None, :, None, :]).reshape(down * tile_tokens_side, -1)
        parts += [np.array([separator], np.int32), _end_rows(mosaic, newline)]
    result = np.concatenate(parts if views != "local_global" else parts[::-1])
    result.setflags(write=False)  # The next picture of this shape gets the same array.
    return result


def num_visual_tokens(grid: Grid, *, tile_tokens_side: int, views: Views) -> int:
    """The length of ``layout``: ``h (h+1)``, and with a local view ``1 + th h (tw h + 1)`` more."""
    h = tile_tokens_side
    overview = h * (h + 1)
    return overview if views == "global" else overview + 1 + grid[1] * h * (grid[0] * h + 1)


def max_visual_tokens(config: TilingConfig, *, tile_tokens_side: int, max_tiles: int) -> int:
    """The most visual tokens that pictures with ``max_tiles`` tiles in all can have."""
    costs = {}
    for grid in {(1, 1), *config.candidates}:
        tiles = num_views_tiles(grid, config.views)
        tokens = num_visual_tokens(grid, tile_tokens_side=tile_tokens_side, views=config.views)
        costs[tiles] = max(tokens, costs.get(tiles, 0))
    most = [0] * (max_tiles + 1)
    for total in range(1, max_tiles + 1):
        most[total] = max([most[total - t] + s for t, s in costs.items() if t <= total], default=0)
    return most[max_tiles]


def _fit(image: PilImage.Image, size: tuple[int, int], config: TilingConfig) -> PilImage.Image:
    resample = PilImage.Resampling.BICUBIC
    if image.size == size:
        return image
    if config.fit == "pad":
        return ImageOps.pad(image, size, method=resample, color=config.padding_colour)
    if config.fit == "stretch":
        return image.resize(size, resample)
    (width, height), (across, down) = image.size, size
    # The side that is shorter for this shape fits, the other is rounded down, as published processors do.
    if across * height >= down * width:
        image = image.resize((across, across * height // width), resample)
    else:
        image = image.resize((down * width // height, down), resample)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.crop((left, top, left + across, top + down))


def _end_rows(rows: np.ndarray, newline: int) -> np.ndarray:
    ends = np.full((rows.shape[0], 1), newline, np.int32)
    return np.concatenate([rows.astype(np.int32), ends], axis=1).reshape(-1)
