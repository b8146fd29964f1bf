"""Recordings in layouts of their own: windows, clips with intervals, arrays of pictures and volumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax.data.sources.build import (
    RecordedArraysConfig,
    RecordedWalksConfig,
    RecordedWindowsConfig,
    open_source,
)
from vl_jax.data.sources.recorded.windows import OnlyWith

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WINDOWS = RecordedWindowsConfig("w", "meta.json", "x.npz", window=4, hop=4, rate=10, labels=("fault",))


def recordings(folder: Path, **changes) -> None:
    ramp = np.arange(20, dtype=np.int16)
    np.savez(folder / "x.npz", slow=ramp, fast=np.repeat(ramp, 2))
    records = [
        {"key": "slow", "fault": "ball", "rate_hz": 10, "scale": 0.5, "samples": 20},
        {"key": "fast", "fault": "none", "rate_hz": 20, "scale": 1.0, "samples": 40},
    ]
    records[0].update(changes)
    (folder / "meta.json").write_text(json.dumps(records))


def test_windows_are_cut_at_one_rate_and_scaled(tmp_path):
    recordings(tmp_path)
    source = open_source(WINDOWS, root=str(tmp_path))
    assert len(source) == 10 and source[1].id == "slow@4" and source[1].labels == {"fault": "ball"}
    assert source[1].media["series"]().tolist() == [[2.0], [2.5], [3.0], [3.5]]
    # As fast again, hence of the same steps once its rate is that of the other.
    np.testing.assert_allclose(source[6].media["series"]()[:, 0], [4, 5, 6, 7], atol=0.7)


def test_windows_of_two_parts_share_no_step(tmp_path):
    recordings(tmp_path)
    first, second = (
        open_source(dataclasses.replace(WINDOWS, part=part, hop=1), root=str(tmp_path))
        for part in ((0.0, 0.6), (0.6, 1.0))
    )

    def steps(source, key):
        starts = [int(s.id.split("@")[1]) for s in source if s.id.startswith(key)]
        return {start + i for start in starts for i in range(4)}

    for key in ("slow", "fast"):
        assert steps(first, key) == set(range(12)) and steps(second, key) == set(range(12, 20))


def test_only_some_recordings_are_read(tmp_path):
    recordings(tmp_path)
    only = dataclasses.replace(WINDOWS, only=(OnlyWith("fault", ("none",)), OnlyWith("rate_hz", ("20",))))
    assert {s.labels["fault"] for s in open_source(only, root=str(tmp_path))} == {"none"}
    with pytest.raises(ValueError, match="no window of 4 steps is left"):
        open_source(dataclasses.replace(WINDOWS, only=(OnlyWith("fault", ("x",)),)), root=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": "none"}, "key must name an array"),
        ({"rate_hz": 0}, "rate_hz=0 must be a number above 0"),
        ({"scale": None}, "scale=None must be a number above 0"),
    ],
)
def test_recordings_that_cannot_be(changes, words, tmp_path):
    recordings(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        open_source(WINDOWS, root=str(tmp_path))
    assert "\n" not in str(caught.value)


def walks(folder: Path, count: int = 10, told: int = 10) -> RecordedWalksConfig:
    place = folder / "frames" / "01"
    place.mkdir(parents=True)
    for number in range(count):
        PilImage.new("L", (6, 4), 10 * number).save(place / f"{number + 1:03d}.png")
    entry = {"frames": told, "abnormal_intervals_1based": [[5, 6], [9, 10]]}
    (folder / "labels.json").write_text(json.dumps({"01": entry}))
    return RecordedWalksConfig("w", frames=3, step=2, size=(4, 6))


def test_a_clip_is_judged_by_its_last_frame(tmp_path):
    config = walks(tmp_path)
    source = open_source(config, root=str(tmp_path))
    assert [s.labels["frame"] for s in source] == [5, 6, 7, 8, 9, 10]
    assert [s.labels["event"] == "abnormal" for s in source] == [True, True, False, False, True, True]
    clip = source[1].media["clip"]()
    assert clip.shape == (3, 4, 6, 1) and clip[:, 0, 0, 0].tolist() == [10, 30, 50]
    np.testing.assert_allclose(source[1].media["clip_times"](), [0, 0.2, 0.4], atol=1e-6)
    normal = dataclasses.replace(config, normal_only=True, picture=True)
    kept = open_source(normal, root=str(tmp_path))
    assert [s.labels["frame"] for s in kept] == [7, 8] and len(kept[0].images) == 1


def test_walks_that_cannot_be(tmp_path):
    config = walks(tmp_path, told=11)
    with pytest.raises(ValueError, match="10 frames in its folder, 11 in the file"):
        open_source(config, root=str(tmp_path))
    with pytest.raises(ValueError, match="no recording '02'; known: 01"):
        open_source(dataclasses.replace(config, recordings=("02",)), root=str(tmp_path))


def test_arrays_become_pictures_and_pooled_volumes(tmp_path):
    volumes = np.random.default_rng(0).integers(0, 2, (3, 4, 4, 4)).astype(np.uint8)
    pictures = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    labels = np.array([[1], [0], [1]], np.uint8)
    np.savez_compressed(tmp_path / "d.npz", train_images=pictures, v=volumes, train_labels=labels)
    source = open_source(RecordedArraysConfig("d", "d.npz"), root=str(tmp_path))
    assert [s.labels["label"] for s in source] == [1, 0, 1]
    np.testing.assert_array_equal(np.asarray(source[1].images[0]())[..., 0], pictures[1])
    config = RecordedArraysConfig("d", "d.npz", inputs="v", medium="scan", pool=2, white=1)
    found = open_source(config, root=str(tmp_path))[2].media["scan"]()
    assert found.shape == (2, 2, 2, 1) and found.dtype == np.uint8
    for x, y, z in np.ndindex(2, 2, 2):
        cube = volumes[2, 2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2]
        assert abs(found[x, y, z, 0] - 255 * cube.mean()) <= 0.5
    for changes, words in (
        ({"inputs": "w"}, "cannot read w"),
        ({"inputs": "v"}, "expected uint8 of 3 axes"),
        ({"pool": 3}, "pool=3 does not divide"),
        ({"classes": "v"}, "labels, expected"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(RecordedArraysConfig("d", "d.npz", **changes), root=str(tmp_path))


@pytest.mark.skipif(not (DATA / "cwru_vibration").is_dir(), reason="needs ../shared/data/cwru_vibration")
def test_the_normal_bearing_has_as_many_steps_a_second_as_the_others():
    config = RecordedWindowsConfig("w", "meta.json", "de_accelerometer.npz", labels=("fault",))
    source = open_source(config, root=str(DATA / "cwru_vibration"))
    faults = [source[i].labels["fault"] for i in range(len(source))]
    assert faults.count("normal") == 243_938 // 4 // 2048 and faults.count("ball") == 12 * (65_536 // 2048)
    # 6 kHz is the most that 12 kHz can hold: nothing of what is above has come down.
    window = source[faults.index("normal")].media["series"]()[:, 0]
    assert np.isfinite(window).all() and 0.01 < window.std() < 1
