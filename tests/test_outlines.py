"""Polygons and runs as COCO writes them: by hand, against its own package, and in records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.images.frames import DeclaredFrame
from vl_jax.data.images.outlines import outline, unpacked
from vl_jax.data.images.spatial import Instances
from vl_jax.data.sample import BadSample
from vl_jax.data.sources.build import open_source
from vl_jax.data.sources.placed import PlacedConfig

PENNFUDAN = Path(__file__).parent.parent.parent / "shared" / "data" / "pennfudan"
FRAME = DeclaredFrame((6, 4), (6, 4))


def test_masks_by_hand():
    square = outline([[1, 1, 4, 1, 4, 3, 1, 3]], FRAME, "")()
    expected = np.zeros((4, 6), bool)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(square, expected)
    both = outline([[1, 1, 4, 1, 4, 3, 1, 3], [5, 0, 6, 0, 6, 1, 5, 1]], FRAME, "")()
    expected[0, 5] = True
    np.testing.assert_array_equal(both, expected)
    # Columns of four pixels: five outside, two inside, and so on.
    runs = outline({"size": [4, 6], "counts": [5, 2, 2, 2, 2, 2, 9]}, FRAME, "")()
    expected[0, 5] = False
    np.testing.assert_array_equal(runs, expected)
    # The same in a picture of twice the size, and one that is turned (EXIF orientation 6).
    large = outline({"size": [4, 6], "counts": [5, 2, 2, 2, 2, 2, 9]}, DeclaredFrame((6, 4), (12, 8)), "")()
    np.testing.assert_array_equal(large, np.kron(expected, np.ones((2, 2), bool)))
    corner = {"size": [4, 6], "counts": [0, 1, 23]}
    turned = outline(corner, DeclaredFrame((6, 4), (6, 4), 6), "")()
    assert turned.shape == (6, 4) and turned[0, 3] and turned.sum() == 1
    polygon = outline([[0, 0, 1, 0, 1, 1, 0, 1]], DeclaredFrame((6, 4), (6, 4), 6), "")()
    np.testing.assert_array_equal(polygon, turned)


@given(st.integers(0, 9999), st.sampled_from([0.02, 0.3, 0.9]))
@settings(max_examples=60, deadline=None)
def test_runs_are_those_of_coco(seed, density):
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 80, 2).tolist()
    mask = rng.random((height, width)) < density
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    frame = DeclaredFrame((width, height), (width, height))
    np.testing.assert_array_equal(outline({"size": [height, width], "counts": packed}, frame, "")(), mask)
    counts = unpacked(packed)
    assert counts is not None and sum(counts) == height * width


@given(st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_polygons_differ_from_those_of_coco_at_their_edges_alone(seed):
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.random(rng.integers(3, 12))) * 2 * np.pi
    radius = rng.uniform(4, 28, len(angles))
    points = np.stack([30 + radius * np.cos(angles), 30 + radius * np.sin(angles)], axis=1)
    ring = np.round(points, 2).ravel().tolist()
    frame = DeclaredFrame((60, 60), (60, 60))
    packed = coco.merge(coco.frPyObjects([ring], 60, 60))["counts"].decode()
    theirs = outline({"size": [60, 60], "counts": packed}, frame, "")()
    ours = outline([ring], frame, "")()
    for row, column in zip(*np.nonzero(ours != theirs), strict=True):
        away = np.inf
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            along, to = np.array([x1 - x0, y1 - y0]), np.array([column + 0.5 - x0, row + 0.5 - y0])
            share = np.clip(to @ along / max(along @ along, 1e-9), 0, 1)
            away = min(away, np.linalg.norm(to - share * along))
        assert away < 1.0


@pytest.mark.parametrize("text", ["", "0", "05", "~", "\x1f", "o" * 40, "P", "é"])
def test_no_text_breaks_the_unpacking(text):
    found = unpacked(text)
    assert found is None or all(isinstance(n, int) for n in found)


def source(folder, boxes, **fields):
    PilImage.new("RGB", (6, 4)).save(folder / "a.png")
    record = {"id": "a", "image": "a.png", "width": 6, "height": 4, "boxes": boxes}
    (folder / "data.json").write_text(json.dumps([record]))
    config = PlacedConfig("train", "data.json", **{"boxes": "boxes", "outlines": "segmentation", **fields})
    return open_source(config, root=str(folder))


def entry(segmentation, bbox=(1, 1, 4, 3), label="cat"):
    return {"label": label, "bbox": list(bbox), "segmentation": segmentation}


def test_outlines_of_boxes_are_objects(tmp_path):
    runs = {"size": [4, 6], "counts": [5, 2, 2, 2, 2, 2, 9]}
    far = entry([[20, 20, 30, 20, 30, 30]], (20, 20, 30, 30), "far")
    boxes = [far, entry([[1, 1, 4, 1, 4, 3, 1, 3]]), entry(runs, label="dog")]
    sample = source(tmp_path, boxes)[0]
    objects = sample.labels["segmentation"]
    assert isinstance(objects, Instances) and [box.label for box in objects.boxes] == ["cat", "dog"]
    assert objects.values().sum(axis=(1, 2)).tolist() == [6, 6] and objects.size == (6, 4)
    assert [str(note).rpartition(": ")[2] for note in sample.notes] == [
        "1 of 3 boxes lie outside the 6x4 picture [box_outside]"
    ]
    assert source(tmp_path, [])[0].labels["segmentation"].values().shape == (0, 4, 6)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, r"boxes\[0\] has no 'segmentation'"),
        ("a.png", r"boxes\[0\].segmentation must be polygons, \[\[x0, y0"),
        ([1, 2, 3, 4, 5, 6], "must be polygons"),
        ([[1, 2, 3, 4]], "polygon 0 of 4 numbers needs three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "polygon 0 of 7 numbers needs three points"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite numbers"),
        ([[1, 2, 3, 4, 5, True]], "finite numbers"),
        ({"size": [6, 4], "counts": [24]}, r"a mask of \[6, 4\], size must be that of the record.*\[4, 6\]"),
        ({"counts": [24]}, "a mask of None"),
        ({"size": [4, 6], "counts": [20]}, "counts add up to 20, the mask has 24 pixels"),
        ({"size": [4, 6], "counts": [25, -1]}, "whole numbers, none below 0"),
        ({"size": [4, 6], "counts": "~~"}, "packed in a text"),
        ({"size": [4, 6], "counts": {}}, "packed in a text"),
    ],
)
def test_what_is_no_outline_is_one_line(tmp_path, segmentation, message):
    with pytest.raises(BadSample, match=message) as error:
        source(tmp_path, [entry(segmentation)])[0]
    assert "\n" not in str(error.value) and "sample a" in str(error.value)


def test_fields_that_cannot_be():
    with pytest.raises(ValueError, match="outlines='segmentation' needs boxes"):
        PlacedConfig("train", "data.json", outlines="segmentation")
    with pytest.raises(ValueError, match="all must be different"):
        PlacedConfig("train", "data.json", boxes="boxes", outlines="boxes")


@pytest.mark.skipif(not PENNFUDAN.is_dir(), reason="no folder ../shared/data/pennfudan")
def test_masks_of_pedestrians_survive_as_runs(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    records = json.loads((PENNFUDAN / "val.json").read_text())[:3]
    for record in records:
        with PilImage.open(PENNFUDAN / record["image"]) as picture:
            picture.save(tmp_path / f"{record['id']}.png")
        levels = np.asarray(PilImage.open(PENNFUDAN / record["mask"]))
        record["image"] = f"{record['id']}.png"
        for number, box in enumerate(record["boxes"], 1):
            found = coco.encode(np.asfortranarray((levels == box.get("instance", number)).astype(np.uint8)))
            box["segmentation"] = {"size": list(found["size"]), "counts": found["counts"].decode()}
    (tmp_path / "val.json").write_text(json.dumps(records))
    ours = open_source(
        PlacedConfig("val", "val.json", boxes="boxes", outlines="segmentation"), root=str(tmp_path)
    )
    given = open_source(PlacedConfig("val", "val.json", boxes="boxes", objects="mask"), root=str(PENNFUDAN))
    for index in range(len(records)):
        runs, levels = ours[index].labels["segmentation"], given[index].labels["mask"]
        assert runs.boxes == levels.boxes and levels.values().any(axis=(1, 2)).all()
        np.testing.assert_array_equal(runs.values(), levels.values())
