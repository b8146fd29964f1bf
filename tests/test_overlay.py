"""Labels drawn on pictures, by hand, and on the page of ``inspect data``."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image as PilImage
from test_mosaic import SPEC, Held, painted, placed

from vl_jax.data.images import palette
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.spatial import Boxes, HeldMasks, Instances, PixelMap
from vl_jax.data.sample import Box
from vl_jax.data.tools.overlay import overlays
from vl_jax.data.tools.preview import render_samples, to_html
from vl_jax.heads.detection import Detection


def drawn(sample, classes=None):
    return {o.caption.partition(":")[0]: o for o in overlays(sample, classes or {})}


def test_a_map_is_laid_over_its_pixels_and_the_rest_stays():
    levels = np.zeros((20, 40), np.uint8)
    levels[:, 10:20], levels[:, 30:] = 1, 255
    sample = painted(3, (40, 20), (0, 0, 40, 20), map=PixelMap(Held(levels), (40, 20), 255))
    found = drawn(sample, {"map": ("road", "<car>")})["map"]
    pixels, colours = np.asarray(found.picture).astype(int), palette.colours(2).astype(int)
    for columns, expected in ((slice(0, 10), colours[0]), (slice(10, 20), colours[1])):
        mixed = np.full((20, 10, 3), 0.45 * 255 + 0.55 * expected)
        np.testing.assert_allclose(pixels[:20, columns], mixed, atol=1)
    assert (pixels[:20, 30:] == 255).all() and found.picture.height > 20  # a legend below
    assert found.caption == "map: road 50%, <car> 25%; 25% of the pixels say nothing"


def test_objects_boxes_and_depth():
    depth = np.linspace(1, 3, 800, dtype=np.float32).reshape(20, 40)
    depth[:, :10] = 0
    sample = painted(0, (40, 20), (2, 2, 20, 18), depth=PixelMap(Held(depth), (40, 20), 0.0))
    found = drawn(sample)
    assert found["depth"].caption == "depth: 1.025 to 3; 25% of the pixels say nothing"
    assert found["boxes"].caption == "boxes: 1 0"
    plain = np.asarray(sample.images[0]()).astype(int)
    masked = np.asarray(found["objects"].picture).astype(int)
    assert (masked[16, 19] != plain[16, 19]).any() and (masked[19, 39] == plain[19, 39]).all()
    empty = dataclasses.replace(sample, labels={"boxes": Boxes((), (40, 20))})
    assert drawn(empty)["boxes"].caption == "boxes: no object"


def test_a_label_that_cannot_be_read_says_why():
    wrong = PixelMap(Held(np.zeros((3, 3), np.uint8)), (40, 20), 255)
    masks = Instances((Box("a", (0.0, 0.0, 1.0, 1.0)),), HeldMasks(np.zeros((2, 20, 40), bool)), (40, 20))
    found = drawn(painted(0, (40, 20), (2, 2, 9, 9), map=wrong, objects=masks, boxes=Boxes((), (9, 9))))
    assert "a map of [3, 3] pixels, its picture is 20 x 40" in found["map"].caption
    assert "2 masks of 1 objects" in found["objects"].caption
    assert "of (9, 9) pixels, its picture of (40, 20)" in found["boxes"].caption


def test_the_page_draws_labels_and_draws(tmp_path):
    spec = dataclasses.replace(SPEC, labels=(Detection(("a",), size=32, most_objects=4),))
    config = dataclasses.replace(placed(tmp_path), augmentation=AugmentationConfig(mosaic=1.0))
    (preview,) = render_samples(config, spec, "train", count=1)
    page = to_html([preview])
    assert page.count("<figure>") == 1 and "<figcaption>boxes: 1 a</figcaption>" in page
    assert len(preview.augmented) == 2 and all(p.size == (40, 30) for p in preview.augmented)
    assert len({p.tobytes() for p in preview.augmented}) == 2
    assert isinstance(preview.labelled[0].picture, PilImage.Image)
