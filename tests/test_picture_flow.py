"""Pictures by rectified flow: the way from noise to data, its sampler, and the head that draws."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vl_jax.batch import Given
from vl_jax.data.config import DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import Sample
from vl_jax.data.sources.in_domain import DOMAIN
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.metrics.copies import nearest_distances
from vl_jax.evaluate.task import Examinee
from vl_jax.evaluate.tasks.creations import Creations
from vl_jax.fusion.streams import Stream
from vl_jax.heads import pixels
from vl_jax.heads.classification import Classification
from vl_jax.heads.image import flow
from vl_jax.heads.image.dit import DiTConfig
from vl_jax.heads.image.picture_flow import PictureFlow
from vl_jax.heads.image.unet import UNetConfig, to_cells, to_pixels
from vl_jax.joint import JointConfig, Tower

ROWS, SIZE, DIM = 4, 8, 6
NETWORKS = {
    "unet": UNetConfig(dims=(8, 16), num_heads=2),
    "dit": DiTConfig(patch=4, dim=8, mlp_dim=16, num_layers=2, num_heads=2),
}


def test_the_way_and_its_velocity_by_hand():
    data, noise = jnp.float32([[2.0], [2.0]]), jnp.float32([[-2.0], [6.0]])
    found = flow.on_the_way(data, noise, jnp.float32([0.25, 0.5]))
    np.testing.assert_allclose(found, [[1.0], [4.0]])  # 0.75 * 2 + 0.25 * -2; 0.5 * 2 + 0.5 * 6
    drawn = flow.noisy(data, jnp.uint32([7, 7]), jax.random.key(0), dropout=0.0)
    np.testing.assert_array_equal(drawn.values[0], drawn.values[1])  # the same content, the same noise
    # From any point of the way, the velocity leads back to the data.
    np.testing.assert_allclose(drawn.values - drawn.time[:, None] * drawn.velocity, data, atol=1e-6)
    assert drawn.kept.all() and (drawn.time > 0).all() and (drawn.time < 1).all()


def test_times_are_the_logistic_of_normal_numbers_and_conditions_go_as_often_as_asked():
    drawn = flow.noisy(
        jnp.zeros((4000, 1)), jnp.arange(4000, dtype=jnp.uint32), jax.random.key(1), dropout=0.25
    )
    normal = np.log(drawn.time) - np.log1p(-drawn.time)
    assert abs(normal.mean()) < 0.06 and abs(normal.std() - 1) < 0.05
    assert abs(float(jnp.mean(~drawn.kept)) - 0.25) < 0.03


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_straight_ways_lead_back_to_the_data_in_any_number_of_steps(steps):
    data, noise = jax.random.normal(jax.random.key(0), (2, ROWS, 3))
    found = flow.euler(lambda x, t: noise - data, noise, steps)
    np.testing.assert_allclose(found, data, atol=1e-5)
    # So does the field that only knows the data and where it is: v(x, t) = (x - x_0) / t.
    found = flow.euler(lambda x, t: (x - data) / t, noise, steps)
    np.testing.assert_allclose(found, data, atol=1e-5)


def test_a_network_that_says_the_data_is_led_to_it():
    data, noise = jax.random.normal(jax.random.key(0), (2, ROWS, 3))

    def velocity(x, t):
        return flow.towards(data, x, jnp.full(ROWS, t))

    np.testing.assert_allclose(flow.euler(velocity, noise, 20), data, atol=1e-5)
    x, time = jnp.float32([[3.0], [3.0]]), jnp.float32([0.5, 0.01])
    # (3 - 1) / 0.5; below a time of 0.05, by 0.05.
    np.testing.assert_allclose(flow.towards(jnp.ones((2, 1)), x, time), [[4.0], [40.0]], rtol=1e-6)


def test_guidance_by_hand():
    with_, without = jnp.float32([[3.0]]), jnp.float32([[1.0]])
    for scale, expected in ((0.0, 1.0), (1.0, 3.0), (2.0, 5.0)):
        assert float(flow.guided(with_, without, scale)[0, 0]) == expected


def test_cells_and_pixels_are_each_others_inverse():
    x = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
    cells = to_cells(x, 2)
    np.testing.assert_array_equal(cells[0, 0, 1], x[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(to_pixels(cells, 2), x)


def streams(rows: int = ROWS):
    tokens = jax.random.normal(jax.random.key(2), (rows, 3, DIM))
    return {"text": Stream(tokens, jnp.ones((rows, 3), bool))}


def taken(tree, order):
    return jax.tree.map(lambda x: x[order], tree)


def moved(variables):
    """Parameters none of which is 0, so that every part of the network says something."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(
        tree,
        [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)],
    )


