"""Sounds: read from files, drawn as log-mel pictures, and marked in conversations beside images."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import struct
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from scipy.io import wavfile
from scipy.signal import stft

from vl_jax import cli
from vl_jax.config import load
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.files.sound_files import read_header, read_sound
from vl_jax.data.images import audio
from vl_jax.data.images.audio import AudioConfig, SoundImage, log_mel, mel_bands, to_levels
from vl_jax.data.images.augment import AugmentationConfig, augment
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import BadSample, image_size
from vl_jax.data.sources import array_records
from vl_jax.data.sources.build import LlavaConfig, open_source
from vl_jax.data.stream.lengths import Measure
from vl_jax.data.tools import examination
from vl_jax.data.tools.convert import convert
from vl_jax.runs import run

ROOT = Path(__file__).resolve().parent.parent
SMALL = AudioConfig(sample_rate=8000, window_ms=32, hop_ms=16, num_bands=32, min_seconds=0.5, max_seconds=2)


def tone(hertz: float, rate: int = 8000, seconds: float = 0.5, height: float = 0.5) -> np.ndarray:
    return (height * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def write(file: Path, samples: np.ndarray, rate: int = 8000) -> Path:
    wavfile.write(file, rate, samples)
    return file


def reason_of(file: Path, config: AudioConfig = SMALL) -> str:
    """Why a sound cannot be used, and that its message says where it is."""
    with pytest.raises(BadSample, match="here") as found:
        SoundImage(file, "here", config)()
    return found.value.reason


@pytest.mark.parametrize("hertz", [150, 440, 1000, 2500, 3800])
def test_a_tone_lights_the_band_around_its_mel(hertz):
    levels = log_mel(tone(hertz), AudioConfig(sample_rate=8000, num_bands=40))
    band = levels[:, 10].argmax()
    step = 1127 * np.log(1 + 4000 / 700) / 41  # the same scale, as it is written elsewhere
    assert abs(1127 * np.log(1 + hertz / 700) / step - (band + 1)) <= 0.75


def test_levels_are_decibels_of_a_sine_of_full_scale():
    exact = 64 * 8000 / 512  # in the middle of a frequency of the transform
    loud, soft = (log_mel(tone(exact, height=h), SMALL) for h in (1.0, 0.1))
    assert abs(loud[:, 3:8].max()) < 1.8  # a triangle adds up what the window spreads
    peak = loud[:, 5].argmax()
    np.testing.assert_allclose(loud[peak, 3:8] - soft[peak, 3:8], 20, atol=0.01)


def test_a_spectrogram_equals_that_of_scipy_under_bands_computed_one_by_one():
    samples = np.random.default_rng(0).normal(0, 0.1, 4000).astype(np.float32)
    hann = np.hanning(SMALL.window + 2)[1:-1]
    size = 2 * (mel_bands(SMALL).shape[1] - 1)
    *_, spectrum = stft(
        samples,
        window=hann,
        nperseg=SMALL.window,
        noverlap=SMALL.window - SMALL.hop,
        nfft=size,
        boundary=None,
        padded=False,
        scaling="spectrum",
    )
    power = np.abs(2 * spectrum) ** 2
    corners = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 34)]
    expected = np.zeros((32, power.shape[1]))
    for band, (low, peak, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for number, hertz in enumerate(np.arange(size // 2 + 1) * 8000 / size):
            inside = (hertz - low) / (peak - low) if hertz < peak else (high - hertz) / (high - peak)
            expected[band] += max(inside, 0.0) * power[number]
    found = log_mel(samples, SMALL)[:, : power.shape[1]]
    np.testing.assert_allclose(found, 10 * np.log10(expected), atol=2e-3)


@settings(deadline=None)
@given(rate=st.integers(1000, 96_000), bands=st.integers(1, 256), window=st.floats(1, 100))
def test_no_band_is_empty(rate, bands, window):
    config = AudioConfig(sample_rate=rate, num_bands=bands, window_ms=window, hop_ms=1, max_seconds=1)
    assert mel_bands(config).max(1).min() > 0


def test_high_is_up_white_is_loud_and_silence_is_black():
    picture = to_levels(log_mel(np.concatenate([tone(3800), tone(150)]), SMALL), SMALL).astype(int)
    height, width = picture.shape
    assert picture[: height // 2, : width // 2 - 2].mean() > picture[height // 2 :, : width // 2 - 2].mean()
    assert picture[: height // 2, width // 2 + 1 :].mean() < picture[height // 2 :, width // 2 + 1 :].mean()
    assert not to_levels(log_mel(np.zeros(4000, np.float32), SMALL), SMALL).any()


def encoded(samples: np.ndarray, kind: str) -> np.ndarray:
    scale = {"u1": 127, "i2": 2**15 - 1, "i4": 2**31 - 1}
    if kind.startswith("f"):
        return samples.astype(kind)
    whole = np.rint(samples.astype(np.float64) * scale[kind])
    return (whole + 128 * (kind == "u1")).astype(kind)


@pytest.mark.parametrize("kind", ["u1", "i2", "i3", "i4", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_kind_of_wav_holds_the_same_sound(tmp_path, kind, channels):
    both = np.stack([tone(440), tone(880)], 1)[:, :channels]
    if kind == "i3":
        wide = np.rint(both * (2**23 - 1)).astype("<i4").tobytes()
        with wave.open(str(tmp_path / "a.wav"), "wb") as out:
            out.setparams((channels, 3, 8000, 0, "NONE", ""))
            out.writeframes(np.frombuffer(wide, np.uint8).reshape(-1, 4)[:, :3].tobytes())
    else:
        write(tmp_path / "a.wav", encoded(both, kind))
    found = read_sound(tmp_path / "a.wav", "here")
    header = read_header(tmp_path / "a.wav", "here")
    assert (header.rate, header.channels, header.length) == (8000, channels, 4000)
    np.testing.assert_allclose(found.samples, both, atol=0.01 if kind == "u1" else 1e-4)


def test_wav_of_the_extensible_form_with_other_chunks_and_an_unknown_size(tmp_path):
    samples = encoded(tone(440), "i2").tobytes()
    form = struct.pack("<HHIIHHHHIH14x", 0xFFFE, 1, 8000, 16000, 2, 16, 22, 16, 4, 1)
    chunks = [(b"LIST", b"odd"), (b"fmt ", form)]
    body = b"".join(name + struct.pack("<I", len(x)) + x + b"\0" * (len(x) & 1) for name, x in chunks)
    data = b"RIFF\xff\xff\xff\xffWAVE" + body + b"data\xff\xff\xff\xff" + samples
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_sound(tmp_path / "a.wav", "here").samples) == 4000


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000, 44_101, 96_000])
def test_a_tone_of_any_rate_becomes_the_same_picture_of_the_size_promised(tmp_path, rate):
    image = SoundImage(write(tmp_path / "a.wav", tone(440, rate, 0.7), rate), "here", SMALL)
    picture = image()
    assert picture.size == image.size() == (44, 32)
    expected = to_levels(log_mel(tone(440, 8000, 0.7), SMALL), SMALL)
    near = np.abs(np.asarray(picture)[..., 0].astype(int) - expected)[:, 1:40]
    assert near[expected[:, 1:40] > 128].max() <= 4


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 9000), rate=st.integers(1000, 50_000))
def test_the_size_is_known_from_the_header(tmp_path_factory, length, rate):
    file = tmp_path_factory.getbasetemp() / "sized.wav"
    write(file, np.ones(length, np.int16), rate)
    image = SoundImage(file, "here", AudioConfig(num_bands=8, max_seconds=10))
    assert image().size == image_size(image)


def test_faults_are_told_apart(tmp_path):
    file = tmp_path / "a.wav"
    assert reason_of(file) == "missing_audio"
    write(file, np.zeros(0, np.int16))
    assert reason_of(file) == "empty_audio"
    write(file, np.zeros(16_001, np.int16))
    assert reason_of(file) == "audio_too_long"
    write(file, np.array([0, np.nan, 1], np.float32))
    assert reason_of(file) == "corrupt_audio"
    write(file, np.zeros(1000, np.int16))
    file.write_bytes(file.read_bytes()[:-1])
    assert reason_of(file) == "corrupt_audio"
    file.write_bytes(b"")
    assert reason_of(file) == "corrupt_audio"


def test_damaged_headers_neither_crash_nor_hang(tmp_path):
    whole = io.BytesIO()
    wavfile.write(whole, 8000, encoded(tone(440, seconds=0.1), "i2"))
    rng, start, seen = np.random.default_rng(0), time.process_time(), set()
    for _ in range(400):
        data = bytearray(whole.getvalue())
        for _ in range(rng.integers(1, 6)):
            place = rng.integers(0, 48)
            data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(0, 256)])
        cut = data[: rng.integers(0, 60)] if rng.random() < 0.2 else data
        (tmp_path / "a.wav").write_bytes(cut)
        try:
            picture = SoundImage(tmp_path / "a.wav", "here", SMALL)()
            seen.add("read")
            assert picture.height == 32 and picture.width <= SMALL.columns(2)
        except BadSample as error:
            seen.add(error.reason)
    assert {"read", "corrupt_audio"} <= seen <= {"read", "corrupt_audio", "audio_too_long", "empty_audio"}
    assert time.process_time() - start < 20


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, hertz in enumerate((300, 1200)):
        write(tmp_path / f"{number}.wav", tone(hertz))
    PilImage.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / "red.png")
    return tmp_path


def opened(folder: Path, *records, name: str = "d.json"):
    text = json.dumps(records) if name.endswith("json") else "\n".join(map(json.dumps, records))
    (folder / name).write_text(text)
    return open_source(LlavaConfig("sounds", name, audio=SMALL), root=str(folder))


def talk(question, answer="It.", **fields):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": said, **fields}


def kinds(sample) -> list[str]:
    return [i.path.name for i in sample.images]


def test_sounds_and_images_stand_where_the_text_marks_them(folder):
    source = opened(
        folder,
        talk("<audio>then<image>then<audio>?", audio=["0.wav", "1.wav"], image="red.png"),
        {"audio": "1.wav", "text": "a transcript"},
        {"audio": "0.wav", "image": "red.png", "question": "What?", "answer": "It."},
        {"audio": "0.wav", "image": "red.png", "question": "<audio> What?", "answer": "<audio>"},
    )
    assert kinds(source[0]) == ["0.wav", "red.png", "1.wav"]
    assert source[0].turns[0].question == "<image>then<image>then<image>?"
    assert (source[1].turns[0].question, source[1].turns[0].kind) == ("<image>\n", "open")
    assert kinds(source[2]) == ["red.png", "0.wav"]
    assert source[2].turns[0].question == "<image>\n<image>\nWhat?"
    assert kinds(source[3]) == ["red.png", "0.wav"] and source[3].turns[0].answer == "<audio>"


def test_parts_of_messages_bring_sounds(folder):
    parts = [
        {"type": "audio", "audio": "1.wav"},
        {"type": "image", "image": "red.png"},
        {"type": "audio_url", "audio_url": {"url": "0.wav"}},
        {"type": "text", "text": "What?"},
    ]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "It."}]}
    unnamed = json.loads(json.dumps(record))
    unnamed["messages"][0]["content"] = [{"type": "input_audio"}, {"type": "text", "text": "What?"}]
    source = opened(folder, record, {**unnamed, "audios": ["0.wav"]}, name="d.jsonl")
    assert kinds(source[0]) == ["1.wav", "red.png", "0.wav"]
    assert source[0].turns[0].question == "<image>\n<image>\n<image>\nWhat?"
    assert kinds(source[1]) == ["0.wav"]


def test_records_with_sounds_that_break_a_rule_are_told_apart(folder):
    os.symlink("/etc/hostname", folder / "link.wav")
    data = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    message = [{"role": "user", "content": [data]}, {"role": "assistant", "content": "It."}]
    expected = [
        (talk("<audio>?", audio="../0.wav"), "outside_root"),
        (talk("<audio>?", audio="link.wav"), "outside_root"),
        (talk("<audio>?", audio="a\0.wav"), "missing_audio"),
        (talk("<audio>?", audio=[3]), "bad_audio_field"),
        (talk("<audio>?"), "placeholder_mismatch"),
        (talk("What?", audio="0.wav"), "placeholder_mismatch"),
        (talk("<image>?", audio="0.wav"), "placeholder_mismatch"),
        ({"messages": message}, "bad_audio_field"),
    ]
    source = opened(folder, *(record for record, _ in expected))
    for index, (_, reason) in enumerate(expected):
        with pytest.raises(BadSample, match=f"record {index}") as found:
            [image() for image in source[index].images]
        assert found.value.reason == reason


def data_config(folder: Path) -> DataConfig:
    source = LlavaConfig("sounds", "d.json", audio=SMALL)
    tiling = TilingConfig(32, views="global")
    return DataConfig(root=str(folder), sources=(source,), tiling=tiling, max_tiles=2)


SPEC = ModelSpec(2, "prefix", 2048)


def test_lengths_the_doctor_and_training_see_the_same_sounds(folder):
    write(folder / "bad.wav", np.array([np.inf], np.float32))
    records = [talk("<audio>?", audio="0.wav"), talk("<image><audio>?", audio="1.wav", image="red.png")]
    source = opened(folder, *records, talk("<audio>?", audio="bad.wav"), records[0])
    encoder = make_encoder(data_config(folder), SPEC)
    examples = [encoder.example(source[i]) for i in range(2)]
    lengths = Measure(encoder, "dialogue", "answers")([source[i] for i in range(2)])
    assert lengths.tiles.tolist() == [len(e.tiles) for e in examples] == [1, 2]
    totals = lengths.trunk + np.add.reduceat(lengths.turns, lengths.offsets[:-1])
    assert totals.tolist() == [len(e.tokens) for e in examples]
    seen = examination.examine(data_config(folder), SPEC, "sounds")
    assert seen.num_usable == 3
    assert "cannot be used: corrupt audio" in {f.what for f in seen.findings}


@pytest.mark.skipif(not importlib.util.find_spec("array_record"), reason="needs array_record")
def test_converted_sounds_are_their_pictures(folder):
    source = opened(folder, talk("<audio>?", audio="0.wav"), talk("<audio>?", audio="absent.wav"))
    report = convert(LlavaConfig("sounds", "d.json", audio=SMALL), source, folder / "out")
    assert (report.records, report.reasons) == (1, {"missing_audio": 1})
    found = array_records.decode(array_records.encode(source[0]), "here")
    assert found.images[0]().tobytes() == source[0].images[0]().tobytes()
    assert found.turns == source[0].turns


@pytest.mark.skipif(not importlib.util.find_spec("array_record"), reason="needs array_record")
@pytest.mark.parametrize("file", ["report.json", "source.json"])
def test_a_conversion_of_a_version_that_knew_no_sounds_goes_on(folder, file):
    source, config = opened(folder, {"question": "What?", "answer": "It."}), LlavaConfig("sounds", "d.json")
    done = convert(config, source, folder / "out")
    place = folder / "out" / "report.json"
    before = json.loads(place.read_text())
    before["source"] = before["source"].replace(f", audio={AudioConfig()!r}", "")
    if file == "source.json":
        shutil.rmtree(folder / "out")
        (folder / "out.partial").mkdir()
        place = folder / "out.partial" / file
        before = {k: before[k] for k in ("source", "stamp", "length", "per_file", "split_texts")}
    place.write_text(json.dumps(before))
    assert convert(config, source, folder / "out") == done
    other = LlavaConfig("sounds", "d.json", audio=SMALL)
    with pytest.raises(ValueError, match="is not a conversion of this source"):
        convert(other, source, folder / "out")


def test_a_sound_is_never_played_backwards(folder):
    source = opened(
        folder, talk("<audio>Which one?", audio="0.wav"), talk("<image>What sound?", image="red.png")
    )
    config = AugmentationConfig(flip_rate=1.0)
    for index in range(2):
        changed = augment(source[index], config, np.random.default_rng(0), length=len)
        assert changed.images[0]().tobytes() == source[index].images[0]().tobytes()


def test_other_formats_need_the_extra_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(40))
    with pytest.raises(BadSample, match=r"vl_jax\[audio\]") as found:
        SoundImage(tmp_path / "a.flac", "here", SMALL)()
    assert found.value.reason == "missing_package"


def test_flac_mp3_and_wav_of_the_shared_clips(shared_data):
    pytest.importorskip("soundfile", exc_type=ImportError)
    source = open_source(
        LlavaConfig("clips", "audio_samples.json", audio=AudioConfig(num_bands=64)),
        root=str(shared_data / "av_clips_demo"),
    )
    sizes = [(image.size(), image().size) for index in range(3) for image in source[index].images]
    assert [known for known, _ in sizes] == [real for _, real in sizes]
    assert [width for (width, _), _ in sizes] == [404, 291, 586]


@pytest.mark.slow
def test_a_run_is_asked_about_a_sound(folder, tmp_path, capsys):
    """With the experiment of the command line's tests, whose model is trained for three steps on this."""
    opened(folder, *(talk("<audio>?", audio=f"{n}.wav") for n in (0, 1)))
    experiment = load(str(ROOT / "tests" / "tiny_experiment.py"))
    source = LlavaConfig("scenes", "d.json", audio=SMALL)
    data = dataclasses.replace(experiment.data, root=str(folder), sources=(source,), evaluation=())
    run(dataclasses.replace(experiment, data=data), tmp_path / "run")
    asked = ["generate", f"--workdir={tmp_path / 'run'}", "--prompt=Which?", "--max-new-tokens=2"]
    assert cli.main([*asked, f"--audio={folder / '0.wav'}"]) == 0
    capsys.readouterr()
    assert cli.main([*asked, f"--audio={folder / 'none.wav'}"]) == 2
    assert "missing_audio" in capsys.readouterr().err


def test_spoken_digits_fill_a_tile_of_their_experiment(shared_data):
    pytest.importorskip("ml_collections")  # experiment files return its ConfigDict
    experiment = load(str(ROOT / "experiments" / "fsdd_digits.py"))
    for config in (*experiment.data.sources, *experiment.data.evaluation):
        source = open_source(config, root=str(shared_data / "fsdd_digits"))
        sizes = {image.size() for index in range(0, len(source), 10) for image in source[index].images}
        assert {height for _, height in sizes} == {64} and min(sizes)[0] == 64


@pytest.mark.parametrize(
    "fields",
    [
        {"sample_rate": 10},
        {"num_bands": 0},
        {"floor_db": 0.0},
        {"hop_ms": 30.0},
        {"min_seconds": 40.0},
        {"max_seconds": 1e6},
    ],
)
def test_a_config_out_of_range_is_refused(fields):
    with pytest.raises(ValueError, match=f"audio.{'|audio.'.join(fields)}"):
        AudioConfig(**fields)


def test_one_window_is_enough():
    assert audio.log_mel(np.ones(1, np.float32), AudioConfig(num_bands=8)).shape == (8, 1)
