"""Long files in chunks: the pieces are the file, and at its end heads say what they say of the whole."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vl_jax
from vl_jax.api.listen import listen
from vl_jax.api.run import Run
from vl_jax.batch import Given
from vl_jax.data.config import DataConfig
from vl_jax.data.files.sound_files import read_blocks, read_sound
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.media.chunks import chunks_of
from vl_jax.data.media.wave import WaveConfig
from vl_jax.data.sources.build import RecordsConfig
from vl_jax.encoders.series.recurrent import RecurrentConfig
from vl_jax.encoders.series.tcn import TCNConfig
from vl_jax.encoders.sound.spectrogram import SpectrogramConfig
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import plan_layout
from vl_jax.runtime.errors import UserError
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState

AUDIO = AudioConfig(8000, num_bands=8, max_seconds=0.2)
BOTH_WAYS = RecurrentConfig(4, bidirectional=True)
MODEL = JointConfig(
    (
        Tower("sound", SpectrogramConfig(AUDIO, recurrent=RecurrentConfig(4), pooling="last"), "wave"),
        Tower("shaking", TCNConfig(max_length=64, embed_dim=4, num_levels=2), "shaking"),
        Tower("both_ways", SpectrogramConfig(AUDIO, recurrent=BOTH_WAYS), "wave"),
    ),
    (Classification(("a", "b"), name="word", stream="sound"), Classification(("x", "y"), stream="shaking")),
)

EXPERIMENT = Experiment(
    name="x",
    model=MODEL,
    data=DataConfig(
        sources=(RecordsConfig("s", "s.json", media=(WaveConfig("wave"),)),),
        max_tokens=8,
        tiling=TilingConfig(tile_size=8),
    ),
    stages=(Stage("s", steps=1, batch_size=1, objective=Heads()),),
)


def write(file: Path, samples: np.ndarray, rate: int = 8000) -> Path:
    data = np.rint(samples * 32767).astype("<i2").tobytes()
    head = struct.pack("<HHIIHH", 1, samples.shape[1], rate, rate * 2, 2 * samples.shape[1], 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data
    file.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return file


@functools.cache
def opened() -> Run:
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    layout = plan_layout(MODEL, MODEL.smallest_batch(1), mesh)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), layout.params)
    state = TrainState(jnp.zeros((), jnp.int32), params, None, {}, collections={})
    return Run(Path("nowhere"), EXPERIMENT, layout, state, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 90), st.integers(1, 2))
def test_pieces_of_a_sound_are_the_sound(tmp_path_factory, length, size, channels):
    file = tmp_path_factory.mktemp("x") / "a.wav"
    write(file, np.random.default_rng(0).uniform(-1, 1, (length, channels)))
    whole = read_sound(file, "x").samples
    np.testing.assert_array_equal(np.concatenate(list(read_blocks(file, "x", size))), whole)
    pieces = list(chunks_of(file, size, rate=8000))
    assert {len(values) for values, _ in pieces} == {size} and sum(n for _, n in pieces) == length
    joined = np.concatenate([values for values, _ in pieces])
    np.testing.assert_allclose(joined[:length], whole.mean(1), atol=1e-6)
    assert not joined[length:].any()
    np.save(file.with_suffix(".npy"), whole)
    series = list(chunks_of(file.with_suffix(".npy"), size, rate=None))
    np.testing.assert_array_equal(np.concatenate([v for v, _ in series])[:length], whole)


@pytest.mark.slow
def test_what_is_said_at_the_end_is_what_is_said_of_the_whole(tmp_path):
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, (1500, 1))
    file = write(tmp_path / "a.wav", samples)
    run = opened()
    heard = list(vl_jax.listen(run, file, steps=400, tower="sound"))
    assert [h.steps for h in heard] == [400, 800, 1200, 1500, 1500]  # the last for what comes late
    assert all(h.latency_ms > 0 and set(h.said) == {"word"} for h in heard)
    batch = MODEL.smallest_batch(1)
    values = np.zeros((1, 1600), np.float32)
    values[0, :1500] = read_sound(file, "x").samples[:, 0]
    wave = Given(values, np.ones(1, bool), np.array([1500], np.int32))
    whole = run.layout.model.apply(
        {"params": run.params}, batch.replace(media={**batch.media, "wave": wave}), {}
    )
    expected = MODEL.head("word").probabilities(np.asarray(whole.predictions["word"][0]))
    assert heard[-1].said["word"] == pytest.approx(expected, abs=1e-5)
    np.save(tmp_path / "s.npy", np.zeros(70))
    assert [h.steps for h in listen(run, tmp_path / "s.npy", steps=32, tower="shaking")] == [32, 64, 70]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 400}, "tower='': towers that read in chunks: sound, shaking, both_ways"),
        ({"steps": 400, "tower": "no"}, "tower='no': towers that read in chunks"),
        ({"steps": 401, "tower": "sound"}, "steps=401: a chunk of tower 'sound' has a multiple of 80 steps"),
        ({"steps": 400, "tower": "both_ways"}, "bidirectional=True reads from the end"),
    ],
)
def test_what_cannot_be_heard_in_chunks(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        next(listen(opened(), tmp_path / "a.wav", **options))


@pytest.mark.slow
def test_files_that_cannot_be_heard(tmp_path):
    slow = write(tmp_path / "slow.wav", np.zeros((10, 1)), rate=4000)
    for file, words in (
        (slow, "at 4000 Hz, the model hears 8000 Hz"),
        (tmp_path / "no.wav", "no sound file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            next(listen(opened(), file, steps=400, tower="sound"))
        assert "\n" not in str(caught.value)
