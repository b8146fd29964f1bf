"""The whole model: who may see whom, and that layout, padding, packing and caching change no number."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax.batch import TEXT, VISION, Batch
from vl_jax.layout import init_params
from vl_jax.model import VisionLanguage
from vl_jax.moe import routing

# Two programs for the same numbers add in different orders. Activations are of order 1 and float32 keeps
# 1e-7; some tens of sums in a row lose two digits of it.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
T = 24
PER_TOKEN = ("tokens", "targets", "loss_weights", "positions", "branch_ids", "visual_slot")  # of an Example

dropless = pytest.mark.parametrize("scheme", tiny.DROPLESS)
each_once = pytest.mark.parametrize(("scheme", "fusion"), [("loss_free", "prefix"), ("top_k", "gated")])
unlike_schemes = pytest.mark.parametrize("scheme", ["loss_free", "capacity", "expert_choice"])


def rows_of(fusion: str, count: int = 3) -> list:
    return [tiny.example(i, fusion=fusion, text=4 + 2 * i) for i in range(count)]


def assert_close(a, b):
    np.testing.assert_allclose(a, b, **TOLERANCE)


@functools.partial(jax.jit, static_argnums=0)
def _influence(model, params: Any, state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    network = VisionLanguage(model)
    vision, _ = network.apply({"params": params}, batch, method="see")
    probe = jax.random.normal(jax.random.key(3), (model.language.embed_dim,))

    def probed(table: jax.Array, vision: jax.Array) -> jax.Array:
        moved = {**params, "language": {**params["language"], "embedding": table}}
        return network.apply({"params": moved}, batch, state, seen=vision).hidden[0] @ probe

    # One position after another: a batch of pullbacks would take far longer to compile.
    _, pullback = jax.vjp(probed, params["language"]["embedding"], vision)
    by_table, by_vision = jax.lax.map(pullback, jnp.eye(T))
    return jnp.abs(by_table[:, batch.tokens[0]]).sum(-1), jnp.abs(by_vision[:, 0]).sum(-1)


@pytest.mark.parametrize(
    ("scheme", "fusion"),
    [
        ("loss_free", "prefix"),
        pytest.param("top_k", "gated", marks=pytest.mark.slow),
        pytest.param("capacity", "prefix", marks=pytest.mark.slow),
    ],
)
def test_a_position_has_gradient_from_exactly_the_tokens_it_may_see(scheme, fusion):
    model = tiny.config(scheme, fusion=fusion)
    first = tiny.example(1, fusion=fusion, text=4, branches=(2, 2))
    row = [first, tiny.example(2, fusion=fusion, text=3)]
    batch = tiny.batch([row], fusion=fusion)
    # Every position its own id, so that a row of the embedding table stands for one position.
    batch = batch.replace(tokens=np.tile(np.arange(T, dtype=np.int32) + 8, (4, 1)))
    tokens, vision = _influence(model, *tiny.build(model), jax.tree.map(jnp.asarray, batch))

    segment, branch, start = batch.segment_ids[0], batch.branch_ids[0], batch.visual_start[0]
    earlier = np.tri(T, dtype=bool)
    together = (segment[:, None] == segment) & (segment > 0)
    sees = earlier & together & ((branch == 0) | (branch[:, None] == branch))
    embedded = batch.visual_slot[0] < 0  # where a picture stands, the table is not read
    valid = segment > 0
    np.testing.assert_array_equal(np.asarray(tokens)[valid] > 0, (sees & embedded)[valid])
    of_segment = segment[:, None] == batch.visual_segment_ids[0]
    appeared = of_segment & (start <= np.arange(T)[:, None])
    np.testing.assert_array_equal(np.asarray(vision)[valid] > 0, appeared[valid])


@unlike_schemes
def test_later_tokens_change_earlier_logits_only_if_the_scheme_says_so(scheme):
    model = tiny.config(scheme)
    batch = tiny.batch([[tiny.example(7, text=18)]])
    changed = batch.tokens.copy()
    changed[:, 14:] = (changed[:, 14:] + 11) % tiny.VOCAB
    before, after = (tiny.logits(model, b) for b in (batch, batch.replace(tokens=changed)))
    same = np.allclose(before[:, :14], after[:, :14], **TOLERANCE)
    assert same == routing.is_causal(model.moe)
    assert not np.allclose(before[:, 14:], after[:, 14:], **TOLERANCE)


@pytest.mark.parametrize(
    ("scheme", "fusion"),
    [
        ("top_k", "gated"),
        ("loss_free", "prefix"),
        pytest.param("capacity", "prefix", marks=pytest.mark.slow),
        pytest.param("expert_choice", "prefix", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_padding_does_not_change_logits_or_statistics(scheme, fusion):
    model = tiny.config(scheme, fusion=fusion)
    rows = [[e] for e in rows_of(fusion)]
    plain, wide, left = (
        tiny.batch(rows, fusion=fusion, length=length, left=left)
        for length, left in ((16, False), (T, False), (T, True))
    )
    expected, routed = tiny.forward(model, plain)
    for batch in (wide, left):
        actual, again = tiny.forward(model, batch)
        for row in range(len(rows)):
            assert_close(actual[row][batch.segment_ids[row] > 0], expected[row][plain.segment_ids[row] > 0])
        jax.tree.map(assert_close, again.stats, routed.stats)
        jax.tree.map(assert_close, again.losses, routed.losses)


@each_once
def test_the_order_of_tiles_does_not_change_logits(scheme, fusion):
    model = tiny.config(scheme, fusion=fusion)
    e = tiny.example(3, fusion=fusion, tiles=2)
    n = tiny.TILE_TOKENS_SIDE**2
    swapped = np.where(e.visual_index < 2 * n, (e.visual_index + n) % (2 * n), e.visual_index).astype(
        np.int32
    )
    other = dataclasses.replace(e, tiles=e.tiles[::-1], visual_index=swapped)
    assert_close(
        tiny.logits(model, tiny.batch([[other]], fusion=fusion)),
        tiny.logits(model, tiny.batch([[e]], fusion=fusion)),
    )


@each_once
def test_the_content_of_a_tile_does_change_logits(scheme, fusion):
    model = tiny.config(scheme, fusion=fusion)
    batch = tiny.batch([[tiny.example(3, fusion=fusion, tiles=2)]], fusion=fusion)
    changed = tiny.logits(model, batch.replace(tiles=255 - batch.tiles))
    assert np.abs(changed - tiny.logits(model, batch)).max() > 0.01


@unlike_schemes
def test_the_place_in_the_batch_does_not_change_logits(scheme):
    model = tiny.config(scheme)
    batch = tiny.batch([[e] for e in rows_of("prefix")])
    order = np.array([2, 3, 0, 1])
    assert_close(
        tiny.logits(model, jax.tree.map(lambda x: x[order], batch)), tiny.logits(model, batch)[order]
    )


@each_once
def test_a_branch_equals_the_row_with_that_question_alone(scheme, fusion):
    model = tiny.config(scheme, fusion=fusion)
    whole = tiny.example(4, fusion=fusion, text=3, branches=(4, 5))
    trunk = whole.branch_ids == 0
    batch = tiny.batch([[whole]], fusion=fusion)
    logits = tiny.logits(model, batch)[0][: len(whole.tokens)]
    for branch in (1, 2):
        keep = trunk | (whole.branch_ids == branch)
        fields = {k: getattr(whole, k)[keep] for k in PER_TOKEN}
        alone = tiny.batch([[dataclasses.replace(whole, **fields)]], fusion=fusion)
        assert_close(logits[keep], tiny.logits(model, alone)[0][: keep.sum()])


@each_once
def test_packed_samples_equal_separate_rows(scheme, fusion):
    model = tiny.config(scheme, fusion=fusion)
    first = tiny.example(5, fusion=fusion, text=5)
    second = tiny.example(6, fusion=fusion, text=6)
    packed = tiny.logits(model, tiny.batch([[first, second]], fusion=fusion))[0]
    separate = tiny.logits(model, tiny.batch([[first], [second]], fusion=fusion))
    cut, end = len(first.tokens), len(first.tokens) + len(second.tokens)
    assert_close(packed[:cut], separate[0][:cut])
    assert_close(packed[cut:end], separate[1][: end - cut])


@functools.partial(jax.jit, static_argnums=0)
def _append(
    model, params: Any, state: Any, batch: Batch, vision: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
    network = VisionLanguage(model)
    output = network.apply({"params": params}, batch, state, seen=vision, cache=cache)
    return network.apply({"params": params}, output.hidden, method="logits"), output.cache


@each_once
def test_cached_decoding_equals_the_full_forward_pass(scheme, fusion):
    model = tiny.config(scheme, fusion=fusion)
    params, state = tiny.build(model)
    rows = [[tiny.example(8, fusion=fusion, text=10)], [tiny.example(9, fusion=fusion, text=12)]]
    batch = jax.tree.map(jnp.asarray, tiny.batch(rows, fusion=fusion, left=True))
    see = jax.jit(functools.partial(VisionLanguage(model).apply, method="see"))
    vision, _ = see({"params": params}, batch)
    cache = model.init_cache(batch=4, slots=T + 3)  # more slots than tokens: the rest must stay unseen
    pieces = []
    # Prefill of ten tokens (it cuts through the picture of the prefix model), then one at a time.
    for begin, end in [(0, 10), *((i, i + 1) for i in range(10, T))]:
        part = batch.replace(**{k: getattr(batch, k)[:, begin:end] for k in tiny.SEQUENCE_FIELDS})
        logits, cache = _append(model, params, state, part, vision, cache)
        pieces.append(logits)
    valid = np.asarray(batch.segment_ids) > 0
    assert_close(np.concatenate(pieces, axis=1)[valid], tiny.logits(model, batch)[valid])


@pytest.fixture(scope="module")
def gated():
    """The gated model, parameters with the gates closed as at initialisation, and a batch with pictures."""
    model = tiny.config("top_k", fusion="gated")
    params = params_lib.map_paths(
        lambda path, x: jnp.zeros_like(x) if path.endswith("gate/opening") else x, tiny.build(model)[0]
    )
    return model, params, tiny.varied_batch(4, fusion="gated")


def test_gates_are_closed_at_initialisation():
    layout = tiny.layout_of(tiny.config(fusion="gated"))
    params = init_params(layout, tiny.varied_batch(4, fusion="gated"), seed=3)
    openings = [x for path, x in params_lib.flatten(params).items() if path.endswith("gate/opening")]
    assert len(openings) == 2 and not any(x.any() for x in openings)


@pytest.mark.slow
def test_a_closed_gate_equals_the_text_model_exactly(gated):
    model, params, batch = gated
    flat = params_lib.flatten(params)
    text_params = params_lib.unflatten({p: x for p, x in flat.items() if "/gate/" not in p})
    text_model = dataclasses.replace(model, fusion=dataclasses.replace(model.fusion, kind="prefix"))
    text = tiny.logits(text_model, batch, params=text_params)
    np.testing.assert_array_equal(tiny.logits(model, batch, params=params), text)


def test_a_closed_gate_makes_the_picture_irrelevant_and_an_open_one_does_not(gated):
    model, params, batch = gated
    other = batch.replace(tiles=255 - batch.tiles)

    def opened(path: str, leaf: jax.Array) -> jax.Array:
        return jnp.full_like(leaf, 0.5) if path.endswith("gate/opening") else leaf

    closed = [tiny.logits(model, b, params=params) for b in (batch, other)]
    np.testing.assert_array_equal(*closed)
    looking = [tiny.logits(model, b, params=params_lib.map_paths(opened, params)) for b in (batch, other)]
    assert np.abs(looking[0] - looking[1]).max() > 1e-3
    assert np.abs(looking[0] - closed[0]).max() > 1e-3


@dropless
def test_load_is_counted_once_per_choice_and_by_modality(scheme):
    model = tiny.config(scheme)
    batch = tiny.varied_batch(4)
    stats = tiny.forward(model, batch)[1].stats
    valid, modality = batch.segment_ids > 0, np.asarray(batch.modality)
    expected = [int((valid & (modality == m)).sum()) for m in (TEXT, VISION)]
    layers = len(model.language.sparse_layers)
    np.testing.assert_array_equal(stats.tokens, [expected] * layers)
    np.testing.assert_array_equal(stats.load.sum(-1), 2 * np.array([expected] * layers))
    np.testing.assert_allclose(stats.importance.sum(-1), [expected] * layers, rtol=1e-5)
