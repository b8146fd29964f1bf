"""The pictures of a sample: decoded, cut into tiles, and laid out in the sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image as PilImage

from vl_jax.data.files.memory_cache import MemoryCache
from vl_jax.data.images.tiling import Grid, TilingConfig, best_grid, layout, make_tiles, num_views_tiles
from vl_jax.data.sample import BadSample, Image, ReducibleImage, Sample, image_key, image_size


@dataclass(frozen=True)
class Pictures:
    """All tiles of a sample, and each image's grid and layout."""

    tiles: np.ndarray  # u8[m h w c], not to be changed
    grids: tuple[Grid, ...]
    layouts: tuple[np.ndarray, ...]  # i32[s] of each, see ``tiling.layout``


def read_pictures(
    sample: Sample,
    tiling: TilingConfig,
    *,
    tile_tokens_side: int,
    max_tiles: int,
    quick: bool,
    cache: MemoryCache,
) -> Pictures:
    """Opens and tiles the images of a sample.

    Args:
      quick: nearly the same tiles in less time, see ``encode.Decoding``.
      cache: has the tiles of files that were opened before, made in the same way.

    Raises:
      BadSample: an image cannot be used, or they need more than ``max_tiles`` tiles.
    """
    count, size = len(sample.images), tiling.tile_size
    if not count:
        return Pictures(np.zeros((0, size, size, 3), np.uint8), (), ())
    keys = [_tiles_key(image, count, tiling) for image in sample.images]
    # Of each image its tiles, if they are known, or else the picture; and the grid.
    found = [
        (None if key is None else cache.get(key)) or _decode(image, count, tiling, quick)
        for key, image in zip(keys, sample.images, strict=True)
    ]
    grids = tuple(grid for _, grid in found)
    needed = [num_views_tiles(grid, tiling.views) for grid in grids]
    if sum(needed) > max_tiles:
        message = f"sample {sample.id}: {count} images in {sum(needed)} tiles, limit {max_tiles}"
        raise BadSample("too_many_tiles", message)
    stacks = []
    for key, (tiles, grid) in zip(keys, found, strict=True):
        if isinstance(tiles, PilImage.Image):
            tiles = make_tiles(tiles, grid=grid, config=tiling, quick=quick)
            if key is not None:
                cache.put(key, (tiles, grid), size=tiles.nbytes)
        stacks.append(tiles)
    layouts = [
        layout(
            grid,
            tile_tokens_side=tile_tokens_side,
            views=tiling.views,
            first_tile=sum(needed[:i]),
            num_tiles=max_tiles,
        )
        for i, grid in enumerate(grids)
    ]
    return Pictures(stacks[0] if count == 1 else np.concatenate(stacks), grids, tuple(layouts))


def _tiles_key(image: Image, count: int, tiling: TilingConfig) -> tuple[object, str] | None:
    """What the tiles of an image follow from, besides the tiling; None where that is not known."""
    key = image_key(image)
    return None if key is None else (key, "one tile" if count > tiling.max_tiled_images else "tiles")


def _decode(image: Image, count: int, tiling: TilingConfig, quick: bool) -> tuple[PilImage.Image, Grid]:
    """The picture, and the grid that suits its whole size."""
    reducible = image if quick and isinstance(image, ReducibleImage) else None
    picture = image() if reducible is None else None
    width, height = image_size(image) if picture is None else picture.size
    grid = best_grid(width, height, tiling, num_images=count)
    if reducible is not None:
        side = tiling.tile_size  # The finest view is fitted into its tiles.
        scales = grid[0] * side / width, grid[1] * side / height
        scale = min(scales) if tiling.fit == "pad" else max(scales)
        picture = reducible.at_least(math.ceil(width * scale), math.ceil(height * scale))
    assert picture is not None
    return picture, grid
