"""What every fusion must hold: a modality that is absent is as one that the model does not have."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.fusion.co_attention import CoAttention
from vl_jax.fusion.cross_attention import CrossAttention
from vl_jax.fusion.fusion_transformer import FusionTransformer
from vl_jax.fusion.graph import Graph, pass_messages
from vl_jax.fusion.layers import LayersConfig
from vl_jax.fusion.mixing import DROPOUT, Mixing, hide, mixing_weights
from vl_jax.fusion.progressive import Progressive
from vl_jax.fusion.spatio_temporal import DividedBlock, SpatioTemporal
from vl_jax.fusion.streams import Stream, Streams
from vl_jax.sharding import MeshConfig, make_mesh

ROWS = 8
WIDTHS = {"image": 12, "text": 16, "sound": 8}
LENGTHS = {"image": 4, "text": 5, "sound": 3}
LAYERS = LayersConfig(dim=8, mlp_dim=16, num_layers=2, num_heads=2)
CASES: dict[str, Any] = {
    "mixing": Mixing(dim=8),
    "transformer": FusionTransformer(LAYERS),
    "progressive": Progressive(LAYERS),
    "co_attention": CoAttention(layers=LAYERS),
    "graph": Graph(LAYERS),
    "cross_attention": CrossAttention(dim=8, num_heads=2),
    "spatio_temporal": SpatioTemporal("image", frames=2, layers=LAYERS),
}
# Those in which it makes no difference in which order the towers stand, and those of two towers.
SYMMETRIC = ("mixing", "transformer", "progressive", "graph", "spatio_temporal")
OF_TWO = ("co_attention", "cross_attention")


def close(found: Any, expected: Any, *, rtol: float = 1e-6, err_msg: str = "") -> None:
    """The same to 1e-6 of the largest value, or of 1."""
    largest = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * largest, err_msg=err_msg)


@functools.cache
def drawn() -> dict[str, Stream]:
    """A stream of every tower; some tokens are padding, and text has a vector of its own."""
    random, streams = np.random.default_rng(0), {}
    for name, width in WIDTHS.items():
        mask = random.random((ROWS, LENGTHS[name])) < 0.7
        mask[:, 0] = True
        tokens = random.standard_normal((ROWS, LENGTHS[name], width)).astype(np.float32)
        streams[name] = Stream(jnp.asarray(tokens), jnp.asarray(mask))
    pooled = random.standard_normal((ROWS, 6)).astype(np.float32)
    return streams | {"text": dataclasses.replace(streams["text"], pooled=jnp.asarray(pooled))}


def only(*names: str) -> dict[str, Stream]:
    return {name: drawn()[name] for name in names}


def lacking(name: str, rows: Any, streams: Streams) -> dict[str, Stream]:
    """The streams, of which some rows have nothing in one: what stands there is no number."""
    stream = streams[name]
    gone = jnp.zeros(ROWS, bool).at[rows].set(True)
    tokens = jnp.where(gone[:, None, None], 1e4, stream.tokens)
    pooled = None if stream.pooled is None else jnp.where(gone[:, None], 0.0, stream.pooled)
    return {**streams, name: Stream(tokens, stream.mask & ~gone[:, None], pooled)}


def emptied(name: str, streams: Streams) -> dict[str, Stream]:
    """The streams, of which one has no room for tokens: no row of the batch has any."""
    stream = streams[name]
    pooled = None if stream.pooled is None else jnp.zeros_like(stream.pooled)
    return {**streams, name: Stream(stream.tokens[:, :0], stream.mask[:, :0], pooled)}


@functools.cache
def made(case: str) -> tuple[Any, Any]:
    """The module, and parameters of which none is at its initial zero or one."""
    module, random = CASES[case].build(), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda s: module.init(jax.random.key(0), s), drawn())["params"]
    shapes = sharding.nn.meta.unbox(shapes)

    def draw(path: str, leaf: Any) -> jax.Array:
        value = 0.3 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        return jnp.asarray(value)

    return module, params_lib.map_paths(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _fused(case: str, params: Any, streams: Streams) -> dict[str, Stream]:
    found = made(case)[0].apply({"params": params}, streams)
    return {name: stream for name, stream in found.items() if name not in WIDTHS}


def fused(case: str, streams: Streams) -> dict[str, np.ndarray]:
    """What comes of some streams: every vector, and every token that is there, 0 elsewhere."""
    found = jax.device_get(_fused(case, made(case)[1], dict(streams)))
    parts = {}
    for name, stream in found.items():
        parts |= {f"{name}/{row}": stream.tokens[row][stream.mask[row]] for row in range(ROWS)}
        if stream.pooled is not None:
            parts[name] = stream.pooled
    return parts


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rows: Any = None) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        head, _, row = name.partition("/")
        if rows is None:
            close(found[name], expected[name], err_msg=name)
        elif not row:
            close(found[name][rows], expected[name][rows], err_msg=head)
        elif int(row) in rows:
            close(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("case", SYMMETRIC)
def test_the_order_of_towers_makes_no_difference(case):
    whole = jax.device_get(_fused(case, made(case)[1], drawn()))["fused"].pooled
    for names in list(itertools.permutations(WIDTHS))[1::2]:
        found = jax.device_get(_fused(case, made(case)[1], only(*names)))["fused"].pooled
        close(found, whole)


@pytest.mark.parametrize("name", ["image", "text"])
@pytest.mark.parametrize("case", CASES)
def test_a_modality_that_no_row_has_is_as_one_that_the_model_lacks(case, name):
    without = fused(case, only(*(other for other in WIDTHS if other != name)))
    assert_same(fused(case, lacking(name, slice(None), drawn())), without)
    assert_same(fused(case, emptied(name, drawn())), without)


@pytest.mark.parametrize("case", CASES)
def test_a_row_that_lacks_a_modality_is_as_in_a_model_without_it(case):
    rows, others = [1, 4, 6], [0, 2, 3, 5, 7]
    found = fused(case, lacking("image", np.array(rows), drawn()))
    assert_same(found, fused(case, only("text", "sound")), rows)
    assert_same(found, fused(case, drawn()), others)


@pytest.mark.parametrize("case", CASES)
def test_one_modality_alone_is_the_model_of_one_modality(case):
    for name in ("image", "text") if case in OF_TWO else WIDTHS:
        streams = drawn()
        for other in set(WIDTHS) - {name}:
            streams = lacking(other, slice(None), streams)
        assert_same(fused(case, streams), fused(case, only(name)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_numbers_and_those_of_an_absent_modality_are_zero(case):
    streams = lacking("image", slice(None), drawn())

    def total(params: Any, streams: Streams) -> jax.Array:
        found = _fused(case, params, streams)
        return sum(jnp.sum(jnp.where(s.mask[..., None], s.tokens, 0.0) ** 2) for s in found.values())  # type: ignore

    grads, of = jax.jit(jax.grad(total, argnums=(0, 1), allow_int=True))(made(case)[1], streams)
    for path, grad in params_lib.flatten(jax.device_get(grads)).items():
        assert np.isfinite(grad).all(), path
        if "image" in path:
            assert not grad.any(), path
    assert not np.asarray(of["image"].tokens).any() and np.asarray(of["text"].mask).dtype == jax.dtypes.float0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_are_one(case):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2), devices=jax.devices()[:8])
    streams = lacking("sound", np.array([0, 5]), drawn())
    with sharding.use_mesh(mesh):
        placed = jax.device_put(streams, sharding.batch_sharding(mesh))
        found = jax.device_get(jax.jit(functools.partial(_fused, case))(made(case)[1], placed))
    expected = jax.device_get(_fused(case, made(case)[1], streams))
    for name, stream in expected.items():
        np.testing.assert_array_equal(found[name].mask, stream.mask)
        there = stream.mask[..., None]
        close(np.where(there, found[name].tokens, 0), np.where(there, stream.tokens, 0), rtol=1e-5)


def test_weights_are_a_softmax_over_the_modalities_that_are_there():
    scores = jnp.array([[0.0, np.log(3.0), 9.0], [1.0, 2.0, 3.0]])
    found = mixing_weights(scores, jnp.array([[True, True, False], [False, False, False]]))
    close(found, [[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])


def test_hidden_modalities_are_drawn_by_row_and_never_all():
    present = jnp.asarray(np.random.default_rng(0).random((400, 3)) < 0.8)
    content, numbers = jnp.arange(400, dtype=jnp.uint32), jnp.arange(3, dtype=jnp.uint32)
    draw = functools.partial(hide, jax.random.key(0), rate=0.5)
    kept = np.asarray(draw(present, content, numbers))
    assert not (kept & ~np.asarray(present)).any()
    np.testing.assert_array_equal(kept.any(axis=1), np.asarray(present).any(axis=1))
    # Of two that are there, each is hidden in half of the rows, or kept as the last.
    both = kept[np.asarray(present).sum(axis=1) == 2].sum(axis=1)
    assert 0.15 < (both == 2).mean() < 0.35
    order = np.random.default_rng(1).permutation(400)
    np.testing.assert_array_equal(draw(present[order], content[order], numbers), kept[order])
    np.testing.assert_array_equal(draw(present[:, ::-1], content, numbers[::-1]), kept[:, ::-1])
    np.testing.assert_array_equal(draw(present, content, numbers, rate=0.0), present)


def test_a_fusion_that_hides_modalities_does_so_in_training_alone():
    module = dataclasses.replace(CASES["mixing"], dropout=0.5).build()
    content = jnp.arange(ROWS, dtype=jnp.uint32)
    streams = {name: dataclasses.replace(s, content=content) for name, s in drawn().items()}
    given = {"params": made("mixing")[1]}, streams
    still, hidden = module.apply(*given), module.apply(*given, rngs={DROPOUT: jax.random.key(0)})
    assert np.asarray(still["fused"].weights.present).all()
    assert 0 < np.asarray(hidden["fused"].weights.present).mean() < 1
    close(np.asarray(hidden["fused"].weights.values).sum(axis=1), 1.0)


@pytest.mark.slow
def test_the_weight_of_a_modality_falls_with_its_noise():
    """Both say the class; the noise of the picture differs from row to row, that of the text does not."""
    module, classes, rows = Mixing(dim=16, dropout=0.1).build(), 4, 256
    means = jnp.asarray(np.random.default_rng(0).standard_normal((2, classes, 12)), jnp.float32)

    def draw(key: jax.Array) -> tuple[dict[str, Stream], jax.Array, jax.Array]:
        keys, there = jax.random.split(key, 4), jnp.ones((rows, 1), bool)
        label = jax.random.randint(keys[0], (rows,), 0, classes)
        noise = 4 * jax.random.uniform(keys[1], (rows,))
        image = means[0][label] + noise[:, None] * jax.random.normal(keys[2], (rows, 12))
        text = means[1][label] + 1.5 * jax.random.normal(keys[3], (rows, 12))
        content = jax.random.bits(key, (rows,))
        both = {"image": image, "text": text}.items()
        return {name: Stream(x[:, None], there, content=content) for name, x in both}, label, noise

    def loss(params: Any, key: jax.Array) -> jax.Array:
        streams, label, _ = draw(key)
        vector = module.apply({"params": params["mixing"]}, streams, rngs={DROPOUT: key})["fused"].pooled
        return optax.softmax_cross_entropy_with_integer_labels(vector @ params["head"], label).mean()

    @jax.jit
    def weights(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixing = sharding.nn.meta.unbox(module.init(key, draw(key)[0])["params"])
        params, optimizer = {"mixing": mixing, "head": jnp.zeros((16, classes))}, optax.adam(1e-2)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        with jax.numpy_dtype_promotion("standard"):
            (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 400))
        streams, _, noise = draw(jax.random.fold_in(key, 1))
        return module.apply({"params": params["mixing"]}, streams)["fused"].weights.values[:, 0], noise

    found, noise = map(np.asarray, weights(jax.random.key(0)))
    # Beyond twice what the text has, more noise is hardly told from less.
    by_noise = [found[(low <= noise) & (noise < high)].mean() for low, high in ((0, 1), (1, 2), (2, 4))]
    assert all(np.diff(by_noise) < -0.02), by_noise


def test_no_layers_of_their_own_is_the_fusion_transformer():
    module, params = made("transformer")
    shallow = Progressive(LAYERS, shallow=0).build()
    found = jax.jit(shallow.apply)({"params": params}, drawn())["fused"]
    expected = jax.jit(module.apply)({"params": params}, drawn())["fused"]
    np.testing.assert_array_equal(found.pooled, expected.pooled)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def attended(x: np.ndarray, source: np.ndarray, mask: np.ndarray, p: Any) -> np.ndarray:
    """Multi-head attention of one row, in float64, as Vaswani et al. write it."""
    kernel, bias = p["qkv"], p["qkv_bias"]
    query, *rest = (
        np.einsum("SD,DNH->NSH", of, kernel[:, i]) + bias[i][:, None]
        for i, of in enumerate((x, source, source))
    )
    key, value = rest
    scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max()) * mask
    mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
    return np.einsum("NSH,NHD->SD", mixed, p["project"]) + p["project_bias"]


def normed(x: np.ndarray, p: Any, epsilon: float = 1e-6) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def lxmert_layer(sides: dict[str, Any], p: Any) -> dict[str, Any]:
    """The cross-modality layer of one row, by the equations of LXMERT's section 2.2, in float64."""
    found = {}
    for name, other in (("text", "image"), ("image", "text")):
        (x, mask), (source, seen) = sides[name], sides[other]
        x = normed(x + attended(x, source, seen, p["cross"]), p["cross_norm"])
        x = normed(x + attended(x, x, mask, p[f"{name}_attention"]), p[f"{name}_attention_norm"])
        mlp = p[f"{name}_mlp"]
        hidden = x @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
        hidden = 0.5 * hidden * (1 + scipy.special.erf(hidden / np.sqrt(2)))
        x = normed(x + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"], p[f"{name}_mlp_norm"])
        found[name] = x, mask
    return found


def test_co_attention_is_the_cross_modality_layer_of_lxmert():
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), made("co_attention")[1])
    found = jax.device_get(_fused("co_attention", made("co_attention")[1], drawn()))
    for row in range(2):
        sides = {}
        for name in ("text", "image"):
            tokens = np.asarray(drawn()[name].tokens[row], np.float64)
            x = normed(tokens, params[name]["norm"]) @ params[name]["width"]["kernel"]
            sides[name] = x + params[name]["width"]["bias"], np.asarray(drawn()[name].mask[row])
        for number in range(LAYERS.num_layers):
            sides = lxmert_layer(sides, params[f"layer_{number}"])
        for name, (tokens, mask) in sides.items():
            close(found[f"fused_{name}"].tokens[row][mask], tokens[mask], rtol=3e-6)


