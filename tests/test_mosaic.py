"""Four samples in one picture: labels are where their pictures are, and draws follow from seed and index."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from test_pipeline import SPEC

from vl_jax.data.config import DataConfig, LoadingConfig, PackingConfig
from vl_jax.data.images.augment import AugmentationConfig, augment
from vl_jax.data.images.mosaic import MosaicImage, can_join, filling, join, mosaic
from vl_jax.data.images.spatial import Boxes, Cut, HeldMasks, Instances, PixelMap
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import BadSample, Box, Sample, Turn, image_size
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.heads.detection import Detection

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


class Held:
    """A picture or a map that is there already."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __call__(self) -> Any:
        return PilImage.fromarray(self.values) if self.values.ndim == 3 else self.values


def painted(number: int, size: tuple[int, int], corners: tuple[int, int, int, int], **labels) -> Sample:
    """A black picture with one rectangle in the colour of its number."""
    (width, height), (x0, y0, x1, y1) = size, corners
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = COLOURS[number]
    box = Box(str(number), (float(x0), float(y0), float(x1), float(y1)))
    level = np.where(pixels.any(-1), number + 1, 0).astype(np.uint8)
    found = {
        "boxes": Boxes((box,), size),
        "map": PixelMap(Held(level), size, 255),
        "objects": Instances((box,), HeldMasks((level > 0)[None]), size),
        "kind": "left out",
    }
    return Sample(f"s{number}", (Turn("<image>\n", ""),), (Held(pixels),), labels={**found, **labels})


def test_four_pictures_by_hand():
    # All are 40 x 20. They meet at (20, 10): each is half as large.
    samples = [painted(n, (40, 20), (4 + 2 * n, 2, 20, 12)) for n in range(4)]
    found = join(samples, (40, 20), (20, 10), [(0.5, 0.5)] * 4)
    assert [(b.label, b.corners) for b in found.labels["boxes"].boxes] == [
        ("0", (2.0, 1.0, 10.0, 6.0)),
        ("1", (23.0, 1.0, 30.0, 6.0)),
        ("2", (4.0, 11.0, 10.0, 16.0)),
        ("3", (25.0, 11.0, 30.0, 16.0)),
    ]
    expected = np.zeros((20, 40), np.uint8)
    for n, (x0, y0, x1, y1) in enumerate(((2, 1, 10, 6), (23, 1, 30, 6), (4, 11, 10, 16), (25, 11, 30, 16))):
        expected[y0:y1, x0:x1] = n + 1
    np.testing.assert_array_equal(found.labels["map"].values(), expected)
    np.testing.assert_array_equal(
        found.labels["objects"].values(), expected == np.arange(1, 5)[:, None, None]
    )
    assert set(found.labels) == {"boxes", "map", "objects"} and found.notes == ()
    assert pickle.loads(pickle.dumps(found.labels["map"])).values().shape == (20, 40)


def test_what_a_part_shows_of_its_picture():
    assert filling((40, 20), (10, 10), (0.5, 0.0)) == Cut((10.0, 0.0, 30.0, 20.0), (10, 10))
    assert filling((40, 20), (40, 10), (0.0, 1.0)) == Cut((0.0, 10.0, 40.0, 20.0), (40, 10))


def test_labels_that_a_part_lacks():
    samples = [painted(n, (40, 20), (4, 2, 20, 12)) for n in range(4)]
    bare = {"boxes": samples[1].labels["boxes"]}
    samples[1] = dataclasses.replace(samples[1], labels=bare)
    found = join(samples, (40, 20), (20, 10), [(0.5, 0.5)] * 4)
    assert set(found.labels) == {"boxes", "map"}
    assert (found.labels["map"].values()[:10, 20:] == 255).all()
    assert (found.labels["map"].values()[:, :20] != 255).all()
    # The rectangle of the first is in the columns that are cut off.
    cut = join([painted(0, (80, 20), (0, 2, 10, 12)), *samples[1:]], (40, 20), (20, 10), [(1.0, 0.5)] * 4)
    assert [box.label for box in cut.labels["boxes"].boxes] == ["1", "2", "3"]
    assert [str(note) for note in cut.notes] == [
        "sample s0: a mosaic cuts off 1 of 4 objects [object_cut_off]"
    ]


@st.composite
def quartets(draw) -> list[tuple[tuple[int, int], tuple[int, int, int, int]]]:
    """Sizes of pictures, and a rectangle in each."""
    found = []
    for _ in range(4):
        width, height = draw(st.integers(30, 90)), draw(st.integers(30, 90))
        x0, y0 = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
        corners = x0, y0, draw(st.integers(x0 + 12, width)), draw(st.integers(y0 + 12, height))
        found.append(((width, height), corners))
    return found


