"""Inputs beside text and pictures on their way into a batch: lengths, starts, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.batch import Given
from vl_jax.data.collate import RowSizes, collate
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.augment import AugmentationConfig, augment
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.media.inputs import MediaInput, StartedAt
from vl_jax.data.sample import TEXT, BadSample, Sample, Turn
from vl_jax.encoders.transformer import Encoded
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower

L, C = 6, 2


def sample(length: int | None, dtype=np.float32) -> Sample:
    media = {}
    if length is not None:
        media["x"] = lambda: np.arange(length * C, dtype=dtype).reshape(length, C)
    return Sample(f"of {length}", (Turn("", "a", kind=TEXT),), media=media)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.floats(0, 1), st.booleans())
def test_what_is_read_is_a_stretch_of_the_input_as_long_as_there_is_room(length, share, varies):
    field = MediaInput("x", (L, C), varies=varies)
    whole = sample(length)
    placed = dataclasses.replace(whole, media={"x": StartedAt(whole.media["x"], share)})
    first, moved = field.read(whole), field.read(placed)
    assert first is not None and moved is not None
    values, steps = whole.media["x"](), min(length, L)
    assert len(first) == len(moved) == (steps if varies else L)
    np.testing.assert_array_equal(first[:steps], values[:steps])
    start = int(moved[0, 0]) // C
    assert abs(start - share * max(length - L, 0)) <= 0.5
    np.testing.assert_array_equal(moved[:steps], values[start : start + steps])
    assert not first[steps:].any() and not moved[steps:].any()


def test_grey_levels_become_shares_where_floats_are_read():
    found = MediaInput("x", (3, C)).read(sample(3, np.uint8))
    levels = MediaInput("x", (3, C), dtype="uint8").read(sample(3, np.uint8))
    assert found is not None and levels is not None and levels.dtype == np.uint8
    np.testing.assert_allclose(found, levels / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 5)), "bad_media"),
        (np.zeros(3), "bad_media"),
        (np.zeros((0, C)), "bad_media"),
        (np.array([[0.0, np.nan]]), "not_finite"),
        (np.array([[0.0, np.inf]]), "not_finite"),
    ],
)
def test_what_cannot_be_read_says_why_in_one_line(array, reason):
    broken = dataclasses.replace(sample(None), media={"x": lambda: array})
    with pytest.raises(BadSample, match="sample of None: x ") as caught:
        MediaInput("x", (L, C)).read(broken)
    assert caught.value.reason == reason and "\n" not in str(caught.value)


def test_an_absent_input_is_none():
    assert MediaInput("x", (L, C)).read(sample(None)) is None


def test_random_starts_are_drawn_once_for_all_inputs_of_a_sample():
    config = AugmentationConfig(random_start=True)
    both = dataclasses.replace(sample(9), media=dict.fromkeys("xy", lambda: np.zeros((9, C))))
    drawn = [augment(both, config, np.random.default_rng(i), length=len) for i in range(20)]
    shares = []
    for draw in drawn:
        x, y = draw.media["x"], draw.media["y"]
        assert isinstance(x, StartedAt) and isinstance(y, StartedAt) and x.share == y.share
        shares.append(x.share)
    assert min(shares) < 0.3 and max(shares) > 0.7
    assert augment(both, AugmentationConfig(), np.random.default_rng(0), length=len) is both


def test_steps_stand_beside_what_varies_and_only_there():
    fields = (MediaInput("x", (L, C), varies=True),)
    spec = ModelSpec(tile_tokens_side=1, fusion="gated", vocab_size=1 << 20, reads="text", media=fields)
    encoder = make_encoder(DataConfig(max_tokens=4, tiling=TilingConfig(tile_size=8)), spec)
    examples = [encoder.example(sample(length)) for length in (2, None, 9)]
    batch = encoder.collate([[example] for example in examples])
    x = batch.media["x"]
    assert x.steps.tolist() == [2, 0, L] and x.present.tolist() == [True, False, True]
    assert x.values.shape == (3, L, C) and not x.values[0, 2:].any() and not x.values[1].any()
    sizes = RowSizes(4, 1, 8, 1, 1, 4, media=(dataclasses.replace(fields[0], varies=False),))
    still = [encoder.example(sample(9)), encoder.example(sample(9))]
    assert collate([[e] for e in still], sizes, padding_id=0).media["x"].steps is None


@dataclasses.dataclass(frozen=True)
class SummingConfig:
    """An encoder whose tokens are its steps, doubled."""

    length: int = L
    output_dim: int = C
    stack: None = None
    varies: bool = True
    grid: int = 1

    @property
    def num_tokens(self):
        return self.length

    @property
    def input_shape(self):
        return (self.length, C)

    def build(self, dtype, *, remat=False):
        return Summing()


class Summing(nn.Module):
    """Says which steps it was told are there."""

    @nn.compact
    def __call__(self, inputs, valid, routing_state):
        scale = self.param("scale", nn.initializers.ones, ())
        tokens = scale * 2 * inputs
        return Encoded(tokens, None, mask=valid if valid.ndim == 2 else None)


@pytest.mark.parametrize("varies", [True, False])
def test_a_tower_is_told_which_steps_are_there(varies):
    config = JointConfig(
        (Tower("x", SummingConfig(varies=varies), "x"),), (Classification(("a", "b"), stream="x"),)
    )
    batch = config.smallest_batch(3)
    assert (batch.media["x"].steps is not None) == varies
    values = np.random.default_rng(0).normal(size=(3, L, C)).astype(np.float32)
    steps = np.array([2, 6, 4], np.int32)
    found = Given(values, np.array([True, True, False]), steps if varies else None)
    batch = dataclasses.replace(batch, media={"x": found})
    model = config.build()
    variables = model.init(jax.random.key(0), batch, {}, method="initialize")
    stream = jax.jit(functools.partial(model.apply, variables))(batch, {}).streams["x"]
    expected = [[1, 1, 0, 0, 0, 0], [1] * 6, [0] * 6] if varies else [[1] * 6, [1] * 6, [0] * 6]
    np.testing.assert_array_equal(stream.mask, np.array(expected, bool))
    np.testing.assert_allclose(stream.tokens, 2 * jnp.asarray(values))