def made(network: str, **changes):
    head = PictureFlow(size=SIZE, network=NETWORKS[network], width=8, steps=3, **changes)
    module = head.build()
    return head, module, moved(jax.jit(module.init)(jax.random.key(0), streams()))


def label(rows: int = ROWS):
    values = np.random.default_rng(0).integers(0, 256, (rows, SIZE, SIZE, 3)).astype(np.uint8)
    return Given(values, np.arange(rows) != 1)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.slow
def test_rows_do_not_act_on_one_another(network):
    head, module, variables = made(network)
    order = np.array([2, 0, 3, 1])
    key, rows = jax.random.key(5), label()

    @jax.jit
    def learn(streams, label):
        return head.sums(module.apply(variables, streams, head.noised(label, key)), label)[0]

    whole = learn(streams(), rows)
    mixed = learn(taken(streams(), order), Given(rows.values[order], rows.present[order]))
    np.testing.assert_allclose(mixed, whole, rtol=1e-5)
    parts = [
        learn(taken(streams(), part), Given(rows.values[part], rows.present[part]))
        for part in (order[:2], order[2:])
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)
    said = jax.jit(lambda s, n: module.apply(variables, s, n).said)
    noisy = head.noised(rows, key)
    np.testing.assert_allclose(
        said(taken(streams(), order), taken(noisy, order)), said(streams(), noisy)[order], atol=1e-5
    )


@pytest.mark.slow
def test_drawing_follows_the_seed_and_guidance_one_is_the_condition_alone():
    head, module, variables = made("unet", guidance=1.0)

    def drawn(head, rngs=None):
        return jax.jit(lambda: head.build().apply(variables, streams(), rngs=rngs))()

    plain = drawn(head)
    assert plain.shape == (ROWS, SIZE, SIZE, 3) and not np.allclose(plain[0], plain[1])
    np.testing.assert_array_equal(drawn(head), plain)
    assert not np.allclose(drawn(dataclasses.replace(head, seed=1)), plain)
    assert not np.allclose(drawn(head, {flow.NOISE: jax.random.key(9)}), plain)
    near = drawn(dataclasses.replace(head, guidance=1.0 + 1e-6))  # the program with both velocities
    np.testing.assert_allclose(near, plain, atol=1e-4)
    # The steps are those of the velocity that the module says.
    asked = module.apply(variables, streams()["text"], method="_condition")
    x = jax.random.normal(jax.random.key(0), plain.shape)
    for t in (1.0, 2 / 3, 1 / 3):
        x = x - module.apply(variables, x, jnp.full(ROWS, t), asked, method="velocity") / 3
    np.testing.assert_allclose(plain, x, atol=1e-4)


@pytest.mark.slow
def test_a_row_that_loses_its_condition_is_one_without_a_text():
    head, module, variables = made("dit")
    noisy = head.noised(label(), jax.random.key(0))
    lost = dataclasses.replace(noisy, kept=jnp.zeros(ROWS, bool))
    text = streams()["text"]
    silent = {"text": dataclasses.replace(text, mask=jnp.zeros_like(text.mask))}
    kept = dataclasses.replace(noisy, kept=jnp.ones(ROWS, bool))
    np.testing.assert_array_equal(
        module.apply(variables, streams(), lost).said, module.apply(variables, silent, kept).said
    )
    assert not np.allclose(
        module.apply(variables, streams(), kept).said, module.apply(variables, streams(), lost).said
    )


@pytest.mark.slow
def test_a_new_network_says_nothing_and_its_loss_is_that_of_the_velocity():
    head = PictureFlow(size=SIZE, network=NETWORKS["unet"], width=8)
    module, rows = head.build(), label()
    variables = module.init(jax.random.key(0), streams())
    noisy = head.noised(rows, jax.random.key(1))
    loss, _ = head.sums(module.apply(variables, streams(), noisy), rows)
    square = np.mean(np.square(noisy.velocity), axis=(1, 2, 3))
    np.testing.assert_allclose(loss, square[rows.present].sum(), rtol=1e-5)


