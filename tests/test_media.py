"""Media of records: waves, series, clips, volumes, depth and flow; what is read, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax import schema
from vl_jax.data.config import DataConfig
from vl_jax.data.media.clip import ClipConfig
from vl_jax.data.media.maps import DepthMapConfig, FlowMapConfig
from vl_jax.data.media.medium import RecordPlace
from vl_jax.data.media.scan import Scan, canonical, resized, spacing_of
from vl_jax.data.media.series import SeriesConfig
from vl_jax.data.media.volume import VolumeConfig
from vl_jax.data.media.wave import WaveConfig
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.sources.build import RecordsConfig, open_source

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RATE = 8000


def opened(folder: Path, *media, count: int = 1, **record):
    (folder / "data.json").write_text(json.dumps([record] * count))
    return open_source(RecordsConfig("source", "data.json", media=media), root=str(folder))


def read(folder: Path, *media, **record) -> tuple[Sample, dict[str, np.ndarray]]:
    (sample,) = opened(folder, *media, **record)
    return sample, {name: found() for name, found in sample.media.items()}


def refused(folder: Path, medium, **record) -> str:
    """The reason why the only medium of a record cannot be used."""
    with pytest.raises(BadSample) as caught:
        read(folder, medium, **record)
    message = str(caught.value)
    assert "\n" not in message and "record 0" in message
    return caught.value.reason


def write_wave(file: Path, samples: np.ndarray, rate: int = RATE) -> None:
    levels = np.rint(np.atleast_2d(samples.T).T * 32767).astype("<i2")
    data, channels = levels.tobytes(), levels.shape[1]
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data
    file.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def tone(seconds: float, hertz: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def test_a_sound_at_48_khz_comes_at_16_khz_and_is_noted(tmp_path):
    write_wave(tmp_path / "a.wav", tone(0.5, 440, 48_000), 48_000)
    sample, media = read(tmp_path, WaveConfig("wave", "audio"), audio="a.wav")
    assert media["wave"].shape == (8000,) and media["wave"].dtype == np.float32
    np.testing.assert_allclose(media["wave"][100:-100], tone(0.5, 440, 16_000)[100:-100], atol=2e-3)
    assert [note.reason for note in sample.notes] == ["resampled"] and "48000 Hz" in str(sample.notes[0])


def test_a_sound_at_the_rate_of_the_config_stays_and_channels_are_averaged(tmp_path):
    both = np.stack([tone(0.1, 300, RATE), np.zeros(800)], axis=1)
    write_wave(tmp_path / "a.wav", both)
    sample, media = read(tmp_path, WaveConfig("wave", rate=RATE), wave="a.wav")
    np.testing.assert_allclose(media["wave"], both.mean(1), atol=1e-4)
    assert sample.notes == ()


def test_sounds_that_are_refused(tmp_path):
    write_wave(tmp_path / "a.wav", tone(0.5, 440, RATE))
    write_wave(tmp_path / "empty.wav", np.zeros((0, 1)))
    (tmp_path / "bad.wav").write_bytes(b"RIFF\0\0\0\0WAVE")
    wave = WaveConfig("wave", rate=RATE)
    assert refused(tmp_path, WaveConfig("wave", rate=RATE, max_seconds=0.1), wave="a.wav") == "audio_too_long"
    assert refused(tmp_path, WaveConfig("wave", resample=False), wave="a.wav") == "wrong_rate"
    assert refused(tmp_path, wave, wave="b.wav") == "missing_audio"
    assert refused(tmp_path, wave, wave="bad.wav") == "corrupt_audio"
    assert refused(tmp_path, wave, wave="empty.wav") == "empty_audio"
    assert refused(tmp_path, wave, wave="../a.wav") == "outside_root"
    assert refused(tmp_path, wave, wave="http://x/a.wav") == "bad_audio_field"
    assert refused(tmp_path, wave, wave=5) == "bad_audio_field"


def test_what_a_record_lacks_is_no_medium_and_a_missing_field_is_said(tmp_path):
    sample, media = read(tmp_path, WaveConfig("wave"), SeriesConfig("x"), wave=None, x=[1, 2])
    assert list(media) == ["x"] and media["x"].tolist() == [[1.0], [2.0]]
    with pytest.raises(ValueError, match="field 'y' is in no record"):
        opened(tmp_path, SeriesConfig("y"), x=[1])


@pytest.mark.parametrize("form", ["npy", "npz", "csv", "plain.csv", "list"])
def test_a_series_is_the_same_from_every_kind_of_file(form, tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 2)).round(3)
    rows = "".join(f"{a},{b}\n" for a, b in values)
    np.save(tmp_path / "x.npy", values)
    np.savez(tmp_path / "x.npz", other=np.zeros(3), x=values)
    (tmp_path / "x.csv").write_text("left, right\n" + rows)
    (tmp_path / "x.plain.csv").write_text(rows)
    value = values.tolist() if form == "list" else f"x.{form}"
    key = "x" if form == "npz" else ""
    _, media = read(tmp_path, SeriesConfig("x", key=key), x=value)
    assert media["x"].dtype == np.float32
    np.testing.assert_allclose(media["x"], values, rtol=1e-6)


def test_columns_of_a_table_are_chosen_by_name_or_number(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    _, media = read(tmp_path, SeriesConfig("x", columns=("c", "0")), x="x.csv")
    assert media["x"].tolist() == [[3, 1], [6, 4]]
    assert refused(tmp_path, SeriesConfig("x", columns=("d",)), x="x.csv") == "corrupt_series"


def test_series_of_several_rates_are_brought_to_one(tmp_path):
    """A slow sine on a ramp is the same whichever rate it was measured at."""

    def measured(rate: int) -> np.ndarray:
        t = np.arange(rate) / rate
        return 3 + t + np.sin(2 * np.pi * 5 * t)

    for rate in (12_000, 48_000):
        np.save(tmp_path / f"{rate}.npy", measured(rate))
    config, found = SeriesConfig("x", rate=12_000, rate_field="hertz"), {}
    for rate in (12_000, 48_000):
        sample, media = read(tmp_path, config, x=f"{rate}.npy", hertz=rate)
        found[rate] = media["x"]
        assert [note.reason for note in sample.notes] == (["resampled"] if rate == 48_000 else [])
    assert found[48_000].shape == found[12_000].shape
    np.testing.assert_allclose(found[48_000], found[12_000], atol=0.02)


def test_series_that_are_refused(tmp_path):
    np.save(tmp_path / "nan.npy", np.array([1.0, np.nan]))
    np.save(tmp_path / "deep.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "gap.csv").write_text("1,2\n3,\n")
    (tmp_path / "ragged.csv").write_text("1,2\n3\n")
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 nothing")
    x = SeriesConfig("x")
    assert refused(tmp_path, x, x="nan.npy") == refused(tmp_path, x, x="gap.csv") == "not_finite"
    assert refused(tmp_path, x, x=[1, None]) == "not_finite"
    for name in ("deep.npy", "object.npy", "text.npy", "ragged.csv", "bad.npz"):
        assert refused(tmp_path, x, x=name) == "corrupt_series", name
    assert refused(tmp_path, x, x=[[1, 2], [3]]) == "corrupt_series"
    assert refused(tmp_path, x, x="none.csv") == refused(tmp_path, x, x="none.npy") == "missing_series"
    assert refused(tmp_path, x, x="/etc/x.npy") == "outside_root"
    rated = SeriesConfig("x", rate=10, rate_field="hertz")
    for hertz in (0, -1, "fast", None, True, float("nan")):
        assert refused(tmp_path, rated, x=[1.0], hertz=hertz) == "bad_rate"


def write_frames(folder: Path, count: int) -> list[str]:
    (folder / "clip").mkdir()
    for number in range(count):
        PilImage.new("RGB", (6, 4), (10 * number, 0, 0)).save(folder / "clip" / f"{number}.png")
    return [f"clip/{number}.png" for number in range(count)]


@pytest.mark.parametrize("form", ["folder", "list", "npy"])
def test_a_clip_is_the_same_from_a_folder_a_list_and_an_array(form, tmp_path):
    names = write_frames(tmp_path, 12)  # 10.png comes behind 9.png
    frames = np.stack([np.asarray(PilImage.open(tmp_path / name)) for name in names])
    np.save(tmp_path / "clip.npy", frames)
    value = {"folder": "clip", "list": names, "npy": "clip.npy"}[form]
    config = ClipConfig("clip", size=(2, 3), most=4, file_rate=10)
    _, media = read(tmp_path, config, frames=value)
    assert media["clip"].shape == (4, 2, 3, 3) and media["clip"].dtype == np.uint8
    assert media["clip"][:, 0, 0, 0].tolist() == [0, 40, 70, 110]
    np.testing.assert_allclose(media["clip_times"], [0, 0.4, 0.7, 1.1], atol=1e-6)


def test_frames_at_a_rate_are_those_nearest_in_time(tmp_path):
    names = write_frames(tmp_path, 6)
    config = ClipConfig("clip", size=(1, 1), most=10, rate=2, times_field="times", grey=True)
    times = [5.0, 5.4, 5.6, 6.1, 6.4, 7.0]
    _, media = read(tmp_path, config, frames=names, times=times)
    # Wanted are 5, 5.5, 6, 6.5 and 7; 5.4 and 5.6 are equally near to 5.5, and the earlier is taken.
    np.testing.assert_allclose(media["clip_times"], [0, 0.4, 1.1, 1.4, 2.0], atol=1e-6)
    assert media["clip"].shape == (5, 1, 1, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.floats(0.5, 50))
def test_frames_that_are_taken_exist_and_do_not_go_back(count, most, rate):
    config = ClipConfig("clip", most=most, rate=rate, file_rate=10)
    clip = config.open({"frames": "x.npy"}, RecordPlace(Path("/nowhere"), "sample 0")).media["clip"]
    taken = clip._taken(count)  # pyright: ignore[reportAttributeAccessIssue]
    assert 1 <= len(taken) <= most and taken[0] == 0 and max(taken) < count
    assert all(a <= b for a, b in zip(taken, taken[1:], strict=False))


def test_clips_that_are_refused(tmp_path):
    write_frames(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    np.save(tmp_path / "floats.npy", np.zeros((2, 4, 4, 3)))
    clip = ClipConfig("clip")
    for value in ([], "empty", "none.npy"):
        assert refused(tmp_path, clip, frames=value) == "no_frames"
    assert refused(tmp_path, clip, frames="nowhere") == "missing_image"
    assert refused(tmp_path, clip, frames=["clip/9.png"]) == "missing_image"
    assert refused(tmp_path, clip, frames=[3]) == "bad_clip_field"
    assert refused(tmp_path, clip, frames="../clip") == "outside_root"
    assert refused(tmp_path, clip, frames="floats.npy") == "corrupt_clip"
    timed = ClipConfig("clip", rate=1, times_field="times")
    for times in ([0.0], [1.0, 0.0], [0.0, "1"], None, 3, [0.0, float("nan")]):
        assert refused(tmp_path, timed, frames="clip", times=times) == "bad_times", times


def test_a_scan_is_turned_so_that_axes_grow_right_front_and_up():
    """Stored as [z down, x left, y front]: voxel [k, i, j] lies at (-2 i, 3 j, -5 k)."""
    values = np.arange(24.0).reshape(2, 3, 4)
    affine = np.array([[0, -2.0, 0, 0], [0, 0, 3.0, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1]])
    turned, place = canonical(Scan(values, affine))
    assert turned.shape == (3, 4, 2) and spacing_of(place) == (2, 3, 5)
    np.testing.assert_allclose(place[:3, :3], np.diag([2, 3, 5]))
    for x in range(3):
        for y in range(4):
            for z in range(2):
                assert turned[x, y, z] == values[1 - z, 2 - x, y]
    np.testing.assert_allclose(place[:3, 3], [-4, 0, -5])


def test_voxels_of_another_size_keep_the_extent_and_the_mean():
    values = np.random.default_rng(0).normal(size=(12, 8, 6)).astype(np.float32)
    found = resized(values, (1, 1, 2), (2, 1, 1))
    assert found.shape == (6, 8, 12)
    np.testing.assert_allclose(found.mean(), values.mean(), atol=0.05)
    flat = resized(np.full((5, 5, 5), 3, np.float32), (1, 1, 1), (0.7, 1.3, 2))
    np.testing.assert_allclose(flat, 3, rtol=1e-6)
    assert resized(values, (1, 1, 2), (1, 1, 2)) is values


def test_a_volume_is_windowed_and_brought_to_a_shape(tmp_path):
    values = np.linspace(-1000, 1000, 27).reshape(3, 3, 3)
    np.savez(tmp_path / "v.npz", volume=values, affine=np.eye(4))
    config = VolumeConfig("scan", window=(0, 1000), shape=(5, 1, 3))
    _, media = read(tmp_path, config, scan="v.npz")
    expected = ((values + 500) / 1000).clip(0, 1)
    assert media["scan"].shape == (5, 1, 3, 1)
    np.testing.assert_allclose(media["scan"][1:4, 0, :, 0], expected[:, 1], rtol=1e-5)
    assert not media["scan"][[0, 4]].any()


def test_volumes_that_are_refused(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((2, 2, 2)))
    np.savez(tmp_path / "v.npz", volume=np.zeros((2, 2, 2)))
    np.savez(tmp_path / "flat.npz", volume=np.zeros((2, 2, 2)), affine=np.zeros((4, 4)))
    np.savez(tmp_path / "nan.npz", volume=np.full((2, 2, 2), np.nan), affine=np.eye(4))
    np.savez(tmp_path / "deep.npz", volume=np.zeros((2, 2, 2, 2)), affine=np.eye(4))
    scan = VolumeConfig("scan")
    for name in ("v.npy", "v.npz", "flat.npz"):
        assert refused(tmp_path, scan, scan=name) == "no_affine", name
    assert refused(tmp_path, scan, scan="nan.npz") == "not_finite"
    assert refused(tmp_path, scan, scan="deep.npz") == "corrupt_volume"
    assert refused(tmp_path, scan, scan="none.nii.gz") == "missing_volume"
    _, media = read(tmp_path, VolumeConfig("scan", affine="ignored"), scan="v.npy")
    assert media["scan"].shape == (2, 2, 2, 1)


@pytest.mark.skipif(importlib.util.find_spec("nibabel") is not None, reason="nibabel is there")
def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "v.nii.gz").write_bytes(b"x")
    with pytest.raises(BadSample, match=r"needs nibabel: pip install 'vl_jax\[medical\]'") as caught:
        read(tmp_path, VolumeConfig("scan"), scan="v.nii.gz")
    assert caught.value.reason == "missing_package"


def test_nifti_is_read_as_nibabel_reads_it(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    values = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    turn = np.array([[0, 0, 1.5, 4], [-2.0, 0.1, 0, 5], [0.1, -3.0, 0, 6], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values, turn), tmp_path / "v.nii.gz")
    _, media = read(tmp_path, VolumeConfig("scan"), scan="v.nii.gz")
    expected = nibabel.as_closest_canonical(nibabel.load(tmp_path / "v.nii.gz"))
    np.testing.assert_allclose(media["scan"][..., 0], expected.get_fdata(), rtol=1e-5)
    moved, affine = canonical(Scan(values, turn))
    np.testing.assert_allclose(affine, expected.affine, atol=1e-5)
    image = nibabel.Nifti1Image(values, None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, tmp_path / "bare.nii")
    assert refused(tmp_path, VolumeConfig("scan"), scan="bare.nii") == "no_affine"
    (tmp_path / "bad.nii").write_bytes(b"x" * 400)
    assert refused(tmp_path, VolumeConfig("scan"), scan="bad.nii") == "corrupt_volume"


@pytest.mark.skipif(not (DATA / "ct_example").is_dir(), reason="needs ../shared/data/ct_example")
def test_a_ct_volume_and_its_slices():
    pytest.importorskip("nibabel")
    pytest.importorskip("pydicom")
    place = RecordPlace((DATA / "ct_example").resolve(), "x")
    config = VolumeConfig("scan", spacing=(6, 6, 6), window=(40, 400), shape=(32, 32, 32))
    (ct,) = config.open({"scan": "example_ct_sm.nii.gz"}, place).media.values()
    found = ct()
    assert found.shape == (32, 32, 32, 1) and 0.05 < found.mean() < 0.95
    (slices,) = VolumeConfig("scan").open({"scan": "dicom"}, place).media.values()
    found = slices()
    assert (
        found.shape[2] == 6 and found.min() >= -2048 and found.max() > 100
    )  # air and bone in Hounsfield units


def test_depth_and_flow_are_stretched_to_a_size(tmp_path):
    levels = np.array([[1000, 0], [2000, 500]], np.uint16)
    PilImage.fromarray(levels).save(tmp_path / "d.png")
    flow = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    (tmp_path / "f.flo").write_bytes(struct.pack("<fii", 202021.25, 4, 2) + flow.tobytes())
    np.save(tmp_path / "f.npy", flow)
    depth = DepthMapConfig("depth", size=(4, 2))
    _, media = read(tmp_path, depth, FlowMapConfig("flow", size=(4, 4)), depth="d.png", flow="f.flo")
    assert media["depth"][..., 0].tolist() == [[1, 0], [1, 0], [2, 0.5], [2, 0.5]]
    np.testing.assert_allclose(media["flow"], np.repeat(flow, 2, axis=0) * [1, 2])
    _, same = read(tmp_path, FlowMapConfig("flow", size=(4, 4)), flow="f.npy")
    np.testing.assert_array_equal(same["flow"], media["flow"])
    (tmp_path / "bad.flo").write_bytes(b"PIEH")
    assert refused(tmp_path, FlowMapConfig("flow"), flow="bad.flo") == "corrupt_flow"
    assert refused(tmp_path, FlowMapConfig("flow"), flow="no.flo") == "missing_flow"
    assert refused(tmp_path, depth, depth="no.npy") == "missing_depth"
    assert refused(tmp_path, depth, depth="no.png") == "missing_image"
    PilImage.new("RGB", (2, 2)).save(tmp_path / "rgb.png")
    assert refused(tmp_path, depth, depth="rgb.png") == "corrupt_depth"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WaveConfig(""), "name='' of a medium"),
        (lambda: WaveConfig("w", rate=10), "rate=10 of wave 'w': must lie in 1000..192000 Hz"),
        (lambda: WaveConfig("w", max_seconds=0), "max_seconds=0 of wave 'w'"),
        (lambda: SeriesConfig("x", rate=5), "rate=5 of series 'x' needs file_rate or rate_field"),
        (lambda: SeriesConfig("x", rate=5, file_rate=5, rate_field="r"), "set one of them"),
        (lambda: ClipConfig("c", rate=5), "rate=5 of clip 'c' needs file_rate or times_field"),
        (lambda: ClipConfig("c", most=0), "most=0 of clip 'c'"),
        (lambda: VolumeConfig("v", spacing=(1, 1, 0)), "spacing=\\(1, 1, 0\\) of volume 'v'"),
        (lambda: VolumeConfig("v", spacing=(1, 1, 1), affine="ignored"), "needs affine='needed'"),
        (lambda: VolumeConfig("v", window=(0, 0)), "its width must be above 0"),
        (lambda: DepthMapConfig("d", levels=0), "must be above 0"),
        (lambda: FlowMapConfig("f", size=(0, 1)), "must be at least 1"),
        (
            lambda: RecordsConfig("s", "a.json", media=(WaveConfig("x"), SeriesConfig("x"))),
            "media of source 's': names",
        ),
    ],
)
def test_configs_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_media_of_a_source_are_written_to_a_config_and_read_again():
    media = (WaveConfig("wave"), VolumeConfig("scan", window=(40, 400)), ClipConfig("clip"))
    data = DataConfig(sources=(RecordsConfig("s", "a.json", media=media),))
    assert schema.from_json(schema.to_json(data), DataConfig) == data
