"""Pictures as they come: which way up, boxes in whose frame, of how many bits, and how much tiles keep."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from PIL import ImageOps

from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.frames import declared_frame
from vl_jax.data.images.resolution import reduction, resolution_warning
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.levels import LevelsError, scale
from vl_jax.data.picture import PictureFrame, read_frame, to_rgb, turn_corners, undo
from vl_jax.data.published.request import Request, to_sample
from vl_jax.data.sample import BadSample, EncodedImage, FileImage
from vl_jax.data.sources import array_records
from vl_jax.data.sources.build import (
    CocoConfig,
    LabelStudioConfig,
    LlavaConfig,
    MetaConfig,
    ParquetConfig,
    RecordsConfig,
    WebDatasetConfig,
    open_source,
)
from vl_jax.data.text import grounding
from vl_jax.data.tools import examination
from vl_jax.report import drawing

SHOWN = (60, 100)  # width, height
BOX = (6, 10, 24, 30)  # of a red rectangle on the picture as it is shown
TURNS = range(1, 9)
SPEC = ModelSpec(4, "prefix", 2048)


def shown_picture() -> PilImage.Image:
    picture = PilImage.new("RGB", SHOWN, "white")
    picture.paste((255, 0, 0), BOX)
    return picture


def stored_bytes(turn: int, kind: str = "PNG", **options) -> bytes:
    """The picture in a file that states how to turn it."""
    exif, method = PilImage.Exif(), {
        2: PilImage.Transpose.FLIP_LEFT_RIGHT, 3: PilImage.Transpose.ROTATE_180,
        4: PilImage.Transpose.FLIP_TOP_BOTTOM, 5: PilImage.Transpose.TRANSPOSE,
        6: PilImage.Transpose.ROTATE_90, 7: PilImage.Transpose.TRANSVERSE,
        8: PilImage.Transpose.ROTATE_270,
    }.get(turn)  # fmt: skip
    exif[0x112] = turn
    picture, out = shown_picture(), io.BytesIO()
    picture = picture if method is None else picture.transpose(method)
    picture.save(out, kind, exif=exif, **options)
    return out.getvalue()


def redness(picture: PilImage.Image, corners) -> float:
    """The share of red pixels inside a rectangle, less that of those around it."""
    pixels = np.asarray(picture).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 100)
    inside = np.zeros(red.shape, bool)
    x0, y0, x1, y1 = (round(c) for c in corners)
    inside[y0:y1, x0:x1] = True
    return float(red[inside].mean() - red[~inside].mean())


def in_grid(turn) -> tuple[float, ...]:
    (region,) = grounding.parse(turn.answer).regions
    return region.boxes[0]


# Which way up.


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_picture_is_as_it_is_shown(tmp_path, turn, kind):
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    (tmp_path / "a").write_bytes(stored_bytes(turn, kind, **options))
    image = FileImage(tmp_path / "a", "here")
    inside = EncodedImage((tmp_path / "a").read_bytes, "a", "here")
    for one in (image, inside):
        assert one.size() == one().size == SHOWN and redness(one(), BOX) > 0.9
        assert one.at_least(15, 25).size[0] * 5 == one.at_least(15, 25).size[1] * 3
    with PilImage.open(tmp_path / "a") as opened:  # as published code reads it
        expected = opened.convert("RGB")
    stored = FileImage(tmp_path / "a", "here", orientation="stored")
    assert stored.size() == stored().size == expected.size and stored().tobytes() == expected.tobytes()
    assert stored.key != image.key


@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt"])
def test_what_a_png_states_behind_its_pixels_counts(kind):
    data = stored_bytes(6)
    start = data.index(b"eXIf") - 4
    length = struct.unpack(">I", data[start : start + 4])[0]
    chunk = data[start : start + 12 + length]
    if kind == b"iTXt":
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
        body = kind + text
        chunk = struct.pack(">I", len(text)) + body + struct.pack(">I", zlib.crc32(body))
    data, end = data[:start] + data[start + 12 + length :], -12
    late = data[:end] + chunk + data[end:]
    image = EncodedImage(lambda: late, "a", "here")
    assert image.size() == image().size == SHOWN and redness(image(), BOX) > 0.9


@pytest.mark.parametrize("stated", [0, 9, 77])
def test_what_is_no_orientation_changes_nothing(stated):
    exif, out = PilImage.Exif(), io.BytesIO()
    exif[0x112] = stated
    shown_picture().save(out, "PNG", exif=exif)
    image = EncodedImage(out.getvalue, "a", "here")
    assert image.size() == SHOWN and image().tobytes() == shown_picture().tobytes()


def test_a_copy_states_no_orientation_so_that_it_is_not_turned_again():
    picture, out = EncodedImage(lambda: stored_bytes(6, "JPEG"), "a", "here")(), io.BytesIO()
    picture.save(out, "PNG")
    assert ImageOps.exif_transpose(PilImage.open(out)).size == SHOWN


def test_published_processors_read_files_as_their_own_code_does(tmp_path):
    (tmp_path / "a.png").write_bytes(stored_bytes(6))
    request = Request(prompt="<image>", images=[tmp_path / "a.png"])
    stored = to_sample(request, name="r", orientation="stored").images[0]()
    assert stored.size == SHOWN[::-1] and to_sample(request, name="r").images[0]().size == SHOWN
    with PilImage.open(tmp_path / "a.png") as opened:  # a picture that is open stays as it is
        assert to_sample(Request(prompt="<image>", images=[opened]), name="r").images[0]().size == SHOWN[::-1]


def test_an_answer_is_drawn_on_what_the_model_saw(tmp_path):
    (tmp_path / "a.png").write_bytes(stored_bytes(6))
    for orientation, size in (("shown", SHOWN), ("stored", SHOWN[::-1])):
        drawing.draw_boxes("", tmp_path / "a.png", tmp_path / "out.png", orientation)
        with PilImage.open(tmp_path / "out.png") as drawn:
            assert drawn.size == size


def test_tiles_and_lengths_are_of_the_picture_as_it_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(stored_bytes(6, "JPEG"))
    record = {"image": "a.jpg", "question": "What?", "answer": "It."}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    for orientation, grid in (("shown", (1, 2)), ("stored", (2, 1))):
        tiling = TilingConfig(30, candidates=((1, 1), (1, 2), (2, 1)), orientation=orientation)
        config = DataConfig(max_tiles=3, tiling=tiling, max_tokens=256)
        sample = open_source(LlavaConfig("l", "d.json"), root=str(tmp_path), orientation=orientation)[0]
        for decoding in ("whole", "reduced"):
            encoder = make_encoder(DataConfig(**{**vars(config), "decoding": decoding}), SPEC)
            assert encoder.example(sample).grids == (grid,)


# Boxes and whose frame they are in.


@settings(max_examples=60)
@given(st.sampled_from(TURNS), st.integers(2, 40), st.integers(2, 40), st.data())
def test_a_corner_goes_where_its_pixel_goes(turn, width, height, data):
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    pixels = np.zeros((height, width), np.uint8)
    pixels[y, x] = 255
    exif, out = PilImage.Exif(), io.BytesIO()
    exif[0x112] = turn
    PilImage.fromarray(pixels).save(out, "PNG", exif=exif)
    turned = np.asarray(ImageOps.exif_transpose(PilImage.open(out)))
    (row,), (column,) = np.nonzero(turned)
    corners = turn_corners((x, y, x + 1, y + 1), turn, (width, height))
    assert corners == (column, row, column + 1, row + 1)
    assert turn_corners(corners, undo(turn), turned.shape[::-1]) == (x, y, x + 1, y + 1)


def write_coco(folder: Path, size, box) -> CocoConfig:
    x0, y0, x1, y1 = box
    entry = {"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}
    annotation = {"image_id": 1, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
    content = {"images": [entry], "categories": [{"id": 1, "name": "red"}], "annotations": [annotation]}
    (folder / "coco.json").write_text(json.dumps(content))
    return CocoConfig("c", "coco.json")


def write_label_studio(folder: Path, size, box) -> LabelStudioConfig:
    (width, height), (x0, y0, x1, y1) = size, box
    value = {"x": 100 * x0 / width, "y": 100 * y0 / height, "rectanglelabels": ["red"]}
    value |= {"width": 100 * (x1 - x0) / width, "height": 100 * (y1 - y0) / height}
    result = {"type": "rectanglelabels", "id": "r", "value": value}
    result |= {"original_width": width, "original_height": height}
    task = {"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": [result]}]}
    (folder / "ls.json").write_text(json.dumps([task]))
    return LabelStudioConfig("s", "ls.json")


def write_llava(folder: Path, size, box) -> LlavaConfig:
    record = {"image": "a.png", "width": size[0], "height": size[1], "question": "Where?"}
    record |= {"answer": "<box:0>", "boxes": [{"label": "red", "bbox": list(box)}]}
    (folder / "l.json").write_text(json.dumps([record]))
    return LlavaConfig("l", "l.json")


def write_tar(folder: Path, size, box) -> WebDatasetConfig:
    write_llava(folder, size, box)
    (record,) = json.loads((folder / "l.json").read_text())
    with tarfile.open(folder / "t.tar", "w") as tar:
        for name, data in (
            ("a.png", (folder / "a.png").read_bytes()),
            ("a.json", json.dumps(record).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return WebDatasetConfig("t", "t.tar")


def write_meta(folder: Path, size, box) -> MetaConfig:
    write_llava(folder, size, box)
    (folder / "m.json").write_text(json.dumps({"l": {"annotation": "l.json"}}))
    return MetaConfig("m", "m.json")


def write_parquet(folder: Path, size, box) -> ParquetConfig:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_llava(folder, size, box)
    (record,) = json.loads((folder / "l.json").read_text())
    row = {**record, "image": {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}}
    parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "p.parquet")
    return ParquetConfig("p", "p.parquet")


WRITERS = [write_coco, write_label_studio, write_llava, write_tar, write_meta, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.slow
def test_boxes_of_either_frame_are_on_their_pixels(tmp_path, write, turn):
    (tmp_path / "a.png").write_bytes(stored_bytes(turn))
    with PilImage.open(tmp_path / "a.png") as opened:
        stored = read_frame(opened, "stored").stored
    frames = [(SHOWN, BOX)]
    if turn >= 5:  # else the size does not tell them apart, and boxes are on what is shown
        frames.append((stored, turn_corners(BOX, undo(turn), SHOWN)))
    for size, box in frames:
        for orientation in ("shown", "stored"):
            sample = open_source(write(tmp_path, size, box), root=str(tmp_path), orientation=orientation)[0]
            picture, turns = sample.images[0](), [t for t in sample.turns if t.boxes]
            assert redness(picture, turns[0].boxes[0].corners) > 0.99 and not sample.notes
            (found,) = grounding.parse(turns[0].answer).boxes(*picture.size)[:1] or (turns[0].boxes[0],)
            assert redness(picture, found.corners) > 0.85


@pytest.mark.parametrize("write", WRITERS)
def test_a_declared_size_is_the_pictures_or_a_finding(tmp_path, write):
    (tmp_path / "a.png").write_bytes(stored_bytes(6))
    twice = tuple(2 * n for n in BOX)
    config = write(tmp_path, (120, 200), twice)
    sample = open_source(config, root=str(tmp_path))[0]
    assert redness(sample.images[0](), sample.turns[-1].boxes[0].corners) > 0.99
    assert [note.reason for note in sample.notes] == ["scaled_boxes"]
    data = DataConfig(str(tmp_path), (config,), tiling=TilingConfig(64, views="global"))
    (finding,) = examination.examine(data, SPEC, config.name).findings
    assert "scaled boxes" in finding.what and finding.count == 1
    with pytest.raises(BadSample, match=r"boxes in 640x480, which is not the shape of .*60x100") as caught:
        open_source(write(tmp_path, (640, 480), BOX), root=str(tmp_path))[0]
    assert caught.value.reason == "wrong_size" and "\n" not in str(caught.value)


def test_boxes_that_are_written_on_the_grid_follow_the_declared_frame(tmp_path):
    (tmp_path / "a.png").write_bytes(stored_bytes(6))
    answer = "<|ref|>red<|/ref|><|det|>[[100, 600, 300, 900]]<|/det|>"
    record = {"image": "a.png", "question": "Where?", "answer": answer}
    for size, expected in (
        ({}, (100, 600, 300, 900)),
        ({"width": 60, "height": 100}, (100, 600, 300, 900)),
        ({"width": 100, "height": 60}, (99, 100, 399, 300)),  # x from 999 - y
    ):
        (tmp_path / "l.json").write_text(json.dumps([{**record, **size}]))
        sample = open_source(LlavaConfig("l", "l.json"), root=str(tmp_path))[0]
        assert in_grid(sample.turns[0]) == expected


def test_of_several_pictures_the_first_that_fits_has_the_boxes():
    frames = [PictureFrame((30, 30)), PictureFrame((100, 60), 6)]
    assert declared_frame((100, 60), frames, "here").turn == 6
    assert declared_frame((60, 100), frames, "here").turn == 1
    with pytest.raises(BadSample):
        declared_frame((61, 30), frames, "here")


@pytest.mark.parametrize("orientation", ["shown", "stored"])
def test_converted_boxes_stay_on_their_pixels(tmp_path, orientation):
    (tmp_path / "a.png").write_bytes(stored_bytes(6))
    source = open_source(write_llava(tmp_path, SHOWN, BOX), root=str(tmp_path), orientation=orientation)
    record = array_records.encode(source[0])
    for asked in ("shown", "stored"):  # what is asked for must not part the boxes from their pixels
        sample = array_records.decode(record, "here", orientation=asked)
        assert redness(sample.images[0](), sample.turns[0].boxes[0].corners) > 0.99


# More than 8 bits.


def tiff(values: np.ndarray, **tags) -> bytes:
    """An uncompressed grey TIFF file of those numbers, whatever they are."""
    bits, form = 8 * values.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    if "bits" in tags:
        bits = tags.pop("bits")
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    fields = {256: (3, width), 257: (3, height), 258: (3, bits), 259: (3, 1), 262: (3, tags.pop("photo", 1))}
    fields |= {277: (3, 1), 278: (3, height), 279: (4, len(data)), 339: (3, form)}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    fields[273] = (4, 8 + 2 + 12 * (len(fields) + 1) + 4)
    entries = b""
    for tag, (kind, value) in sorted(fields.items()):
        code = {3: "<HHIHH", 4: "<HHII", 11: "<HHIf"}[kind]
        entries += struct.pack(code, tag, kind, 1, value, *([0] if kind == 3 else []))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(fields)) + entries + bytes(4) + data


def levels_of(data: bytes) -> np.ndarray:
    picture = EncodedImage(lambda: data, "a", "here")()
    assert picture.mode == "RGB"
    return np.asarray(picture)[..., 0]


def saved(values: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    PilImage.fromarray(values).save(out, kind)
    return out.getvalue()


RAMP = np.linspace(0, 65535, 4096).reshape(64, 64)


@pytest.mark.parametrize(
    "data",
    [
        saved(RAMP.astype(np.uint16), "PNG"),
        saved(RAMP.astype(np.uint16), "TIFF"),
        saved(RAMP.astype(np.uint16), "PPM"),
        b"P5 64 64 4095\n" + (RAMP / 65535 * 4095).astype(">u2").tobytes(),
        b"P2 64 64 1000\n" + " ".join(str(int(v / 65535 * 1000)) for v in RAMP.flat).encode(),
        b"P6 64 64 4095\n" + np.repeat((RAMP / 65535 * 4095).astype(">u2"), 3).tobytes(),
        tiff((RAMP / 65535).astype(np.float32)),
        tiff((65535 - RAMP).astype(np.uint16), photo=0),
        tiff((RAMP / 16).astype(np.uint16), t281=(3, 4095)),
        tiff((RAMP * 1.5 - 7).astype(np.float32), t340=(11, -7.0), t341=(11, 65535 * 1.5 - 7)),
        tiff((RAMP / 16).astype(np.int16), t281=(3, 4095)),
        tiff(RAMP.astype(np.uint32), t281=(3, 65535)),
    ],
    ids=lambda data: data[:2].decode("latin-1"),
)
def test_a_ramp_of_many_bits_is_a_ramp(data):
    found = levels_of(data).astype(int)
    assert np.abs(found - RAMP / 257).max() <= 1.3 and len(np.unique(found)) >= 250


def test_colours_of_16_bits_keep_their_high_bytes():
    rows = b"".join(b"\0" + struct.pack(">HHHH", v, 65535 - v, 256, 65535) for v in (0, 300, 65535))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 3, 16, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    picture = EncodedImage(lambda: data, "a", "here")()
    assert [picture.getpixel((0, y)) for y in range(3)] == [(0, 255, 1), (1, 254, 1), (255, 0, 1)]


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        (RAMP.astype(np.float32), {}),
        (np.full((2, 2), np.nan, np.float32), {}),
        (np.array([[0, np.inf]], np.float32), {}),
        (np.array([[-0.1, 0.5]], np.float32), {}),
        (RAMP.astype(np.int16), {}),
        (RAMP.astype(np.int32), {}),
        (RAMP.astype(np.uint32), {}),
        (RAMP.astype(np.uint16), {"t281": (3, 4095)}),
        (RAMP.astype(np.float64), {}),
    ],
)
def test_what_nobody_states_the_range_of_is_refused_with_the_remedy(values, tags):
    image = EncodedImage(lambda: tiff(values, **tags), "a.tif", "here")
    with pytest.raises(BadSample, match="save it as .*PNG") as caught:
        image()
    assert caught.value.reason in ("unknown_levels", "corrupt_image") and "\n" not in str(caught.value)
    assert "here" in str(caught.value) and "a.tif" in str(caught.value)


@settings(max_examples=50)
@example([0.0, 2.0**-126])
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=9))
def test_scaling_keeps_order_and_reaches_black_and_white(values):
    numbers = np.array([values], np.float32)
    low, high = float(numbers.min()), float(numbers.max())
    if low == high:
        return
    found = scale(numbers, (low, high))
    assert (found.min(), found.max()) == (0, 255)
    assert (np.diff(found[0, np.argsort(numbers[0], kind="stable")].astype(int)) >= 0).all()
    with pytest.raises(LevelsError):
        scale(numbers, (low, low + (high - low) / 2))


def test_what_is_transparent_of_16_bits_is_white():
    picture = PilImage.fromarray(np.array([[0, 7, 65535]], np.uint16))
    picture.info["transparency"] = 7
    assert np.asarray(to_rgb(picture))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_ordinary_pictures_are_those_of_pillow(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = PilImage.fromarray(pixels).convert(mode)
    expected = picture.convert("RGBA") if mode in ("LA", "RGBA") else picture
    assert to_rgb(picture).tobytes() == expected.convert("RGB").tobytes()


# Names that no file can have.


@pytest.mark.parametrize("name", ["\0", "a\0.png", "\ud800.png", "x" * 5000, "clip/\0/a.png"])
@pytest.mark.parametrize("key", ["image", "images", "frames", "audio", "list of frames"])
def test_an_impossible_path_is_a_skip_of_any_medium(tmp_path, name, key):
    value = [name] if key in ("images", "list of frames") else name
    record = {key.rpartition(" ")[2]: value, "question": "What?", "answer": "It."}
    (tmp_path / "l.json").write_text(json.dumps([record]))
    with pytest.raises(BadSample) as caught:
        for image in open_source(LlavaConfig("l", "l.json"), root=str(tmp_path))[0].images:
            image()
    assert caught.value.reason == ("missing_audio" if key == "audio" else "missing_image")


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "in/\0.png"])
def test_an_impossible_path_is_a_skip_of_any_source(tmp_path, name):
    result = {"type": "choices", "value": {"choices": ["x"]}}
    task = {"id": 1, "data": {"image": name}, "annotations": [{"result": [result]}]}
    (tmp_path / "ls.json").write_text(json.dumps([task]))
    (tmp_path / "r.json").write_text(json.dumps([{"image": name, "text": "x"}]))
    config = write_coco(tmp_path, SHOWN, BOX)
    text = (tmp_path / "coco.json").read_text().replace('"a.png"', json.dumps(name))
    (tmp_path / "coco.json").write_text(text)
    for one in (config, LabelStudioConfig("s", "ls.json"), RecordsConfig("r", "r.json", image="image")):
        with pytest.raises(BadSample) as caught:
            open_source(one, root=str(tmp_path))[0].images[0]()
        assert caught.value.reason == "missing_image"


# What tiles keep.


@pytest.mark.parametrize(
    ("size", "tiling", "times"),
    [
        ((640, 480), TilingConfig(64, views="global"), 10),
        ((640, 480), TilingConfig(64, views="global", fit="crop"), 7.5),
        ((640, 480), TilingConfig(64, views="global", fit="stretch"), 10),
        ((640, 480), TilingConfig(64, candidates=((1, 1), (4, 3))), 2.5),
        ((32, 16), TilingConfig(64, views="global"), 0.5),
    ],
)
def test_a_side_becomes_so_many_times_smaller(size, tiling, times):
    assert reduction(*size, tiling) == times


def test_a_run_says_once_what_its_tiles_lose(tmp_path):
    PilImage.new("RGB", (640, 480)).save(tmp_path / "a.png")
    asked = {"question": "What?", "answer": "It."}
    records = [{"image": "none.png", **asked}, {"image": "a.png", **asked}, asked]
    (tmp_path / "l.json").write_text(json.dumps(records))
    sources = {"photos": open_source(LlavaConfig("photos", "l.json"), root=str(tmp_path))}
    said = resolution_warning(sources, TilingConfig(64, views="global"))
    assert "'photos' (640x480 becomes 64x48)" in said and "global_local" in said and "\n" not in said
    assert not resolution_warning(sources, TilingConfig(160, views="global"))
    assert "candidates" in resolution_warning(sources, TilingConfig(64, candidates=((1, 1),)))