def test_it_makes_no_difference_which_of_a_pair_is_named_first():
    swapped = dataclasses.replace(CASES["co_attention"], pair=("image", "text")).build()
    found = jax.jit(swapped.apply)({"params": made("co_attention")[1]}, drawn())
    expected = _fused("co_attention", made("co_attention")[1], drawn())
    for name in ("fused_image", "fused_text"):
        close(found[name].tokens, expected[name].tokens)


def test_messages_by_hand():
    """Two nodes of one number; the edge from the other node is worth log 3 more and brings 10."""
    one = jnp.ones((1, 2, 1, 1))
    value = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1)
    other = jnp.array([[0.0, 1.0], [1.0, 0.0]]).reshape(2, 2, 1, 1)
    edges = {"edge_keys": np.log(3.0) * other, "edge_values": 10 * other}
    found = pass_messages(one, one, value, **edges, present=jnp.array([[True, True]]))
    close(found.reshape(2), [0.25 * 1 + 0.75 * 12, 0.75 * 11 + 0.25 * 2])
    alone = pass_messages(one, one, value, **edges, present=jnp.array([[True, False]]))
    close(alone[0, 0], [[1.0]])


def test_one_divided_block_joins_cells_of_a_frame_and_frames_of_a_cell():
    block = DividedBlock(LAYERS)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, 4, 8)), jnp.float32)
    mask = jnp.ones((1, 3, 4), bool)
    params = jax.jit(block.init)(jax.random.key(0), x, mask)

    def of_time_alone(x: jax.Array) -> jax.Array:
        still = jax.tree.map(jnp.zeros_like, params["params"]["space"])
        return block.apply({"params": {**params["params"], "space": still}}, x, mask)[0, 1, 2].sum()

    moved = np.abs(np.asarray(jax.jit(jax.grad(of_time_alone))(x)))[0].sum(axis=-1) > 0
    expected = np.zeros((3, 4), bool)
    expected[:, 2] = True
    np.testing.assert_array_equal(moved, expected)
    whole = jax.grad(lambda x: block.apply(params, x, mask)[0, 1, 2].sum())
    moved = np.abs(np.asarray(jax.jit(whole)(x)))
    assert (moved[0].sum(axis=-1) > 0).all()


