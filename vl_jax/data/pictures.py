"""The pictures of a sample: decoded, cut into tiles, and laid out in the sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image as PilImage

from vl_jax.data import images
from vl_jax.data.sample import BadSample, Image, ReducibleImage, Sample, image_size


@dataclass(frozen=True)
class Pictures:
    """All tiles of a sample, and each image's grid and layout."""

    tiles: np.ndarray  # u8[m h w c]
    grids: tuple[images.Grid, ...]
    layouts: tuple[np.ndarray, ...]  # i32[s] of each, see ``images.layout``


def read_pictures(
    sample: Sample, tiling: images.TilingConfig, *, tile_tokens_side: int, max_tiles: int, quick: bool
) -> Pictures:
    """Opens and tiles the images of a sample.

    Args:
      quick: nearly the same tiles in less time, see ``encode.Decoding``.

    Raises:
      BadSample: an image cannot be used, or they need more than ``max_tiles`` tiles.
    """
    count = len(sample.images)
    decoded = [_decode(image, count, tiling, quick) for image in sample.images]
    grids = tuple(grid for _, grid in decoded)
    needed = [images.num_views_tiles(grid, tiling.views) for grid in grids]
    if sum(needed) > max_tiles:
        message = f"sample {sample.id}: {count} images in {sum(needed)} tiles, limit {max_tiles}"
        raise BadSample("too_many_tiles", message)
    stacks = [images.make_tiles(p, grid=grid, config=tiling, quick=quick) for p, grid in decoded]
    layouts = [
        images.layout(
            grid,
            tile_tokens_side=tile_tokens_side,
            views=tiling.views,
            first_tile=sum(needed[:i]),
            num_tiles=max_tiles,
        )
        for i, grid in enumerate(grids)
    ]
    size = tiling.tile_size
    tiles = np.concatenate(stacks) if stacks else np.zeros((0, size, size, 3), np.uint8)
    return Pictures(tiles, grids, tuple(layouts))


def _decode(
    image: Image, count: int, tiling: images.TilingConfig, quick: bool
) -> tuple[PilImage.Image, images.Grid]:
    """The picture, and the grid that suits its whole size."""
    reducible = image if quick and isinstance(image, ReducibleImage) else None
    picture = image() if reducible is None else None
    width, height = image_size(image) if picture is None else picture.size
    grid = images.best_grid(width, height, tiling, num_images=count)
    if reducible is not None:
        side = tiling.tile_size  # The finest view is fitted into its tiles.
        scale = min(grid[0] * side / width, grid[1] * side / height)
        picture = reducible.at_least(math.ceil(width * scale), math.ceil(height * scale))
    assert picture is not None
    return picture, grid
