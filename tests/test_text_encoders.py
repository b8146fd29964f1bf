"""Text encoders: BERT, distances in place of positions, and Transformer-XL with its memory."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.encoders.language.adaptive import AdaptiveConfig
from vl_jax.encoders.language.bert import BertConfig, BertPretraining
from vl_jax.encoders.language.relative import RelativeTextConfig
from vl_jax.encoders.language.transformer_xl import (
    Memory,
    NextWord,
    TransformerXLConfig,
    keys_in_reach,
    shift_to_keys,
)
from vl_jax.heads.classification import Classification
from vl_jax.interop import parts, rules
from vl_jax.interop.encoders import bert, transformer_xl
from vl_jax.interop.folder import open_weights, read_config
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import Variables, plan_layout
from vl_jax.moe.config import BalanceConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.sharding import MeshConfig, make_mesh

assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)

WORDS, LONGEST = 40, 12
SIZES: dict[str, Any] = {"embed_dim": 16, "mlp_dim": 24, "num_layers": 2, "num_heads": 2}
BERT = BertConfig(WORDS, LONGEST, **SIZES)
RELATIVE = RelativeTextConfig(WORDS, LONGEST, **SIZES, num_buckets=8, max_distance=6)
XL = TransformerXLConfig(
    AdaptiveConfig(WORDS, (10, 25), embed_dim=16, shrink=2, tied_projections=(False, True, True)),
    max_length=LONGEST,
    **SIZES,
    head_dim=8,
    memory=8,
    farthest=6,
)
KINDS: dict[str, Any] = {"bert": BERT, "relative": RELATIVE, "transformer_xl": XL}
LENGTHS = np.array([7, 10, 3])


def tokens_of(rows: int = 3, length: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, WORDS, (rows, length)).astype(np.int32)


def draw(module: nn.Module, *inputs: Any) -> Any:
    """Random parameters, none of them at its initial constant."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *inputs))
    random = np.random.default_rng(1)

    def one(path: str, leaf: Any) -> np.ndarray:
        value = 0.3 * random.standard_normal(leaf.shape).astype(np.float32)
        return value + np.float32(path.endswith("scale"))

    return params_lib.map_paths(one, shapes)


@functools.cache
def make(config: Any) -> Any:
    return draw(config.build("float32"), tokens_of())


@functools.cache
def program(config: Any, method: str = "__call__") -> Any:
    return jax.jit(functools.partial(config.build("float32").apply, method=method))


def encode(config: Any, tokens: Any, valid: Any = None) -> Any:
    return program(config)({"params": make(config)}, tokens, valid)


# What they have in common.


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_changes_what_a_real_token_becomes(kind: str):
    config, tokens = KINDS[kind], tokens_of()
    valid = np.arange(10) < LENGTHS[:, None]
    found = encode(config, tokens, valid)
    other = np.where(valid, tokens, tokens_of(seed=1))
    longer = np.concatenate([other, tokens_of(3, 2, seed=2)], axis=1)
    again = encode(config, longer, np.arange(12) < LENGTHS[:, None])
    assert_close(again.tokens[:, :10][valid], found.tokens[valid])
    alone = encode(config, tokens[2:, :3])
    assert_close(alone.tokens[0], found.tokens[2, :3])
    if found.pooled is not None:
        assert_close(again.pooled, found.pooled)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_another_order_come_out_in_that_order(kind: str):
    config, tokens, order = KINDS[kind], tokens_of(), np.array([2, 0, 1])
    valid = np.arange(10) < LENGTHS[:, None]
    found = encode(config, tokens, valid)
    assert_close(encode(config, tokens[order], valid[order]).tokens, found.tokens[order])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_find_what_one_finds(kind: str):
    config, tokens = KINDS[kind], tokens_of(4)
    module = config.build("float32")
    boxed = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), tokens)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.place(boxed["params"], mesh, sharding.AxisRules())
    params = jax.device_put(make(config), sharding.shardings(placed, mesh))
    given = jax.device_put(jnp.asarray(tokens), sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh):
        spread = jax.jit(module.apply)({"params": params}, given)
    assert_close(spread.tokens, encode(config, tokens).tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_are_too_long_are_refused(kind: str):
    with pytest.raises(ValueError, match="text of 13 tokens; the encoder has max_length=12 positions"):
        jax.eval_shape(lambda x: KINDS[kind].build("float32").init(jax.random.key(0), x), tokens_of(1, 13))


# BERT.


@pytest.mark.slow
def test_bert_knows_types_and_takes_experts():
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=8, balance=BalanceConfig(weight=0.0))
    config = dataclasses.replace(BERT, moe=moe, sparse_layers=(1,))
    module, tokens = config.build("float32"), tokens_of()
    found = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x)[0], tokens)
    assert found.routed.stats.load.shape == (1, 2, 4) and found.pooled.shape == (3, 16)
    variables, plain = {"params": make(BERT)}, encode(BERT, tokens)
    same, other = (
        program(BERT)(variables, tokens, token_types=np.full_like(tokens, kind)) for kind in (0, 1)
    )
    assert_close(same.tokens, plain.tokens)
    assert np.abs(np.asarray(other.tokens - plain.tokens)).max() > 1e-2


