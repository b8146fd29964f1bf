"""What ``inspect data`` says of inputs beside text and pictures, and how it draws them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.media.clip import ClipConfig
from vl_jax.data.media.inputs import MediaInput
from vl_jax.data.media.series import SeriesConfig
from vl_jax.data.media.volume import VolumeConfig
from vl_jax.data.media.wave import WaveConfig
from vl_jax.data.sample import BadSample, Sample, Turn
from vl_jax.data.sources.build import RecordsConfig
from vl_jax.data.tools import preview
from vl_jax.data.tools.examination import examine
from vl_jax.data.tools.media_findings import ABSENT, UNUSED
from vl_jax.data.tools.media_pictures import drawn, media_pictures

SPEC = ModelSpec(
    tile_tokens_side=1,
    fusion="gated",
    vocab_size=1 << 20,
    reads="text",
    media=(MediaInput("x", (4, 2), varies=True), MediaInput("flow", (2, 2, 2))),
)


def config(tmp_path, records, *media) -> DataConfig:
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = RecordsConfig("s", "data.json", media=media)
    return DataConfig(root=str(tmp_path), sources=(source,), max_tokens=8, tiling=TilingConfig(tile_size=8))


def test_broken_inputs_are_counted_by_reason(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((2, 2, 2)))
    good = {"x": [[1, 2], [3, 4]], "clip": None, "scan": None}
    records = [
        good,
        {**good, "x": [[1, None]]},
        {**good, "x": [[1, None]]},
        {**good, "x": "none.npy"},
        {**good, "clip": []},
        {**good, "x": [1, 2]},
    ]
    data = config(tmp_path, records, SeriesConfig("x"), ClipConfig("c", "clip"), VolumeConfig("v", "scan"))
    found = examine(data, SPEC, "s")
    counts = {finding.what: finding.count for finding in found.findings}
    assert found.num_examined == 6 and found.num_usable == 1
    assert counts == {
        "cannot be used: not finite": 2,
        "cannot be used: missing series": 1,
        "cannot be used: no frames": 1,
        "cannot be used: bad media": 1,
        ABSENT: 1,
    }
    assert all("\n" not in example for finding in found.findings for example in finding.examples)


def test_inputs_that_no_tower_reads_and_towers_without_input_are_found(tmp_path):
    data = config(tmp_path, [{"x": [1, 2], "y": [1]}] * 3, SeriesConfig("x"), SeriesConfig("y"))
    spec = dataclasses.replace(SPEC, media=(MediaInput("x", (4, 1)), MediaInput("flow", (2, 2, 2))))
    found = {finding.what: finding for finding in examine(data, spec, "s").findings}
    assert found[ABSENT].examples == ("flow; records have x, y",)
    assert found[UNUSED].count == 3 and found[UNUSED].examples == ("y; towers read flow, x",)


def test_a_loud_part_of_a_wave_is_drawn_higher_than_a_quiet_one():
    wave = np.sin(np.arange(6400) / 3).astype(np.float32) * np.repeat([0.1, 0.9], 3200)
    picture = drawn(wave)
    assert picture is not None
    ink = (np.asarray(picture) != 255).any(axis=-1).sum(axis=0)
    assert ink[:150].max() < 0.2 * 96 and ink[170:].min() > 0.6 * 96


@pytest.mark.parametrize(
    "values",
    [
        np.arange(200.0),
        np.zeros((1, 3)),
        np.random.default_rng(0).normal(size=(900, 8)),
        np.zeros((6, 5, 1), np.float32),
        np.ones((6, 5, 2), np.float32),
        np.zeros((12, 6, 5, 3), np.uint8),
        np.linspace(0, 1, 240, dtype=np.float32).reshape(8, 6, 5, 1),
    ],
)
def test_every_kind_of_input_has_a_picture(values):
    picture = drawn(values)
    assert picture is not None and picture.mode == "RGB" and min(picture.size) >= 1


def test_directions_of_flow_have_colours_of_their_own():
    ways = np.array([[[1, 0], [-1, 0]], [[0, 1], [0, 0]]], np.float32)
    picture = drawn(ways)
    assert picture is not None
    right, left, down, still = np.asarray(picture).reshape(4, 3).tolist()
    assert still == [255, 255, 255] and len({tuple(c) for c in (right, left, down)}) == 3


def test_previews_name_shape_and_range_and_say_what_cannot_be_read(tmp_path):
    def broken():
        raise BadSample("not_finite", "no number")

    sample = Sample("a", (Turn("", "a", kind="text"),), media={"bad": broken, "x": lambda: np.ones((3, 2))})
    captions = [overlay.caption for overlay in media_pictures(sample)]
    assert captions == ["bad: no number [not_finite]", "x: float64, 3 x 2, from 1 to 1"]
    data = config(tmp_path, [{"x": [[1, 2], [3, 4]]}], SeriesConfig("x"))
    previews = preview.render_samples(data, SPEC, "s")
    assert "x: float32, 2 x 2, from 1 to 4" in preview.to_text(previews)
    assert preview.to_html(previews).count("<figcaption>x: float32, 2 x 2, from 1 to 4</figcaption>") == 1


def test_a_missing_wave_is_found_when_its_record_is_read(tmp_path):
    data = config(tmp_path, [{"w": "none.wav"}], WaveConfig("w"))
    (finding,) = examine(data, SPEC, "s").findings
    assert finding.what == "cannot be used: missing audio"
