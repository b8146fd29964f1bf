"""The encoder-decoder: positions, who sees whom, capacity, its losses, and published weights in and out."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import losses, sharding
from vl_jax import params as params_lib
from vl_jax.interop import rules
from vl_jax.interop.encoder_decoder import (
    IGNORED,
    encoder_decoder_rules,
    encoder_decoder_stacks,
    read_encoder_decoder,
)
from vl_jax.kernels.activation import Activation
from vl_jax.language.biased_attention import distance_buckets, position_bias
from vl_jax.language.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderConfig,
    EncoderDecoderOutput,
    StackConfig,
    router_logits,
    shift_right,
)
from vl_jax.moe import balance
from vl_jax.moe.config import BalanceConfig, CapacityConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig

pytestmark = pytest.mark.slow  # an encoder beside the main path: minutes of compilation

# The same sums in another order, over values of order 1.
assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)

VOCAB = 24
CONFIG = EncoderDecoderConfig(
    vocab_size=VOCAB,
    embed_dim=16,
    mlp_dim=12,
    num_heads=2,
    head_dim=6,
    encoder=StackConfig(3, (1, 2)),
    decoder=StackConfig(2, (1,)),
    num_buckets=8,
    max_distance=12,
    tie_embeddings=False,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
RELU = Activation("relu", gated=False)
MOE = MoEConfig(
    num_experts=3,
    top_k=1,
    expert_dim=12,
    shared=SharedExpertsConfig(num=0),
    activation=RELU,
    balance=BalanceConfig(weight=1.0, z_weight=1.0),
    limit=CapacityConfig(slots=2),
)
SMALL = dataclasses.replace(TIED, encoder=StackConfig(2, (1,)), decoder=StackConfig(1, (0,)))
SOURCE = jnp.asarray([[3, 9, 5, 9, 7, 20, 4], [6, 1, 6, 2, 0, 0, 0]])
SOURCE_VALID = SOURCE > 0
TARGET = jnp.asarray([[2, 8, 8, 3, 8], [2, 11, 12, 5, 1]])
TARGET_VALID = jnp.ones(TARGET.shape, bool)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@functools.cache
def shapes_of(config: EncoderDecoderConfig, moe: MoEConfig) -> Any:
    return jax.eval_shape(
        lambda: EncoderDecoder(config, moe).init(jax.random.key(0), SOURCE, TARGET)["params"]
    )


@functools.cache
def make(config: EncoderDecoderConfig = CONFIG, moe: MoEConfig = MOE) -> Any:
    """Parameters that are none at their usual constant."""
    flat = params_lib.flatten(nn.meta.unbox(shapes_of(config, moe)))
    return params_lib.unflatten(
        {
            path: 0.4 * random(*leaf.shape, seed=i) + np.float32(path.endswith("scale"))
            for i, (path, leaf) in enumerate(flat.items())
        }
    )


@functools.cache
def compiled(config: EncoderDecoderConfig, moe: MoEConfig) -> Any:
    model = EncoderDecoder(config, moe)
    return jax.jit(functools.partial(model.apply, mutable=["intermediates"], capture_intermediates=True))


def run(
    config: EncoderDecoderConfig = CONFIG,
    moe: MoEConfig = MOE,
    *,
    params: Any = None,
    source: Any = SOURCE,
    target: Any = TARGET,
    source_valid: Any = SOURCE_VALID,
    target_valid: Any = TARGET_VALID,
) -> tuple[EncoderDecoderOutput, Any]:
    """The output, and what was shown on the way."""
    masks = {"source_valid": source_valid, "target_valid": target_valid}
    params = make(config, moe) if params is None else params
    output, captured = compiled(config, moe)({"params": params}, source, target, **masks)
    return output, captured["intermediates"]


def shown(captured: Any, path: str) -> Any:
    for key in path.split("/"):
        captured = captured[key]
    return captured[0]


# Positions.


def test_buckets_by_hand():
    # Looking back: 0-3 have a bucket each, then 4 + floor(4 log(d / 4) / log(16 / 4)), at most 7.
    offsets = -np.array([-5, -1, 0, 1, 3, 4, 5, 6, 8, 11, 12, 15, 16, 1000])
    back = distance_buckets(offsets, num_buckets=8, max_distance=16, bidirectional=False)
    assert back.tolist() == [0, 0, 0, 1, 3, 4, 4, 5, 6, 6, 7, 7, 7, 7]
    # Both ways: two buckets of one distance each way, then 2 + floor(2 log(d / 2) / log(16 / 2)), at most 3.
    both = distance_buckets(offsets, num_buckets=8, max_distance=16, bidirectional=True)
    assert both.tolist() == [6, 5, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(8, 12), (9, 20), (32, 128)])
def test_buckets_grow_with_distance_and_all_are_used(
    num_buckets: int, max_distance: int, bidirectional: bool
):
    def buckets(offsets: np.ndarray) -> np.ndarray:
        return distance_buckets(
            offsets, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
        )

    sides = [buckets(-np.arange(300))] + [buckets(np.arange(1, 300))] * bidirectional
    assert all((np.diff(side) >= 0).all() for side in sides)
    used = set(np.concatenate(sides).tolist())
    assert len(used) == (2 * (num_buckets // 2) - 1 if bidirectional else num_buckets)
    assert all((side[max_distance:] == side[-1]).all() for side in sides)
    if bidirectional:
        assert not set(sides[0].tolist()) & set(sides[1].tolist())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_bias_is_the_row_of_the_bucket_of_query_and_key(bidirectional: bool):
    table, length = random(8, 3), 17
    bias = position_bias(table, length, max_distance=12, bidirectional=bidirectional)
    order = np.arange(length)
    buckets = distance_buckets(
        order - order[:, None], num_buckets=8, max_distance=12, bidirectional=bidirectional
    )
    np.testing.assert_array_equal(bias[0], np.moveaxis(np.asarray(table)[buckets], -1, 0))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_scores_are_products_and_bias_not_scaled(side: str):
    name, tokens = {"encoder": ("source", SOURCE), "decoder": ("target", TARGET)}[side]
    _, captured = run()
    first, length = make()[side]["layers_0_0"], tokens.shape[1]
    x = np.asarray(make()[f"{name}_embedding"])[tokens]
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * first["attention_norm"]["scale"][0]
    query, key = (jnp.einsum("BTD,DNH->BTNH", normed, first["attention"][k][0]) for k in ("query", "key"))
    mask = SOURCE_VALID[:, None, None] if side == "encoder" else jnp.tril(jnp.ones((length, length), bool))
    table = make()[side]["position_bias"]
    bias = position_bias(table, length, max_distance=12, bidirectional=side == "encoder")
    scores = jnp.where(mask, jnp.einsum("BTNH,BSNH->BNTS", query, key) + bias, -jnp.inf)
    weights = shown(captured, f"{side}/layers_0_0/attention/weights")[0]
    assert_close(weights, jax.nn.softmax(scores, axis=-1))


# Who sees whom.


def test_no_target_token_sees_a_later_one_and_all_see_the_source():
    (size, length), width = (SOURCE.shape[1], TARGET.shape[1]), CONFIG.embed_dim
    own, config = make(), dataclasses.replace(CONFIG, vocab_size=size)
    ids = jnp.arange(size)[None], jnp.arange(length)[None]

    def outputs(source: jax.Array, target: jax.Array) -> jax.Array:
        # Every position takes a row of a table of its own, so that its gradient can be told apart.
        unused = jnp.zeros((size - length, width))
        params = {
            **own,
            "source_embedding": own["source_embedding"][SOURCE[0]] + source,
            "target_embedding": jnp.concatenate([own["target_embedding"][TARGET[0]] + target, unused]),
            "head": {"kernel": own["head"]["kernel"][:, :size]},
        }
        return EncoderDecoder(config, MOE).apply({"params": params}, *ids).logits[0]  # type: ignore[union-attr]

    zeros = jnp.zeros((size, width)), jnp.zeros((length, width))
    by_source, by_target = jax.jit(jax.jacobian(outputs, argnums=(0, 1)))(*zeros)
    reach = np.abs(by_target).sum(axis=(1, 3)) > 0
    np.testing.assert_array_equal(reach, np.tril(np.ones((length, length), bool)))
    assert (np.abs(by_source).sum(axis=(1, 3)) > 0).all()


def test_padding_of_the_source_changes_nothing():
    output, _ = run()
    # Other tokens in its place ...
    other, _ = run(source=jnp.where(SOURCE_VALID, SOURCE, 13))
    # ... or more of it.
    longer, _ = run(
        source=jnp.pad(SOURCE, ((0, 0), (0, 3)), constant_values=5),
        source_valid=jnp.pad(SOURCE_VALID, ((0, 0), (0, 3))),
    )
    assert_close(other.logits, output.logits)
    assert_close(longer.logits, output.logits)
    encoded = np.where(SOURCE_VALID[..., None], output.encoded, 0)
    assert_close(np.where(SOURCE_VALID[..., None], other.encoded, 0), encoded)
    assert_close(np.where(SOURCE_VALID[..., None], longer.encoded[:, :7], 0), encoded)


def test_a_token_that_is_not_padding_matters():
    changed, _ = run(source=SOURCE.at[1, 3].set(13))
    assert np.abs(changed.logits[1] - run()[0].logits[1]).min(axis=-1).max() > 1e-4
    assert_close(changed.logits[0], run()[0].logits[0])


def test_padding_of_the_target_is_not_seen():
    path = "decoder/layers_0_0/attention/weights"
    masked = shown(run(target_valid=TARGET_VALID.at[0, 3].set(False))[1], path)[0]
    assert (masked[0, :, 4, 3] == 0).all() and (shown(run()[1], path)[0][0, :, 4, 3] > 0).all()
    assert_close(masked[0].sum(axis=-1), np.ones((2, 5)))


@pytest.mark.parametrize("route_padding, moved", [(True, [0, 1]), (False, [3, 4])])
def test_padding_takes_slots_or_does_not(route_padding: bool, moved: list[int]):
    """Rows begin with three tokens of padding, and all tokens go to the only expert, which has two slots."""
    config = dataclasses.replace(CONFIG, route_padding=route_padding)
    moe = dataclasses.replace(MOE, num_experts=1)
    model = EncoderDecoder(config, moe)
    encode = jax.jit(functools.partial(model.apply, method="encode", mutable=["intermediates"]))
    valid = jnp.broadcast_to(jnp.arange(7) >= 3, SOURCE.shape)
    _, captured = encode({"params": make(config, moe)}, SOURCE, valid)
    routed = np.abs(shown(captured["intermediates"], "encoder/layers_1_2/moe/routed")).max(axis=-1)
    np.testing.assert_array_equal(routed > 0, np.broadcast_to(np.isin(np.arange(7), moved), routed.shape))


# Experts.


def test_experts_take_the_first_tokens_of_a_row_and_add_nothing_to_the_others():
    _, captured = run()
    for stack, name in (("encoder", "layers_1_2"), ("decoder", "layers_1_1")):
        x, routed, logits = (
            np.asarray(shown(captured, f"{stack}/{name}/{part}"))
            for part in ("mlp_norm/__call__", "moe/routed", "moe/logits")
        )  # [L B T ...]
        weights = jax.tree.map(np.asarray, make()[stack][name]["moe"])
        chosen = np.argmax(logits, axis=-1)
        earlier = np.tril(chosen[..., :, None] == chosen[..., None, :], k=-1).sum(axis=-1)
        kept = earlier < 2
        hidden = np.maximum(np.einsum("LBTD,LEDF->LBTEF", x, weights["w_in"][:, :, :, 0]), 0)
        every = np.einsum("LBTEF,LEFD->LBTED", hidden, weights["w_out"])
        gates = np.where(np.arange(3) == chosen[..., None], jax.nn.softmax(logits, axis=-1), 0)
        expected = np.where(kept[..., None], np.einsum("LBTED,LBTE->LBTD", every, gates), 0)
        assert_close(routed, expected)
        assert not kept.all() and (routed[~kept] == 0).all()


def test_statistics_are_of_every_sparse_layer():
    output, _ = run()
    tokens = SOURCE.size
    assert output.encoder_routed.stats.load.sum(axis=(1, 2)).tolist() == [tokens, tokens]
    assert output.decoder_routed.stats.load.sum(axis=(1, 2)).tolist() == [TARGET.size]


# Losses, and the two ends.


def test_router_losses_by_hand():
    loss = jax.jit(balance.sequence_losses)
    valid, (even, one) = jnp.ones((2, 4), bool), ([0, 1, 2, 3], [2, 2, 2, 2])
    other = [1, 1, 1, 1]
    for layers, expected in (
        ([[even, even], [even, even]], 1.0),
        ([[one, one], [one, one]], 4.0),
        ([[one, one], [other, other]], 2.0),  # layers are pooled: two sides are more even than one
        ([[one, other], [other, one]], 2.0),
        ([[one, other], [one, other]], 4.0),  # rows are not
    ):
        logits = 50 * jax.nn.one_hot(jnp.asarray(layers), 4)
        assert_close(loss(logits, valid)["balance"], expected)
        assert_close(loss(logits, valid)["z"], 50.0**2)
    assert_close(loss(0 * logits, valid)["z"], math.log(4) ** 2)


def test_router_losses_are_over_valid_tokens():
    loss, counts = jax.jit(balance.sequence_losses), (6, 2, 5)
    logits, valid = random(2, 3, 6, 4), jnp.arange(6) < jnp.asarray(counts)[:, None]
    found = loss(logits, valid)
    changed = loss(jnp.where(valid[..., None], logits, 100.0), valid)
    parts = [loss(logits[:, i : i + 1, :n], jnp.ones((1, n), bool)) for i, n in enumerate(counts)]
    for name, weights in (("balance", None), ("z", counts)):
        assert_close(changed[name], found[name])
        assert_close(found[name], np.average([part[name] for part in parts], weights=weights))


def test_the_loss_of_one_layer_is_that_of_its_routing():
    output, captured = run()
    logits = router_logits(captured["decoder"], CONFIG.decoder)
    found = balance.sequence_losses(logits, jnp.ones(TARGET.shape, bool))
    for name in ("balance", "z"):
        assert_close(output.decoder_routed.losses[name][0], found[name])


def test_the_decoder_reads_the_labels_before_each():
    labels = jnp.asarray([[5, 6, -100, 7], [8, 9, 1, -100]])
    assert shift_right(labels, start_id=3, pad_id=0).tolist() == [[3, 5, 6, 0], [3, 8, 9, 1]]


def test_a_tied_table_stands_at_all_ends_and_an_untied_head_alone():
    output, _ = run(TIED)
    table = make(TIED)["embedding"]
    assert_close(output.logits, output.hidden @ table.T / 4)
    output, _ = run()
    assert_close(output.logits, output.hidden @ make()["head"]["kernel"])
    for name, same in (("source_embedding", False), ("target_embedding", True)):
        changed, _ = run(params={**make(), name: 2 * make()[name]})
        assert np.allclose(changed.encoded, output.encoded) == same
        assert not np.allclose(changed.hidden, output.hidden)


# Training.


def loss_of(params: Any, tokens: Any, config: EncoderDecoderConfig = SMALL) -> jax.Array:
    """Of writing the tokens that were read."""
    read = shift_right(tokens, start_id=0, pad_id=0)
    output = EncoderDecoder(config, MOE).apply({"params": params}, tokens, read)
    return jnp.mean(losses.cross_entropy(output.logits, tokens)[0])  # type: ignore[union-attr]


@functools.cache
def start() -> Any:
    init = jax.jit(lambda key: EncoderDecoder(SMALL, MOE).init(key, SOURCE, TARGET)["params"])
    return nn.meta.unbox(init(jax.random.key(0)))


@pytest.mark.slow
def test_rematerialisation_and_a_spread_batch_change_no_gradient():
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (8, 5)), jnp.int32)
    expected = jax.jit(jax.value_and_grad(loss_of))(start(), tokens)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.device_put(
        start(), sharding.shardings(sharding.place(shapes_of(SMALL, MOE), mesh, sharding.AxisRules()), mesh)
    )
    spread = jax.device_put(tokens, NamedSharding(mesh, P(("data", "fsdp", "expert"))))
    remat = functools.partial(loss_of, config=dataclasses.replace(SMALL, remat="full"))
    with sharding.use_mesh(mesh):
        found = jax.jit(jax.value_and_grad(remat))(params, spread)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.slow
def test_training_teaches_it_to_copy():
    optimizer = optax.adam(1e-2)

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        tokens = jax.random.randint(key, (32, 4), 1, 6)
        value, gradient = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    with jax.numpy_dtype_promotion("standard"):  # inside optax
        train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
        _, values = train((start(), optimizer.init(start())), jax.random.split(jax.random.key(1), 300))
    # Guessing among five tokens costs log(5).
    assert values[0] > math.log(5) and np.mean(values[-20:]) < 0.2 * math.log(5)


# Configs.


def test_layers_of_one_kind_are_stacked_together():
    runs = StackConfig(6, (2, 3, 5)).runs
    assert [(run.name, run.sparse, run.layers) for run in runs] == [
        ("layers_0_1", False, (0, 1)),
        ("layers_2_3", True, (2, 3)),
        ("layers_4_4", False, (4,)),
        ("layers_5_5", True, (5,)),
    ]


@pytest.mark.parametrize("options", [(0, ()), (2, (2,)), (2, (1, 0)), (2, (1, 1)), (2, (-1,))])
def test_stacks_that_make_no_sense_are_refused(options: tuple[int, tuple[int, ...]]):
    with pytest.raises(ValueError, match="must be"):
        StackConfig(*options)


@pytest.mark.parametrize("options", [{"num_buckets": 3}, {"max_distance": 4}])
def test_buckets_that_make_no_sense_are_refused(options: dict[str, int]):
    with pytest.raises(ValueError, match="num_buckets=.* must be >= 4, and max_distance="):
        dataclasses.replace(CONFIG, **options)


# Published weights.

PUBLISHED = {
    "model_type": "switch_transformers",
    "vocab_size": 20,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 7,
    "num_heads": 2,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_experts": 3,
    "expert_capacity": 2,
}


@pytest.mark.parametrize(
    "options, encoder, decoder, penalized",
    [
        ({"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1}, (1, 3), (1,), "encoder decoder"),
        ({"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3}, (0, 1, 2, 3), (0, 1, 2), ""),
        # Rounded down, the step is 1; a number of 0 makes one layer sparse; more than there are make none.
        ({"num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 0}, (0, 1, 2, 3), (1,), "decoder"),
        ({"num_sparse_encoder_layers": 5, "num_sparse_decoder_layers": 2}, (), (0, 1, 2), ""),
        # A step that is written down wins.
        ({"encoder_sparse_step": 3, "decoder_sparse_step": 0}, (1,), (), "encoder"),
        ({"num_decoder_layers": None, "decoder_sparse_step": 2}, (0, 1, 2, 3), (1, 3), "decoder"),
    ],
)
def test_sparse_layers_of_published_configs(
    options: dict[str, Any], encoder: tuple[int, ...], decoder: tuple[int, ...], penalized: str
):
    config = read_encoder_decoder({**PUBLISHED, **options})
    assert config.model.encoder.sparse_layers == encoder
    assert config.model.decoder.sparse_layers == decoder
    assert config.penalized == tuple(penalized.split())


def test_what_a_published_config_leaves_out_is_the_default_of_its_class():
    config = read_encoder_decoder({"model_type": "switch_transformers"})
    assert config.model == EncoderDecoderConfig(
        mlp_dim=2048, encoder=StackConfig(12, (1, 5, 9)), decoder=StackConfig(12, (1, 5, 9))
    )
    expected = MoEConfig(
        num_experts=8,
        top_k=1,
        expert_dim=2048,
        shared=SharedExpertsConfig(num=0),
        activation=RELU,
        balance=BalanceConfig(weight=0.0),
        limit=CapacityConfig(slots=64),
    )
    assert config.moe == expected and (config.balance_weight, config.z_weight) == (0.001, 0.001)


def test_the_class_reads_one_name_of_the_activation_only():
    config = read_encoder_decoder(
        {**PUBLISHED, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}
    )
    assert config.model.activation == config.moe.activation == Activation("gelu_tanh", gated=False)


@pytest.mark.parametrize(
    "options", [{"model_type": "t5"}, {"router_dtype": "bfloat16"}, {"dense_act_fn": "gated-gelu"}]
)
def test_published_options_that_are_not_supported_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(options))):
        read_encoder_decoder({**PUBLISHED, **options})


@pytest.mark.parametrize(
    "options", [{}, {"tie_word_embeddings": False, "router_bias": True}], ids=["tied", "untied"]
)
def test_published_weights_come_back_as_they_were(options: dict[str, Any]):
    config = read_encoder_decoder({**PUBLISHED, **options})
    targets = nn.meta.unbox(shapes_of(config.model, config.moe))
    flat = {path: leaf.shape for path, leaf in params_lib.flatten(targets).items()}
    plan = rules.plan(encoder_decoder_rules(), flat, encoder_decoder_stacks(config.model))
    keys = [(key, leaf.source_shape) for leaf in plan.leaves for _, key in leaf.sources()]
    weights = {key: np.asarray(random(*shape, seed=i)) for i, (key, shape) in enumerate(keys)}
    assert ("encoder.block.1.layer.1.mlp.router.classifier.bias" in weights) == bool(options)
    copies = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    unread = {key: np.zeros((20, 12), np.float32) for key in copies - weights.keys()}
    assert len(unread) == (1 if options else 3)
    tree = rules.read(plan, weights | unread, targets, ignored=IGNORED)
    assert_close(
        tree["encoder"]["position_bias"],
        weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
    )
    back = dict(rules.export(plan, tree))
    assert back.keys() == weights.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights[key])