def test_the_bias_of_words_is_read_under_the_name_that_counts():
    both = ["cls.predictions.bias", "cls.predictions.decoder.bias", "cls.predictions.decoder.weight"]
    by_target = {rule.target: rule.source for rule in bert.pretraining_rules(both)}
    assert by_target["words_bias"] == "cls.predictions.decoder.bias"
    assert bert.pretraining_ignored({}, both)[1:] == (
        r"cls\.predictions\.decoder\.weight",
        r"cls\.predictions\.bias",
    )
    (only,) = {rule.source for rule in bert.pretraining_rules(both[:1]) if rule.target == "words_bias"}
    assert only == "cls.predictions.bias"
    with pytest.raises(ValueError, match="position_embedding_type='relative_key': expected 'absolute'"):
        bert.read_bert({"position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match="hidden_act='snake': known are gelu"):
        bert.read_bert({"hidden_act": "snake"})


@pytest.mark.slow
def test_an_untied_model_has_two_tables_of_words():
    for tied in (True, False):
        tree = draw(BertPretraining(BERT, tied), tokens_of())
        shapes = {path: leaf.shape for path, leaf in params_lib.flatten(tree).items()}
        assert ("words" in shapes) is not tied
        keys = ["cls.predictions.decoder.bias"] * (not tied)
        plan = rules.plan(bert.pretraining_rules(keys), shapes, bert.bert_stacks(BERT))
        written = dict(rules.export(plan, tree))
        assert ("cls.predictions.decoder.weight" in written) is not tied
        again = rules.read(plan, written, jax.eval_shape(lambda tree=tree: tree))
        jax.tree.map(np.testing.assert_array_equal, again, tree)


# Distances in place of positions.


@pytest.mark.slow
def test_it_is_of_no_account_where_a_text_stands():
    tokens = tokens_of()
    found = encode(RELATIVE, tokens)
    moved = np.concatenate([tokens_of(3, 2, seed=3), tokens], axis=1)
    again = encode(RELATIVE, moved, np.broadcast_to(np.arange(12) >= 2, (3, 12)))
    assert_close(again.tokens[:, 2:], found.tokens)
    # But the order of words is.
    turned = encode(RELATIVE, tokens[:, ::-1].copy())
    assert np.abs(np.asarray(turned.tokens[:, ::-1] - found.tokens)).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_buckets": 5}, "num_buckets=5 must be even and >= 4"),
        ({"max_distance": 2}, "max_distance=2 more than a quarter of them"),
        ({"num_heads": 3}, "embed_dim=16 is not a multiple of num_heads=3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RELATIVE, **options)


# Transformer-XL.


def test_scores_by_distance_are_moved_to_their_keys():
    """Query i of the last 3 of 5 tokens stands at 2 + i; entry s is of distance 4 - s."""
    x = np.arange(15, dtype=np.float32).reshape(1, 1, 3, 5)
    found = np.asarray(shift_to_keys(jnp.asarray(x)))
    for i in range(3):
        for key in range(2 + i + 1):
            assert found[0, 0, i, key] == x[0, 0, i, 4 - (2 + i - key)]


def test_a_token_sees_those_before_it_or_so_many():
    everything = keys_in_reach(2, 3, XL)
    np.testing.assert_array_equal(everything, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    some = keys_in_reach(2, 3, dataclasses.replace(XL, same_length=True, memory=2))
    np.testing.assert_array_equal(some, [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]])


def read(config: TransformerXLConfig, tokens: Any, memory: Memory, valid: Any = None) -> Any:
    return program(config, "segment")({"params": make(config)}, tokens, memory, valid)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_biases": True, "norms_follow": False, "farthest": 0},
        {"same_length": True, "memory": 6, "remember_zeros": True},
    ],
    ids=["plain", "shared", "same_length"],
)
def test_two_segments_with_memory_are_one_long_segment(options: dict[str, Any]):
    config, tokens = dataclasses.replace(XL, **options), tokens_of()
    start = Memory.empty(config, 3)
    whole, _ = read(config, tokens, start)
    first, memory = read(config, tokens[:, :5], start)
    second, memory = read(config, tokens[:, 5:], memory)
    assert memory.states.shape == start.states.shape
    assert_close(np.concatenate([first.tokens, second.tokens], axis=1), whole.tokens)
    if not config.remember_zeros:  # as a tower
        assert_close(encode(config, tokens).tokens, whole.tokens)


@pytest.mark.slow
def test_what_is_no_longer_remembered_changes_nothing():
    config = dataclasses.replace(XL, memory=3, num_layers=1)
    tokens, other = tokens_of(), tokens_of()
    other[:, :2] = (other[:, :2] + 1) % WORDS
    ends = []
    for ids in (tokens, other):
        _, memory = read(config, ids[:, :5], Memory.empty(config, 3))
        ends.append(read(config, ids[:, 5:], memory)[0].tokens)
    np.testing.assert_array_equal(*ends)


@pytest.mark.slow
def test_padding_is_not_remembered_as_a_token():
    tokens, valid = tokens_of(), np.arange(5) < np.array([[5], [3], [0]])
    ends = []
    for seed in (0, 1):
        ids = np.where(valid, tokens[:, :5], tokens_of(3, 5, seed=seed))
        _, memory = read(XL, ids, Memory.empty(XL, 3), valid)
        np.testing.assert_array_equal(memory.valid[:, -5:], valid)
        ends.append(read(XL, tokens[:, 5:], memory)[0].tokens)
    assert_close(*ends)


@pytest.mark.slow
def test_no_token_depends_on_a_later_one_and_no_gradient_enters_a_memory():
    """Every token is a word of its own, so the rows of the table tell which tokens matter."""
    config = dataclasses.replace(XL, words=AdaptiveConfig(20, (), embed_dim=16, shrink=1))
    tokens = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    module, params = config.build("float32"), make(config)

    def last(params: Any, position: int, memory: bool) -> Any:
        if not memory:
            return jnp.sum(module.apply({"params": params}, tokens).tokens[0, position] ** 2)
        apply = functools.partial(module.apply, {"params": params}, method="segment")
        _, kept = apply(tokens[:, :5], Memory.empty(config, 2))
        return jnp.sum(apply(tokens[:, 5:], kept)[0].tokens[0, position - 5] ** 2)

    gradient = jax.jit(jax.grad(last), static_argnums=(1, 2))
    for memory, seen in ((False, range(8)), (True, range(5, 8))):
        table = np.asarray(gradient(params, 7, memory)["embedding"]["table0"])
        assert np.flatnonzero(np.abs(table).max(axis=1) > 0).tolist() == list(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        AdaptiveConfig(WORDS, (10, 25), embed_dim=16, shrink=2, tied_projections=(False, True, True)),
        AdaptiveConfig(WORDS, (10, 25), embed_dim=12, shrink=1, tied=False, tied_projections=()),
        AdaptiveConfig(WORDS, (), embed_dim=16, shrink=1),
    ],
    ids=["shrinking", "one_table", "one_cluster"],
)
def test_probabilities_of_words_are_those_of_clusters_times_those_within(words: AdaptiveConfig):
    config = dataclasses.replace(XL, words=words)
    model, tokens, start = NextWord(config), tokens_of(2, 4), Memory.empty(config, 2)
    params = draw(model, tokens, start)
    found, encoded, _ = jax.jit(model.apply)({"params": params}, tokens, start)
    assert found.shape == (2, 4, WORDS)
    assert_close(np.exp(np.asarray(found, np.float64)).sum(-1), np.ones((2, 4)))
    assert ("project0" in params["words"]) == words.projects(16)
    assert ("project1" in params["words"]) == (words.projects(16) and not words.shares_projection(1))
    # By hand, from the arrays.
    own, table = params["words"], params["encoder"]["embedding"]
    tables = own if not words.tied else table
    bounds, scores = words.bounds, []
    for i, (start_of, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = tables[f"table{i}"] if words.shrink > 1 else tables["table0"][start_of:end]
        bias = own[f"bias{i}"] if words.shrink > 1 else own["bias0"][start_of:end]
        hidden = np.asarray(encoded.tokens)
        if words.projects(16):
            projections = own if f"project{i}" in own else table
            hidden = hidden @ projections[f"project{i}"].T
        if i == 0 and words.cutoffs:
            rows, bias = np.concatenate([rows, own["clusters"]]), np.concatenate([bias, own["clusters_bias"]])
        scores.append(np.asarray(jax.nn.log_softmax(hidden @ rows.T + bias)))
    expected = [scores[0][..., : bounds[1]]]
    expected += [scores[0][..., bounds[1] + i, None] + tail for i, tail in enumerate(scores[1:])]
    assert_close(found, np.concatenate(expected, axis=-1))


# (options of the published config, names that a checkpoint of it lacks and has)
PUBLISHED = {
    "shrinking": ({}, ("transformer.r_w_bias", "crit.out_layers.0.weight"), ("crit.out_projs.0",)),
    "one_table": (
        {"div_val": 1, "d_embed": 12, "tie_projs": [False, True, False]},
        ("crit.out_projs.1", "crit.out_layers.1.bias", "transformer.word_emb.emb_projs.1"),
        (
            "crit.out_projs.0",
            "crit.out_projs.2",
            "transformer.word_emb.emb_projs.0",
            "crit.out_layers.0.bias",
        ),
    ),
    "plain": (
        {"div_val": 1, "cutoffs": [], "untie_r": False, "tie_word_embeddings": False, "tie_projs": [False]},
        ("transformer.word_emb.emb_projs.0", "crit.cluster_weight", "transformer.layers.1.dec_attn.r_w_bias"),
        ("crit.out_layers.0.weight", "transformer.r_w_bias", "transformer.r_r_bias"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_option_of_a_published_transformer_xl_has_its_tensors(name: str):
    options, lacks, has = PUBLISHED[name]
    fields = {
        **{"vocab_size": WORDS, "cutoffs": [10, 25], "d_model": 16, "d_embed": 16, "n_head": 2, "d_head": 8},
        **{"d_inner": 24, "div_val": 2, "n_layer": 2, "mem_len": 4, **options},
    }
    config = transformer_xl.read_transformer_xl(fields)
    tree = draw(NextWord(config), tokens_of(1, 3), Memory.empty(config, 1))
    shapes = {path: leaf.shape for path, leaf in params_lib.flatten(tree).items()}
    plan = rules.plan(transformer_xl.next_word_rules(config, has), shapes)
    written = dict(rules.export(plan, tree))
    assert not plan.problems and not set(lacks) & set(written) and set(has) <= set(written)
    assert written["transformer.layers.0.dec_attn.qkv_net.weight"].shape == (48, 16)
    again = rules.read(plan, written, jax.eval_shape(lambda: tree))
    jax.tree.map(np.testing.assert_array_equal, again, tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 0, "same_length": True}, "same_length=True needs a memory"),
        ({"embed_dim": 15}, "embed_dim=15: must be even"),
        ({"memory": -1}, "memory=-1"),
    ],
)
def test_a_memory_that_makes_no_sense_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(XL, **change)
    with pytest.raises(ValueError, match=r"cutoffs=\(10, 5\) must be ascending"):
        AdaptiveConfig(WORDS, (10, 5))


# Published weights for a tower.


def tower(encoder: Any) -> JointConfig:
    head = Classification(("a", "b"), stream="text")
    return JointConfig((Tower("text", encoder, "tokens"),), (head,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "transfo_xl"])
def test_a_tower_begins_with_a_published_encoder(kind: str, oracles: Path):
    folder = oracles / "hf" / kind
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    read = {"bert": bert.read_bert, "transfo_xl": transformer_xl.read_transformer_xl}[kind]
    model = tower(dataclasses.replace(read(read_config(folder)), max_length=10))
    layout = plan_layout(model, model.smallest_batch(1), make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    blank = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.125, leaf.dtype), layout.params)
    found = parts.load(Variables(blank, {}, {}), layout, parts.find(model, (("text", str(folder)),)))
    weights = open_weights(folder)
    flat = params_lib.flatten(found.params)
    assert not any(np.all(leaf == 0.125) for path, leaf in flat.items() if path.startswith("text/"))
    if kind == "bert":
        positions = weights["bert.embeddings.position_embeddings.weight"]
        np.testing.assert_array_equal(flat["text/positions"], positions[:10])
    else:
        table = weights["transformer.word_emb.emb_layers.1.weight"]
        np.testing.assert_array_equal(flat["text/embedding/table1"], table)
    other = tower(dataclasses.replace(model.towers[0].encoder, mlp_dim=7))
    with pytest.raises(ValueError, match="'text' has mlp_dim=7, the "):
        parts.find(other, (("text", str(folder)),))
