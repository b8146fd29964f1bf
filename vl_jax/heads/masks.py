"""Masks of objects: packed into labels, as shares of coarse cells, from prototypes, and as run lengths.

A label is a row of u32 numbers an object: five of them are the bits of the float32 class, x0, y0, x1, y1, the
others hold the mask row by row, a bit a pixel, in whole numbers for each row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, UInt32
from PIL import Image as PilImage

_Either = Array | np.ndarray  # a label on the device, or on the host
_WORD = 32  # bits of a number
_PLACE = 5  # numbers before the mask: class and corners


def label_width(size: int) -> int:
    """How many numbers an object has, with a mask of ``size`` x ``size`` pixels."""
    return _PLACE + size * -(-size // _WORD)


def pack(objects: Float[np.ndarray, "G 5"], masks: Bool[np.ndarray, "n s s"]) -> UInt32[np.ndarray, "G w"]:
    """The label of a picture: its objects, of which the first n have masks."""
    size = masks.shape[-1]
    result = np.zeros((len(objects), label_width(size)), np.uint32)
    result[:, :_PLACE] = np.ascontiguousarray(objects, np.float32).view(np.uint32)
    across = -(-size // _WORD) * _WORD - size
    bits = np.packbits(np.pad(masks, ((0, 0), (0, 0), (0, across))), axis=-1, bitorder="little")
    result[: len(masks), _PLACE:] = bits.view("<u4").reshape(len(masks), result.shape[1] - _PLACE)
    return result


def objects_in(label: UInt32[_Either, "*rows G w"]) -> Float[Array, "*rows G 5"]:
    """Class, x0, y0, x1, y1 of every object of a label."""
    return jax.lax.bitcast_convert_type(jnp.asarray(label)[..., :_PLACE], jnp.float32)


def masks_in(label: UInt32[_Either, "*rows G w"], size: int) -> Bool[Array, "*rows G s s"]:
    """The masks of every object of a label."""
    words = jnp.asarray(label)[..., _PLACE:]
    bits = (words[..., None] >> jnp.arange(_WORD, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], size, -1)[..., :size] > 0


def covered(
    low: Float[Array, "*n"], high: Float[Array, "*n"], *, cells: int, size: int
) -> Float[Array, "*n u"]:
    """Which share of each of so many equal cells of a side lies between two places on it."""
    side = size / cells
    begin = jnp.arange(cells, dtype=jnp.float32) * side
    common = jnp.minimum(high[..., None], begin + side) - jnp.maximum(low[..., None], begin)
    return jnp.maximum(common, 0.0) / side


def shares(masks: Bool[Array, "G s s"], shape: tuple[int, int]) -> Float[Array, "G u v"]:
    """Which share of each cell of a grid over the tile a mask covers."""
    size = masks.shape[-1]
    pixel = jnp.arange(size, dtype=jnp.float32)
    down, across = (covered(pixel, pixel + 1.0, cells=cells, size=size) for cells in shape)
    return jnp.einsum("gyx,yu,xv->guv", masks.astype(jnp.float32), down, across)


def within(boxes: Float[Array, "G 4"], shape: tuple[int, int], size: int) -> Float[Array, "G u v"]:
    """Which share of each cell of a grid over the tile a box covers."""
    down, across = (
        covered(boxes[:, axis], boxes[:, axis + 2], cells=cells, size=size)
        for axis, cells in ((1, shape[0]), (0, shape[1]))
    )
    return down[:, :, None] * across[:, None, :]


def cross_entropy(
    logits: Float[Array, "G k u v"], masks: Float[Array, "G u v"], inside: Float[Array, "G u v"]
) -> Float[Array, "G k"]:
    """That of ``k`` guesses of every object's mask in nats, averaged over the area of the object's box.

    Args:
      masks: the share of each cell that the object covers.
      inside: the share of each cell that its box covers; what is outside counts for nothing. A box without
        an area has a loss of 0.
    """
    losses = optax.sigmoid_binary_cross_entropy(logits, masks[:, None])
    weights = inside / jnp.maximum(jnp.sum(inside, axis=(1, 2), keepdims=True), 1e-6)
    return jnp.sum(losses * weights[:, None], axis=(2, 3))


def from_prototypes(
    prototypes: Float[np.ndarray, "u v P"],
    coefficients: Float[np.ndarray, "n P"],
    boxes: Float[np.ndarray, "n 4"],
    size: int,
) -> Bool[np.ndarray, "n s s"]:
    """Said masks in pixels of the tile: sigmoid(prototypes @ coefficients) above one half, within the box.

    Logits are enlarged, bilinear. A pixel is within a box if its middle is.
    """
    middle = np.arange(size) + 0.5
    result = np.zeros((len(boxes), size, size), bool)
    for mask, (x0, y0, x1, y1), of in zip(result, boxes, coefficients, strict=True):
        logits = PilImage.fromarray((prototypes @ of).astype(np.float32))
        fine = np.asarray(logits.resize((size, size), PilImage.Resampling.BILINEAR))
        rows, columns = (middle >= y0) & (middle < y1), (middle >= x0) & (middle < x1)
        mask[:] = (fine > 0) & rows[:, None] & columns[None]
    return result


def run_lengths(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """A mask as JSON, in COCO's form: ``size`` [h, w], and ``counts`` of pixels without and with, by turns.

    Pixels are counted down the columns, from the left; the first count is of those without, 0 if there are
    none.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes.tolist(), flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat.size and flat[0] else counts}


def from_run_lengths(said: dict[str, Any]) -> Bool[np.ndarray, "h w"]:
    """The mask that ``run_lengths`` gave.

    Raises:
      ValueError: the counts are not as many as its pixels.
    """
    (height, width), counts = said["size"], said["counts"]
    if sum(counts) != height * width:
        raise ValueError(f"counts of {sum(counts)} pixels, expected {height * width} of size={said['size']}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape((height, width), order="F")
