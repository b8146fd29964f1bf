"""Writing: texts as bytes, what is scored behind which bytes, and what is written without any."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.batch import Given
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Stream
from vl_jax.heads.text.writing import NextBytes, Writing

HEAD = Writing(max_length=6, dim=8, num_layers=2, num_heads=2)
ROWS, T = 3, 4


def streams():
    mask = jnp.arange(T)[None] < jnp.array([4, 2, 3])[:, None]
    return {"image": Stream(jax.random.normal(jax.random.key(0), (ROWS, T, 6)), mask)}


def made():
    """A module whose parameters all say something."""
    module = HEAD.build()
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(1), streams()))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return module, jax.tree.unflatten(tree, leaves)


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=8))
def test_a_text_comes_back_from_its_bytes_in_any_language(text):
    head = dataclasses.replace(HEAD, max_length=40)
    label = head.read(Sample("a", (), labels={"words": text}))
    assert label is not None and head.text_of(label) == text
    assert label[len(text.encode())] == 256 and (label[len(text.encode()) + 1 :] == -1).all()


def test_what_is_no_text_is_said_in_one_line():
    assert HEAD.read(Sample("a", ())) is None
    with pytest.raises(BadSample, match="words=3 is no text"):
        HEAD.read(Sample("a", (), labels={"words": 3}))
    with pytest.raises(BadSample, match="has 6 bytes; head 'words' has max_length=6, its end included"):
        HEAD.read(Sample("a", (), labels={"words": "时钟"}))
    with pytest.raises(ValueError, match="dim=9 of head 'words' is not a multiple of num_heads=2"):
        dataclasses.replace(HEAD, dim=9)
    with pytest.raises(ValueError, match="max_length=0"):
        dataclasses.replace(HEAD, max_length=0)
    assert HEAD.text_of(np.array([0xE6, 97, -1])) == "\ufffda"


def test_the_loss_by_hand():
    label = np.full((2, 6), -1, np.int32)
    label[0, :3], label[1, :2] = (97, 98, 256), (97, 256)
    scores = np.zeros((2, 6, 257), np.float32)
    scores[0, (0, 1, 2), (97, 98, 256)] = 20.0
    loss, found = HEAD.sums(NextBytes(jnp.asarray(scores)), Given(label, np.array([True, True])))
    # The first row is sure of every byte, the second of none; what is behind the end does not count.
    np.testing.assert_allclose(loss, np.log(257), rtol=1e-4)
    assert found["exact"] == 1
    loss, found = HEAD.sums(NextBytes(jnp.asarray(scores)), Given(label, np.array([True, False])))
    assert float(loss) < 1e-4 and found["exact"] == 1
    with pytest.raises(ValueError, match="learns behind true bytes: train it by Heads or Denoising"):
        HEAD.sums(jnp.zeros((2, 6), jnp.int32), Given(label, np.array([True, True])))


@pytest.mark.slow
def test_a_byte_is_scored_by_those_before_it_alone_and_rows_by_themselves():
    module, variables = made()
    texts = np.random.default_rng(0).integers(0, 257, (ROWS, 6)).astype(np.int32)
    said = jax.jit(lambda streams, texts: module.apply(variables, streams, texts).scores)
    texts = jnp.asarray(texts)
    scores = said(streams(), texts)
    assert scores.shape == (ROWS, 6, 257)
    for place in range(6):
        other = jnp.where(jnp.arange(6) < place, texts, (texts + 5) % 257)
        found = said(streams(), other)
        np.testing.assert_allclose(found[:, : place + 1], scores[:, : place + 1], atol=1e-5)
        assert place == 5 or not np.allclose(found[:, place + 1], scores[:, place + 1])
    stream, order = streams()["image"], np.array([2, 0, 1])
    hidden = jnp.where(stream.mask[..., None], stream.tokens, 7.0)  # padding says nothing
    mixed = said({"image": Stream(hidden[order], stream.mask[order])}, texts[order])
    np.testing.assert_allclose(mixed, scores[order], atol=1e-5)


@pytest.mark.slow
def test_what_is_written_is_the_likeliest_behind_itself():
    module, variables = made()
    # An end now and then, so that some rows end early.
    bias = variables["params"]["next"]["bias"]
    variables["params"]["next"]["bias"] = bias.at[256].add(1.0)
    written = jax.jit(module.apply)(variables, streams())
    said = jax.jit(module.apply)(variables, streams(), written)
    for row, best in zip(np.asarray(written), np.argmax(said.scores, axis=-1), strict=True):
        ends = [*np.flatnonzero(row == 256), 5][0]
        np.testing.assert_array_equal(row[: ends + 1], best[: ends + 1])
        assert (row[ends + 1 :] == -1).all()
    label = Given(written, jnp.ones(ROWS, bool))
    assert HEAD.sums(said, label)[1]["exact"] == ROWS