@given(quartets(), st.integers(0, 999), st.booleans())
@settings(max_examples=20, deadline=None)
def test_labels_stay_in_the_picture_and_on_their_objects(quartet, seed, augmented):
    samples = [painted(number, *of) for number, of in enumerate(quartet)]
    found = mosaic(samples[0], lambda n: samples[1 + n], 3, np.random.default_rng(seed), min_visible=0.5)
    assert isinstance(found.images[0], MosaicImage) and found.id == "s0"
    if augmented:
        config = AugmentationConfig(crop=0.4, zoom_out=0.4, flip_rate=0.5, hue=0.0)
        found = augment(found, config, np.random.default_rng(seed), length=len)
    size = image_size(samples[0].images[0])
    picture = np.asarray(found.images[0]()).astype(int)
    assert image_size(found.images[0]) == size == picture.shape[1::-1]
    objects = found.labels["objects"]
    for box, mask in zip(objects.boxes, objects.values(), strict=True):
        x0, y0, x1, y1 = box.corners
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
        rows, columns = np.nonzero(mask)
        seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        # The nearest pixel is up to a half away; a crop then enlarges that by 1 / 0.6, and rounds once more.
        np.testing.assert_allclose(seen, box.corners, atol=0.5 / 0.6 + 0.51 if augmented else 0.51)
        if min(x1 - x0, y1 - y0) > 8:  # of smaller ones, most is edge
            away = np.abs(picture[mask] - COLOURS[int(box.label)]).max(axis=1)
            assert np.mean(away < 140) > 0.7  # at an edge about half of a pixel is inside
    values = found.labels["map"].values()
    assert values.shape == picture.shape[:2] and set(np.unique(values)) <= {0, 1, 2, 3, 4, 255}
    assert augmented or 255 not in values


def test_only_pictures_without_words_are_joined():
    plain = painted(0, (40, 20), (4, 2, 20, 12))
    assert can_join(plain)
    for changes in (
        {"turns": (Turn("<image>\nWhat?", ""),)},
        {"turns": (Turn("<image>\n", "red"),)},
        {"system": "Look."},
        {"images": ()},
        {"images": plain.images * 2},
        {"labels": {"kind": "a"}},
        {"media": {"second": Held(np.zeros(3))}},
    ):
        assert not can_join(dataclasses.replace(plain, **changes))

    def broken(record: int) -> Sample:
        raise BadSample("corrupt_image", "no")

    assert mosaic(plain, broken, 9, np.random.default_rng(0), min_visible=0.5) is plain
    with pytest.raises(ValueError, match=r"augmentation.mosaic=1.5: must lie in 0..1"):
        AugmentationConfig(mosaic=1.5)
    with pytest.raises(ValueError, match=r"packing with augmentation.mosaic=0.5"):
        DataConfig(packing=PackingConfig(), augmentation=AugmentationConfig(mosaic=0.5))


def placed(folder, **fields) -> DataConfig:
    records = []
    for number in range(8):
        sample = painted(number % 4, (40, 30), (2 + number, 3, 20, 25))
        sample.images[0]().save(folder / f"{number}.png")
        boxes = [{"label": "a", "bbox": [2 + number, 3, 20, 25]}]
        records.append({"id": str(number), "image": f"{number}.png", "boxes": boxes})
    (folder / "train.json").write_text(json.dumps(records))
    return DataConfig(
        root=str(folder),
        sources=(PlacedConfig("train", "train.json", boxes="boxes"),),
        max_tokens=64,
        tiling=TilingConfig(tile_size=32, views="global"),
        augmentation=AugmentationConfig(mosaic=0.6, **fields),
    )


@pytest.mark.slow
def test_same_seed_and_place_same_bytes(tmp_path):
    config = placed(tmp_path, brightness=0.2, hue=0.1, zoom_out=0.3)
    spec = dataclasses.replace(SPEC, labels=(Detection(("a",), size=32, most_objects=4),))
    first, other = (TrainIterator(config, spec, batch_size=4, seed=seed) for seed in (0, 1))
    assert (next(other).tiles != next(first).tiles).any()
    state, later = json.loads(json.dumps(first.get_state())), [next(first) for _ in range(3)]
    threads = dataclasses.replace(config, loading=LoadingConfig(num_threads=2, cache_mb=0))
    second = TrainIterator(threads, spec, batch_size=4, seed=0)
    second.set_state(state)
    for batch in later:
        jax.tree.map(np.testing.assert_array_equal, batch, next(second))
    counts = np.concatenate([(b.labels["boxes"].values[:, :, 0] >= 0).sum(1) for b in later])
    assert {1, 4} & set(counts.tolist()) and len(set(counts.tolist())) > 1
    for stream in (first, other, second):
        stream.close()


def test_a_source_of_questions_is_told_of_once(tmp_path, caplog):
    config = placed(tmp_path)
    records = json.loads((tmp_path / "train.json").read_text())
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    for record in records:
        record["conversations"] = talk
    (tmp_path / "talk.json").write_text(json.dumps([{**r, "boxes": []} for r in records]))
    asked = dataclasses.replace(config, sources=(LlavaConfig("talk", "talk.json"),))
    with caplog.at_level(logging.WARNING):
        stream = TrainIterator(asked, SPEC, batch_size=4)
        next(stream)
        next(stream)
        stream.close()
    assert sum("not in a mosaic: it has words" in message for message in caplog.messages) == 1
