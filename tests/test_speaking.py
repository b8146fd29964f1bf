"""Speech: durations, the head that speaks, and sounds from spectrograms."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.batch import Given
from vl_jax.data.files.sound_files import read_sound
from vl_jax.data.images.audio import AudioConfig, log_mel
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Stream
from vl_jax.heads.speech import griffin_lim
from vl_jax.heads.speech.durations import equal_shares, learnt_shares, looks, stretched
from vl_jax.heads.speech.speaking import Speaking, Spoken, as_wav

AUDIO = AudioConfig(sample_rate=8000, window_ms=32, hop_ms=12, num_bands=24, floor_db=-100)
SINE = np.sin(2 * np.pi * 440 * np.arange(3000) / 8000).astype(np.float32)
HEAD = Speaking(audio=AUDIO, max_frames=12, steps=8, dim=8, num_layers=2, rounds=3)


def test_equal_shares_split_the_frames_evenly():
    mask = jnp.bool_([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    shares = equal_shares(mask)
    np.testing.assert_allclose(shares, [[0.25] * 4, [0.5, 0.5, 0, 0], [0] * 4])
    found = looks(shares, mask, 8)
    assert np.argmax(found[0], axis=-1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert np.argmax(found[1], axis=-1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(np.sum(found, axis=-1), [[1] * 8, [1] * 8, [0] * 8], atol=1e-6)
    assert not found[1, :, 2:].any()


def test_a_token_of_a_longer_share_has_more_frames():
    mask = jnp.bool_([[1, 1, 1]])
    shares = learnt_shares(jnp.log(jnp.float32([[1, 2, 5]])), mask)
    np.testing.assert_allclose(shares, [[0.125, 0.25, 0.625]], rtol=1e-6)
    found = looks(shares, mask, 16)
    assert np.argmax(found[0], axis=-1).tolist() == [0] * 2 + [1] * 4 + [2] * 10
    # By hand: the first frame is at 1/32, the tokens' middles and half widths are as below.
    off = (1 / 32 - np.array([1 / 16, 1 / 4, 11 / 16])) / np.array([1 / 16, 1 / 8, 5 / 16])
    bells = np.exp(-0.5 * off**2)
    np.testing.assert_allclose(found[0, 0], bells / bells.sum(), rtol=1e-4)
    slope = jax.grad(lambda s: looks(learnt_shares(s, mask), mask, 16)[0, :, 2].sum())(jnp.zeros((1, 3)))
    assert slope[0, 2] > 0 > slope[0, 0]  # a longer share takes frames from the others


def test_stretching_by_hand():
    said = jnp.float32([[[0.0], [1.0], [2.0], [3.0]]] * 3)
    found = stretched(said, jnp.float32([4, 2, 8]), 8)[..., 0]
    np.testing.assert_allclose(found[0, :4], [0, 1, 2, 3])
    np.testing.assert_allclose(found[1, :2], [0.5, 2.5])
    np.testing.assert_allclose(found[2], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_spectra_and_sound_are_each_others_inverse():
    found = griffin_lim.spectra(SINE, AUDIO)
    assert abs(np.abs(found).max() - 1) < 0.01  # a sine of full scale
    back = griffin_lim.to_sound(found, AUDIO)
    inner = slice(AUDIO.window, len(back) - AUDIO.window)
    np.testing.assert_allclose(back[inner], SINE[: len(back)][inner], atol=1e-9)


def test_griffin_lim_comes_near_the_magnitudes_of_a_sine():
    wanted = np.abs(griffin_lim.spectra(SINE, AUDIO))
    errors = [
        griffin_lim.off_by(griffin_lim.griffin_lim(wanted, AUDIO, rounds=n), wanted, AUDIO)
        for n in (0, 3, 60)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1
    same = [griffin_lim.griffin_lim(wanted, AUDIO, rounds=2, seed=s) for s in (0, 0, 1)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.allclose(same[0], same[2])


def test_a_spectrogram_comes_back_from_its_sound():
    sound = SINE * np.linspace(0.1, 0.9, len(SINE), dtype=np.float32)
    levels = log_mel(sound, AUDIO).T
    again = log_mel(griffin_lim.speak(levels, AUDIO), AUDIO).T[: len(levels)]
    loud = levels > -40
    assert np.mean(np.abs(again - levels)[loud]) < 4  # decibels; bands say little of what is between them


def streams(rows: int = 3):
    mask = jnp.arange(4)[None] < jnp.array([4, 2, 3])[:rows, None]
    return {"text": Stream(jax.random.normal(jax.random.key(0), (rows, 4, 6)), mask)}


@pytest.mark.parametrize("durations", ["equal", "learned"])
@pytest.mark.parametrize("reduction", [1, 4])
def test_every_row_is_spoken_by_itself_and_padding_is_silent(durations, reduction):
    head = dataclasses.replace(HEAD, durations=durations, reduction=reduction)
    module = head.build()
    variables = module.init(jax.random.key(1), streams())
    said = module.apply(variables, streams())
    assert said.levels.shape == (3, 8, 24) and said.log_frames.shape == (3,)
    text, order = streams()["text"], np.array([2, 0, 1])
    other = Stream(jnp.where(text.mask[..., None], text.tokens, 7.0)[order], text.mask[order])
    mixed = module.apply(variables, {"text": other})
    np.testing.assert_allclose(mixed.levels, said.levels[order], atol=1e-5)
    np.testing.assert_allclose(mixed.log_frames, said.log_frames[order], atol=1e-6)


def test_the_loss_counts_frames_that_are_there():
    label = np.full((2, *HEAD.shape), -1, np.float32)
    label[0, :4], label[1, :8] = 0.5, 0.25
    levels = jnp.concatenate([jnp.full((1, 8, 24), 0.5), jnp.full((1, 8, 24), 0.75)])
    said = Spoken(levels, jnp.log(jnp.float32([4, 4])))
    loss, found = HEAD.sums(said, Given(label, np.array([True, True])))
    np.testing.assert_allclose(found["mel"], 50.0, rtol=1e-5)  # 0 and half of 100 dB
    np.testing.assert_allclose(found["length"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 + 0.1 * np.log(2), rtol=1e-5)
    loss, _ = HEAD.sums(said, Given(label, np.array([True, False])))
    assert abs(float(loss)) < 1e-6


def test_a_recording_is_read_and_what_is_spoken_is_a_file(tmp_path):
    sample = Sample("a", (), media={"sound": lambda: SINE[:700]})
    label = HEAD.read(sample)
    assert label is not None and (label[:, 0] >= 0).tolist() == [True] * 8 + [False] * 4
    np.testing.assert_allclose(label[:8], np.clip(1 + log_mel(SINE[:700], AUDIO).T / 100, 0, 1), atol=1e-6)
    with pytest.raises(BadSample, match="32 frames, limit 12"):
        HEAD.read(dataclasses.replace(sample, media={"sound": lambda: SINE}))
    with pytest.raises(BadSample, match=r"sound of \[700, 1\], expected \[n\]"):
        HEAD.read(dataclasses.replace(sample, media={"sound": lambda: SINE[:700, None]}))
    assert HEAD.read(Sample("b", ())) is None
    said = HEAD.decode(Spoken(label[:8], np.log(np.float32(8))))
    (tmp_path / "a.wav").write_bytes(HEAD.made(said))
    sound = read_sound(tmp_path / "a.wav", "here")
    assert sound.rate == 8000 and len(sound.samples) == 7 * 96 + 256 and said["seconds"] == 0.116
    assert HEAD.shown(Spoken(label[:8], np.log(np.float32(8)))).size == (10, 24)
    # As one sees it that puts silence behind short sounds.
    heard = dataclasses.replace(AUDIO, min_seconds=0.24)
    picture = dataclasses.replace(HEAD, heard=heard).shown(Spoken(label[:8], np.log(np.float32(8))))
    assert picture.size == (20, 24) and not np.asarray(picture)[:, 10:].any()
    with pytest.raises(ValueError, match="heard.sample_rate=16000 of head 'speech' differs from"):
        dataclasses.replace(HEAD, heard=AudioConfig())


def test_a_wav_file_holds_sixteen_bits():
    content = as_wav(np.float32([0, 0.5, -1, 2]), 8000)
    assert io.BytesIO(content).read(4) == b"RIFF"
    assert np.frombuffer(content[-8:], "<i2").tolist() == [0, 16384, -32767, 32767]


def test_a_head_that_cannot_speak_is_said_in_one_line():
    with pytest.raises(ValueError, match="steps=8 of head 'speech': not a multiple of reduction=3"):
        dataclasses.replace(HEAD, reduction=3)
    with pytest.raises(ValueError, match="dim=7"):
        dataclasses.replace(HEAD, dim=7)