def test_what_is_drawn_is_a_file(tmp_path):
    head = PictureFlow(size=SIZE, network=NETWORKS["unet"])
    prediction = np.full((SIZE, SIZE, 3), -1.0, np.float32)
    prediction[0, 0] = 1.0, 0.0, 7.0
    said = head.decode(prediction)
    picture = np.asarray(pixels.from_text(said["picture"]))
    assert picture[0, 0].tolist() == [255, 128, 255] and not picture[1:].any()
    assert head.made(said).startswith(b"\x89PNG")
    assert head.read(Sample("a", ())) is None
    shown = Sample("b", (), (lambda: Image.new("RGB", (2, 2), "red"),), labels={DOMAIN: "drawings"})
    read = head.read(shown)
    assert read is not None and read[0, 0].tolist() == [255, 0, 0]
    of_drawings, of_maps = (dataclasses.replace(head, domain=name) for name in ("drawings", "maps"))
    assert of_drawings.read(shown) is not None and of_maps.read(shown) is None


def test_what_cannot_be_is_said_in_one_line():
    with pytest.raises(ValueError, match="size=30 of head 'picture': its network needs a multiple of 8"):
        PictureFlow(size=30)
    with pytest.raises(ValueError, match="dropout=1"):
        PictureFlow(dropout=1)
    with pytest.raises(ValueError, match="expected multiples of 8"):
        UNetConfig(dims=(12,))
    with pytest.raises(ValueError, match="not a multiple of num_heads=3"):
        DiTConfig(num_heads=3)
    with pytest.raises(ValueError, match="learns from noisy pictures: train it by Denoising"):
        PictureFlow().sums(jnp.zeros((1, 32, 32, 3)), label(1))


def test_nearest_distances_by_hand():
    known = np.zeros((2, 1, 1, 3), np.uint8)
    known[1] = 255
    pictures = np.array([[[[0, 0, 0]]], [[[255, 255, 0]]]], np.uint8)
    np.testing.assert_allclose(nearest_distances(pictures, known), [0, np.sqrt(1 / 3)])
    with pytest.raises(ValueError, match="no known pictures"):
        nearest_distances(pictures, known[:0])


def test_what_is_made_is_judged_and_compared_with_what_was_learnt(monkeypatch):
    image = ResNetConfig(stem_dim=8, stage_dims=(8,), stage_blocks=(1,), block="basic", image_size=SIZE)
    text = TextEncoderConfig(vocab_size=2048, max_length=8, embed_dim=8, mlp_dim=8, num_layers=1, num_heads=1)
    config = JointConfig(
        (Tower("text", text, "tokens"), Tower("image", image)),
        (PictureFlow(size=SIZE), Classification(("dark", "light"))),
    )
    real = np.uint8([0, 0, 255, 255])[:, None, None, None] * np.ones((ROWS, SIZE, SIZE, 3), np.uint8)
    drawn = np.float32([-1, 0.9, 0.9, 1.0])[:, None, None, None] * np.ones((ROWS, SIZE, SIZE, 3), np.float32)
    there = np.array([True, True, True, True])
    batch = dataclasses.replace(
        config.smallest_batch(ROWS),
        tiles=real[:, None],
        labels={"picture": Given(real, there), "label": Given(np.int32([0, 0, 1, 1]), there)},
    )
    records = [
        {"id": str(row), "question": "x", "image": Image.fromarray(picture)}
        for row, picture in enumerate(real)
    ]
    examinee = object.__new__(Examinee)  # one without parameters
    data = DataConfig(max_tokens=8, tiling=TilingConfig(tile_size=SIZE, views="global"))
    layout = SimpleNamespace(model=SimpleNamespace(config=config))
    vars(examinee).update(layout=layout, data=data, spec=config.spec(), source="new")
    monkeypatch.setattr(Examinee, "samples", lambda self: [(records, batch)])
    monkeypatch.setattr(Creations, "_make", lambda self, examinee, batch, seed: drawn)
    monkeypatch.setattr(
        Creations,
        "_judge",
        lambda self, examinee, batch: (batch.tiles[:, 0].mean((1, 2, 3)) > 127).astype(int),
    )
    monkeypatch.setattr(Creations, "_known", lambda self, examinee: real[:1])
    run, told = Creations().run(examinee), []
    while True:
        try:
            told.append(next(run))
        except StopIteration as end:
            findings = end.value
            break
    assert [record["correct"] for record in told] == [True, False, True, True]
    assert told[1]["prediction"] == "light" and told[1]["image"].getpixel((0, 0)) == (242, 242, 242)
    scores = findings.scores
    assert scores["balanced_accuracy"] == scores["accuracy"] == 0.75 and scores["real_accuracy"] == 1
    assert scores["copy_rate"] == 0.25 and scores["real_copy_rate"] == 0.5 and scores["count"] == 4
    np.testing.assert_allclose(scores["nearest_distance"], (0 + 2 * 242 / 255 + 1) / 4, rtol=1e-6)