def test_a_vector_that_sees_one_token_finds_that_whatever_it_asks():
    module, params = made("cross_attention")
    first = jnp.zeros((ROWS, LENGTHS["image"]), bool).at[:, 0].set(True)
    streams = {**drawn(), "image": Stream(drawn()["image"].tokens, first)}
    other = {**streams, "text": dataclasses.replace(streams["text"], pooled=-streams["text"].pooled)}
    found, again = (module.apply({"params": params}, s) for s in (streams, other))
    close(found["found"].pooled, again["found"].pooled)
    text = found["fused"].pooled - found["found"].pooled
    close(text, _fused("cross_attention", params, only("text"))["fused"].pooled)
    wide = module.apply({"params": params}, drawn())["found"].pooled
    assert (
        np.abs(
            wide - module.apply({"params": params}, {**other, "image": drawn()["image"]})["found"].pooled
        ).max()
        > 1e-3
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CoAttention(("text", "text")).streams(("text", "image")),
            "expected two different towers of",
        ),
        (
            lambda: CrossAttention(source="sound").streams(("text", "image")),
            "fusion.source='sound' is no tower",
        ),
        (
            lambda: SpatioTemporal().streams(("text", "image")),
            "fusion.clip='clip' is no tower; there are: text",
        ),
        (lambda: Mixing(dropout=1.0), "dropout=1.0 of Mixing: must be"),
        (lambda: LayersConfig(dim=6, num_heads=4), "embed_dim=6 is not a multiple of num_heads=4"),
    ],
)
def test_fusions_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
