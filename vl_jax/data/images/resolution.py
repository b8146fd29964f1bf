"""How much of a picture's resolution its tiles keep, and a warning where it is little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vl_jax.data.images.audio import SoundImage
from vl_jax.data.images.tiling import TilingConfig, best_grid
from vl_jax.data.picture import Size
from vl_jax.data.sample import BadSample, Source, image_size

MOST = 4.0  # pixels of a picture, along a side, that become one without a word
_LOOKED = 8  # records of a source that are looked at


def reduction(width: int, height: int, tiling: TilingConfig, *, num_images: int = 1) -> float:
    """How many pixels along a side become one in the finest view of a picture; below 1 it is enlarged.

    Args:
      width, height: of the picture in pixels.
      num_images: images in the whole sample.
    """
    grid = best_grid(width, height, tiling, num_images=num_images)
    ratios = width / (grid[0] * tiling.tile_size), height / (grid[1] * tiling.tile_size)
    return min(ratios) if tiling.fit == "crop" else max(ratios)


def coarse(sizes: Sequence[Size], tiling: TilingConfig, *, num_images: int) -> list[Size]:
    """Those of the pictures of a sample that lose more than ``MOST``."""
    return [size for size in sizes if reduction(*size, tiling, num_images=num_images) > MOST]


def describe(size: Size, tiling: TilingConfig) -> str:
    """What becomes of a picture of that size."""
    times = reduction(*size, tiling)
    width, height = (max(1, round(side / times)) for side in size)
    return f"{size[0]}x{size[1]} becomes {width}x{height}"


def resolution_warning(sources: Mapping[str, Source], tiling: TilingConfig) -> str:
    """One line about the sources of which most pictures lose more than ``MOST``; empty if there is none.

    Only the sizes in the headers of the first records are read.
    """
    found = []
    for name, source in sources.items():
        lossy, total = [], 0
        for record in range(min(_LOOKED, len(source))):
            try:
                images = source[record].images
                sizes = [image_size(image) for image in images if not isinstance(image, SoundImage)]
            except BadSample:  # counted and logged where it is trained on
                continue
            lossy += coarse(sizes, tiling, num_images=len(images))
            total += len(sizes)
        if 2 * len(lossy) > total:
            found.append(f"{name!r} ({describe(max(lossy), tiling)})")
    if not found:
        return ""
    remedy = "give data.tiling a larger tile_size (and the encoder that image_size)"
    if tiling.views == "global":
        remedy += ", or views='global_local' and data.max_tiles for more tiles"
    else:
        remedy += ", or larger grids as candidates and data.max_tiles for them"
    return f"pictures lose more than {MOST:g}x of their resolution in {', '.join(found)}: {remedy}"
