"""Encoders of series and sounds: against other packages, with padding, by their past, and in chunks."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.signal

from vl_jax.data.images import audio
from vl_jax.data.images.audio import AudioConfig
from vl_jax.encoders.series.lstm import LSTMConfig
from vl_jax.encoders.series.recurrent import Recurrent, RecurrentConfig
from vl_jax.encoders.series.steps import grouped, pooled
from vl_jax.encoders.series.tcn import TCNConfig
from vl_jax.encoders.sound.features import cepstrum, decibels, num_frames, shares
from vl_jax.encoders.sound.spectrogram import SpectrogramConfig, over_frames

ROWS = 3
AUDIO = AudioConfig(8000, window_ms=25, hop_ms=10, num_bands=16, max_seconds=0.16)
SMALL = RecurrentConfig(6, num_layers=2)
ENCODERS = {
    "lstm": LSTMConfig(channels=2, max_length=24, patch=2, recurrent=SMALL),
    "lstm_both": LSTMConfig(
        channels=2, max_length=24, recurrent=RecurrentConfig(6, bidirectional=True), pooling="mean"
    ),
    "tcn": TCNConfig(channels=2, max_length=24, patch=2, embed_dim=6, num_levels=3),
    "tcn_mean": TCNConfig(channels=2, max_length=24, embed_dim=6, num_levels=2, kernel=2, pooling="mean"),
    "levels": SpectrogramConfig(AUDIO, recurrent=SMALL, pooling="last"),
    "cepstra": SpectrogramConfig(AUDIO, coefficients=5, recurrent=RecurrentConfig(6, bidirectional=True)),
    "of_sounds": SpectrogramConfig(AUDIO, coefficients=5, norm="sound", recurrent=RecurrentConfig(6)),
}
STREAMING = ("lstm", "tcn", "tcn_mean", "levels")


@functools.cache
def built(name: str):
    """The module and parameters that are not symmetric."""
    config = ENCODERS[name]
    module = config.build(jnp.float32)
    valid = jnp.ones((1, config.input_shape[0]), bool)
    variables = nn.unbox(module.init(jax.random.key(0), inputs(config, 1), valid))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return module, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), variables)


def inputs(config, rows: int = ROWS) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(2), (rows, *config.input_shape))


def encode(name: str, x, valid):
    module, variables = built(name)
    return jax.jit(module.apply)(variables, x, valid)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_changes_nothing(name):
    """A row that is followed by something that is not there is the row alone."""
    config = ENCODERS[name]
    x, most = inputs(config), config.input_shape[0]
    hop = config.chunk
    lengths = np.array([most, max(hop * ((most // 2) // hop), hop), 0])
    valid = np.arange(most) < lengths[:, None]
    found = encode(name, x, valid)
    assert found.tokens.shape == (ROWS, config.num_tokens, config.output_dim)
    assert found.pooled.shape == (ROWS, config.output_dim) and found.mask.shape == found.tokens.shape[:2]
    short = int(lengths[1])
    alone = encode(name, x[1:2, :short], np.ones((1, short), bool))
    count = int(found.mask[1].sum())
    assert count == alone.tokens.shape[1] == -(-short // hop) and alone.mask.all()
    np.testing.assert_allclose(found.tokens[1, :count], alone.tokens[0], atol=1e-6)
    np.testing.assert_allclose(found.pooled[1], alone.pooled[0], atol=1e-6)
    assert not found.tokens[1, count:].any() and not found.pooled[2].any() and not found.mask[2].any()
    # Whatever stands in places that are not there, even what is no number.
    odd = encode(name, jnp.where(jnp.asarray(valid)[(...,) + (None,) * (x.ndim - 2)], x, jnp.nan), valid)
    np.testing.assert_allclose(odd.tokens, found.tokens, atol=1e-6)


def gradient_is_finite(name: str) -> bool:
    module, variables = built(name)
    config = ENCODERS[name]
    valid = jnp.arange(config.input_shape[0]) < jnp.array([[config.chunk], [0]])
    x = inputs(config, 2)

    def loss(variables, x):
        return jnp.sum(jnp.square(module.apply(variables, x, valid).pooled))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x)
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "tcn", "cepstra", "of_sounds"])
def test_gradients_are_finite_where_rows_are_absent(name):
    assert gradient_is_finite(name)


@pytest.mark.slow
def test_lstm_is_that_of_flax_over_rows_of_other_lengths():
    config = RecurrentConfig(5)
    module, x = Recurrent(config), jax.random.normal(jax.random.key(0), (ROWS, 7, 4))
    lengths = jnp.array([7, 3, 1])
    valid = jnp.arange(7) < lengths[:, None]
    variables = nn.unbox(module.init(jax.random.key(1), x, valid))
    tokens, last, (carry,) = module.apply(variables, x, valid)
    theirs = nn.RNN(nn.OptimizedLSTMCell(5), return_carry=True)
    cell = {"params": {"cell": variables["params"]["layer0"]["cell"]}}
    expected, hidden = theirs.apply(cell, x, seq_lengths=lengths)
    np.testing.assert_allclose(tokens, jnp.where(valid[..., None], hidden, 0), atol=1e-6)
    for mine, other in zip(carry, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    np.testing.assert_allclose(last, expected[1], atol=1e-6)


@pytest.mark.slow
def test_tcn_follows_from_its_past_alone():
    """By gradient: a token sees itself and the ``sees`` - 1 before it, and nothing that comes."""
    config = TCNConfig(channels=1, max_length=24, embed_dim=8, num_levels=2)
    module, x = config.build(jnp.float32), jax.random.normal(jax.random.key(0), (1, 24, 1))
    valid = jnp.ones((1, 24), bool)
    variables = nn.unbox(module.init(jax.random.key(1), x, valid))

    def said(x, place):
        return jnp.sum(module.apply(variables, x, valid).tokens[0, place] ** 2)

    seen = jax.vmap(lambda place: jax.grad(said)(x, place)[0, :, 0] != 0)(jnp.arange(24))
    assert config.sees == 13
    places = np.arange(24)
    allowed = (places <= places[:, None]) & (places > places[:, None] - config.sees)
    assert not np.asarray(seen)[~allowed].any()
    assert np.asarray(seen)[23][24 - 13] and np.asarray(seen)[23][23]  # as far as it may, it does


def test_causal_convolution_is_that_of_scipy():
    config = TCNConfig(channels=1, max_length=12, embed_dim=1, num_levels=1)
    module, x = config.build(jnp.float32), jnp.arange(12.0)[None, :, None]
    valid = jnp.ones((1, 12), bool)
    variables = nn.unbox(module.init(jax.random.key(0), x, valid))
    first, second = (
        {name: np.ravel(value) for name, value in variables["params"]["block0"][f"conv{i}"].items()}
        for i in range(2)
    )

    def convolved(signal, conv):
        kernel = conv["gain"] * conv["direction"] / np.linalg.norm(conv["direction"])
        return np.maximum(scipy.signal.lfilter(kernel[::-1], 1, signal) + conv["bias"], 0)

    expected = np.maximum(np.arange(12) + convolved(convolved(np.arange(12.0), first), second), 0)
    np.testing.assert_allclose(module.apply(variables, x, valid).tokens[0, :, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("config", [AUDIO, AudioConfig(16_000, num_bands=40), AudioConfig(22_050, 20, 7)])
def test_levels_and_cepstra_are_those_of_numpy_and_scipy(config):
    wave = np.random.default_rng(0).normal(size=(2, 3000)).astype(np.float32) * 0.1
    wave[1] = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3000) / config.sample_rate)
    found = np.asarray(jax.jit(functools.partial(decibels, config=config))(wave))
    expected = np.stack([audio.log_mel(row, config).T for row in wave])
    assert found.shape == expected.shape == (2, num_frames(3000, config), config.num_bands)
    loud = expected > -60
    np.testing.assert_allclose(found[loud], expected[loud], atol=2e-3)
    levels = np.asarray(shares(jnp.asarray(expected), config))
    np.testing.assert_allclose(levels, (1 - expected / config.floor_db).clip(0, 1), atol=1e-6)
    coefficients = scipy.fft.dct(levels, type=2, norm="ortho", axis=-1)[..., :12]
    np.testing.assert_allclose(cepstrum(jnp.asarray(levels), 12), coefficients, atol=1e-5)


def test_a_louder_sound_is_as_many_decibels_louder_in_every_band():
    wave = np.random.default_rng(0).normal(size=(1, 2000)).astype(np.float32)
    levels = decibels(jnp.asarray(wave), AUDIO)
    np.testing.assert_allclose(decibels(jnp.asarray(10 * wave), AUDIO) - levels, 20, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMING)
def test_chunks_say_what_the_whole_says(name):
    config, (module, variables) = ENCODERS[name], built(name)
    x = inputs(config, 2)
    length = x.shape[1]
    valid = np.ones((2, length), bool)
    whole = encode(name, x, valid)
    size = config.chunk * {"levels": 3}.get(name, 2)
    rest = jnp.zeros((2, -length % size + -(-config.delay // size) * size, *x.shape[2:]))
    padded = jnp.concatenate([x, rest], axis=1)
    there = jnp.arange(padded.shape[1]) < length
    step = jax.jit(functools.partial(module.apply, method="stream"))
    state, tokens, masks, vector = config.begin(2), [], [], None
    for start in range(0, padded.shape[1], size):
        chunk = slice(start, start + size)
        said, state = step(variables, padded[:, chunk], state, jnp.broadcast_to(there[chunk], (2, size)))
        tokens.append(said.tokens)
        masks.append(said.mask)
        vector = said.pooled
    mask = np.concatenate(masks, axis=1)
    first = config.delay // config.chunk
    assert mask[0].tolist() == mask[1].tolist() and mask[0].sum() == config.num_tokens
    assert not mask[:, :first].any() and mask[:, first : first + config.num_tokens].all()
    joined = np.concatenate(tokens, axis=1)[:, first : first + config.num_tokens]
    np.testing.assert_allclose(joined, whole.tokens, atol=1e-5)
    if name == "lstm":
        np.testing.assert_allclose(vector, whole.pooled, atol=1e-5)


def test_what_reads_from_the_end_does_not_stream():
    with pytest.raises(ValueError, match="bidirectional=True reads from the end"):
        ENCODERS["lstm_both"].begin(1)
    with pytest.raises(ValueError, match="reads to the end first"):
        ENCODERS["of_sounds"].begin(1)


def test_over_a_whole_sound_a_column_has_mean_0_and_all_have_spread_1():
    x = np.random.default_rng(0).normal(3, 2, size=(2, 9, 4)).astype(np.float32)
    there = np.array([[True] * 9, [True] * 5 + [False] * 4])
    found = np.asarray(over_frames(jnp.asarray(x), jnp.asarray(there)))
    centered = x[1, :5] - x[1, :5].mean(0)
    np.testing.assert_allclose(found[1, :5], centered / centered.std(), atol=1e-5)
    assert not found[1, 5:].any()
    # So it makes no difference how loud all is, and what a microphone adds to the level of each band.
    other = 3 * jnp.asarray(x) + jnp.arange(4.0)
    np.testing.assert_allclose(over_frames(other, jnp.asarray(there)), found, atol=1e-5)


def test_steps_together_and_one_vector_for_them():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    valid = jnp.array([[True, True, True, False, False, False]])
    together, there = grouped(x, valid, 2)
    assert together.tolist() == [[[0, 1, 2, 3], [4, 5, 0, 0], [0, 0, 0, 0]]]
    assert there.tolist() == [[True, True, False]]
    assert pooled(together, there, "last").tolist() == [[4, 5, 0, 0]]
    assert pooled(together, there, "mean").tolist() == [[2, 3, 1, 1.5]]
    assert not pooled(together, jnp.zeros_like(there), "last").any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LSTMConfig(max_length=10, patch=3), "max_length=10 of LSTMConfig: must be a multiple"),
        (lambda: TCNConfig(kernel=0), "kernel=0 of TCNConfig: must be at least 1"),
        (lambda: RecurrentConfig(0), "hidden_dim=0"),
        (lambda: SpectrogramConfig(AUDIO, coefficients=17), "coefficients=17 .* must lie in 0..num_bands=16"),
        (lambda: SpectrogramConfig(AudioConfig(max_seconds=0)), "no sample is that short"),
    ],
)
def test_configs_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()
