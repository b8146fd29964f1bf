"""Text to text: which tokens are read by what, in training rows, in packed ones and in generation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import config as config_lib
from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch, blank
from vl_jax.data.config import ConversationConfig, DataConfig, PackingConfig
from vl_jax.experiment import plan
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import Writer, decode
from vl_jax.generation.generate import generate, stream
from vl_jax.interop.pretrained import load_params, read_published
from vl_jax.interop.run_as import run_as
from vl_jax.language.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, SourceView, StackConfig
from vl_jax.language.text_to_text import DECODER, ENCODER, TextToText, TextToTextConfig, parts_of
from vl_jax.layout import Layout, plan_layout, put_batch
from vl_jax.model import VisionLanguage
from vl_jax.moe.config import BalanceConfig, CapacityConfig, SharedExpertsConfig
from vl_jax.moe.routing import SCHEMES, MoEConfig
from vl_jax.moe.stacks import init_state, update_state
from vl_jax.schema import from_json, to_json
from vl_jax.sharding import MeshConfig
from vl_jax.train.step import TrainState, gradients

VOCAB, T, Q, ROWS = 24, 12, 5, 4
MODEL = TextToTextConfig(
    network=EncoderDecoderConfig(
        vocab_size=VOCAB,
        embed_dim=8,
        mlp_dim=12,
        num_heads=2,
        head_dim=4,
        encoder=StackConfig(2, (1,)),
        decoder=StackConfig(2, (0,)),
        num_buckets=8,
        max_distance=10,
        tie_embeddings=False,
        route_padding=False,
    ),
    moe=MoEConfig(
        scheme="loss_free",
        num_experts=4,
        top_k=2,
        expert_dim=8,
        shared=SharedExpertsConfig(num=0),
        balance=BalanceConfig(weight=0.01),
    ),
)
# Sources and answers; a row of the batch is a list of them.
SHORT, LONG, OTHER = ((5, 9, 7, 20), (11, 3)), ((2, 6, 1, 8, 14), (4, 19, 16)), ((22, 12), (13, 10, 15))


def rows_of(*rows: Sequence[tuple[Sequence[int], Sequence[int]]], prompts: bool = False) -> Batch:
    """A batch: a source and its answer are a segment. Prompts have no answers, and stand at the right."""
    batch = blank({"T": T, "Q": Q, "S": 0, "M": 0, "h": 1, "w": 1, "c": 3}, ROWS)
    for row, pairs in enumerate(rows):
        at, targets = 0, 0
        for segment, (source, answer) in enumerate(pairs, 1):
            ids = [*source, *answer[:-1]] if not prompts else [*source]
            at = T - len(ids) if prompts else at
            here = slice(at, at + len(ids))
            batch.tokens[row, here], batch.segment_ids[row, here] = ids, segment
            batch.positions[row, here] = range(len(ids))
            if not prompts:
                of = slice(targets, targets + len(answer))
                batch.target_index[row, of] = range(at + len(source) - 1, here.stop)
                batch.targets[row, of], batch.loss_weights[row, of] = answer, 1
                targets = of.stop
            at = here.stop
    return batch


@functools.cache
def layout_of(model: TextToTextConfig, mesh: MeshConfig | None = None, devices: int = 1) -> Layout:
    chosen = sharding.make_mesh(mesh or MeshConfig(), devices=jax.devices()[:devices])
    return plan_layout(model, jax.tree.map(lambda x: np.concatenate([x, x]), rows_of()), chosen)


@functools.cache
def variables(model: TextToTextConfig = MODEL) -> tuple[Any, Any]:
    """Parameters and routing state that are none at their usual constant."""
    random = np.random.default_rng(0)

    def draw(path: str, leaf: Any) -> jax.Array:
        value = 0.4 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        return jnp.asarray(value)

    params = params_lib.map_paths(draw, layout_of(model).params)
    return params, {name: params_lib.map_paths(draw, of) for name, of in init_state(model.stacks).items()}


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: TextToTextConfig, params: Any, state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    network = model.build()
    hidden: Any = network.apply({"params": params}, batch, state)
    return hidden.hidden, network.apply({"params": params}, hidden.hidden, method="logits")  # type: ignore[return-value]


def run(batch: Batch, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits of the shared model."""
    own, state = variables()
    return jax.device_get(_hidden(MODEL, own if params is None else params, state, batch))


# Which tokens are read by what.


def test_a_segment_is_cut_at_its_first_target_and_padding_belongs_to_nothing():
    batch = rows_of([SHORT, OTHER], [LONG])
    batch.loss_weights[1, 0] = 0  # no target: the second token of the answer is the first
    parts = parts_of(jax.tree.map(jnp.asarray, batch))
    #                                  SHORT      OTHER     padding
    assert "".join("ab"[int(x)] for x in parts.source[0]) == "bbbba" + "bbaa" + "aaa"
    assert "".join("ab"[int(x)] for x in parts.written[0]) == "aaabb" + "abbb" + "aaa"
    assert parts.source[1].tolist() == [True] * 6 + [False] * 6
    assert parts.written[1].tolist() == [False] * 5 + [True] * 2 + [False] * 5
    assert not (parts.source | parts.written)[2:].any()


def test_a_prompt_is_all_source_and_its_last_token_begins_the_answer():
    parts = parts_of(jax.tree.map(jnp.asarray, rows_of([SHORT], [LONG], prompts=True)))
    assert [int(row.sum()) for row in parts.source] == [4, 5, 0, 0]
    assert [np.flatnonzero(row).tolist() for row in parts.written] == [[T - 1], [T - 1], [], []]


@pytest.mark.slow
def test_nothing_but_the_own_source_and_the_answer_so_far_reaches_a_prediction():
    """By gradients: every token of the batch is another one, so tables tell positions apart."""
    batch = rows_of([SHORT, OTHER], [LONG])
    params, state = variables()
    probe = np.random.default_rng(1).standard_normal(MODEL.network.embed_dim, np.float32)

    def predicted(params: Any, column: jax.Array) -> jax.Array:
        output: Any = MODEL.build().apply({"params": params}, batch, state)
        return output.hidden[0, column] @ probe

    reached = {}
    by = jax.jit(jax.grad(predicted))
    for column in (3, 4, 7):
        found = jax.device_get(by(params, column))
        reached[column] = {
            name: set(np.flatnonzero(np.abs(found[f"{name}_embedding"]).sum(axis=1)).tolist())
            for name in ("source", "target")
        }
    own, (begins, then) = set(SHORT[0]), (SHORT[0][-1], SHORT[1][0])
    assert reached[3] == {"source": own, "target": {begins}}
    assert reached[4] == {"source": own, "target": {begins, then}}
    assert reached[7] == {"source": set(OTHER[0]), "target": {OTHER[0][-1], *OTHER[1][:-1]} - {OTHER[1][1]}}


@pytest.mark.slow
def test_packed_samples_predict_what_they_predict_alone():
    together, _ = run(rows_of([SHORT, OTHER], [LONG]))
    alone, _ = run(rows_of([SHORT], [OTHER], [LONG]))
    np.testing.assert_allclose(together[0, 3:5], alone[0, 3:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[0, 6:9], alone[1, 1:4], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_row_is_an_encoder_decoder_of_source_and_shifted_targets():
    """The start token replaces the last one of the source, in the decoder alone."""
    model = dataclasses.replace(MODEL, start_id=0)
    params, state = variables()
    batch = rows_of([LONG])
    found, _ = jax.device_get(_hidden(model, params, state, batch))
    source, read = jnp.asarray([LONG[0]]), jnp.asarray([[0, *LONG[1][:-1]]])
    network = EncoderDecoder(MODEL.network, MODEL.moe)

    def apart(network: EncoderDecoder) -> jax.Array:
        encoded, _ = network.encode(source, routing_state=state[ENCODER])
        seen = SourceView(jnp.ones((1, 1, source.shape[1]), bool), encoded)
        return network.decode(read, seen, routing_state=state[DECODER])[0]

    expected: Any = jax.jit(lambda params: network.apply({"params": params}, method=apart))(params)
    np.testing.assert_allclose(found[0, 4:7], expected[0], rtol=1e-4, atol=1e-5)


# Generation.


@pytest.mark.slow
def test_cached_generation_says_what_a_full_pass_says_and_reads_the_source_once():
    params, state = variables()
    prompts = jax.tree.map(jnp.asarray, rows_of([SHORT], [LONG], [OTHER], prompts=True))
    choice = GenerationConfig(max_new_tokens=4)
    options: dict[str, Any] = {"model": TextToText(MODEL), "config": choice, "stop": (-1,)}
    answers = np.asarray(generate(params, state, prompts, **options))[:3]
    pairs = [(of[0], answer.tolist()) for of, answer in zip((SHORT, LONG, OTHER), answers, strict=True)]
    full = rows_of(*([pair] for pair in pairs))
    _, logits = run(full)
    for row, (source, answer) in enumerate(pairs):
        assert logits[row, len(source) - 1 :].argmax(-1)[:4].tolist() == answer
    assert len({tuple(answer) for answer in answers.tolist()}) > 1, "the rows should differ"

    # A step of decoding needs no parameter of the encoder, nor what makes keys and values of the source.
    flat = params_lib.flatten(params)
    of_source = ("cross_attention/key", "cross_attention/value")
    unread = {path for path in flat if path.startswith("encoder/") or path.endswith(of_source)}
    assert len(unread) > 2
    rest = params_lib.unflatten({path: leaf for path, leaf in flat.items() if path not in unread})
    model = TextToText(MODEL)
    seen: Any = jax.eval_shape(lambda: model.apply({"params": params}, prompts, state, method="see"))[0]
    cache = dataclasses.replace(MODEL.init_cache(batch=ROWS, slots=4), empty=False)
    token = jnp.zeros(ROWS, jnp.int32)
    after = jax.eval_shape(
        lambda seen: decode(rest, state, prompts, seen, token, 1, cache, model=model)[0], seen
    )
    assert after.shape == (ROWS, VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"prefill_chunk": 2}])
def test_streams_and_beams_are_those_of_the_loop(options: dict[str, Any]):
    params, state = variables()
    prompts = jax.tree.map(jnp.asarray, rows_of([SHORT], [LONG], [OTHER], prompts=True))
    shared: dict[str, Any] = {"model": TextToText(MODEL), "stop": (7,)}
    choice = GenerationConfig(max_new_tokens=4, **options)
    whole = np.asarray(generate(params, state, prompts, config=choice, **shared))[:3]
    for index, ids in enumerate(stream(params, state, prompts, config=choice, **shared)):
        assert all(found in (None, expected) for found, expected in zip(ids, whole[:, index], strict=False))
    beams = dataclasses.replace(choice, num_beams=2, repetition_penalty=1.0)
    assert np.asarray(generate(params, state, prompts, config=beams, **shared)).shape == (ROWS, 4)


def test_models_that_write_text_are_known_by_what_they_have():
    assert isinstance(TextToText(MODEL), Writer) and isinstance(VisionLanguage(tiny.config()), Writer)
    assert not isinstance(EncoderDecoder(MODEL.network, MODEL.moe), Writer)


# Training.


@functools.cache
def results(
    model: TextToTextConfig = MODEL, mesh: MeshConfig | None = None, devices: int = 1, accumulation: int = 1
) -> tuple[Any, Any, Any]:
    """Gradients, losses and the routing state afterwards, on the host."""
    layout, (params, state) = layout_of(model, mesh, devices), variables()
    params = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), params, layout.params)
    state = jax.device_put(jax.tree.map(np.asarray, state), layout.replicated)
    one = rows_of([SHORT, OTHER], [LONG], [OTHER], [SHORT])
    batch = put_batch(jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), one), layout)

    @jax.jit
    def compute(params: Any, state: Any, batch: Any) -> Any:
        train = TrainState(step=0, params=params, optimizer=None, routing=state)
        options: dict[str, Any] = {"model": layout.model, "trainable": set(params_lib.flatten(params))}
        grads, metrics, sums = gradients(train, batch, accumulation=accumulation, **options)
        return grads, metrics, update_state(state, sums.stats, model.stacks)

    with sharding.use_mesh(layout.mesh, layout.rules):
        return jax.device_get(compute(params, state, batch))


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": MeshConfig(2, 2, 2, 1), "devices": 8},
        pytest.param({"mesh": MeshConfig(1, 4, 1, 2), "devices": 8}, marks=pytest.mark.slow),
        pytest.param({"accumulation": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"model": dataclasses.replace(MODEL, network=dataclasses.replace(MODEL.network, remat="full"))},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["eight devices", "tensor", "accumulation", "remat"],
)
@pytest.mark.slow
def test_gradients_losses_and_both_routing_states_do_not_depend_on_how_they_are_computed(
    options: dict[str, Any],
):
    found, expected = results(**options), results()
    # By norms, as single elements are sums of terms that cancel (see ``test_step.assert_same``).
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs) + 1e-5
    assert expected[2].keys() == {DECODER, ENCODER}
    before = variables()[1]
    for stack, state in expected[2].items():
        assert any(not np.array_equal(state[name], before[stack][name]) for name in state)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.slow
def test_every_scheme_routes_in_both_stacks(scheme: str):
    """Traced only: shapes, state and statistics of both stacks fit."""
    top_k = 1 if scheme == "switch" else 2
    limit = CapacityConfig(factor=None if scheme in ("soft_moe", "smear") else 2.0)
    moe = dataclasses.replace(MODEL.moe, scheme=scheme, top_k=top_k, limit=limit)
    model = dataclasses.replace(MODEL, moe=moe)
    batch, state = rows_of([SHORT], [LONG]), init_state(model.stacks)

    def step(key: jax.Array) -> Any:
        output: Any = model.build().init_with_output({"params": key, "routing": key}, batch, state)[0]
        stats = {name: routed.stats for name, routed in output.routed.items()}
        return stats, update_state(state, stats, model.stacks)

    stats, after = jax.eval_shape(step, jax.random.key(0))
    assert stats.keys() == {DECODER, ENCODER} and stats[DECODER].load.shape == (1, 2, 4)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


# Configurations.


def test_a_decoder_may_have_experts_of_its_own_and_a_model_none():
    own = dataclasses.replace(MODEL.moe, num_experts=2, top_k=1, scheme="top_k")
    model = dataclasses.replace(MODEL, decoder_moe=own)
    assert list(model.stacks) == [DECODER, ENCODER]
    assert model.stacks[DECODER].moe == model.decoding_moe == own and model.stacks[ENCODER].moe == MODEL.moe
    dense = dataclasses.replace(
        MODEL.network, encoder=StackConfig(1, ()), decoder=StackConfig(1, ()), tie_embeddings=True
    )
    model = dataclasses.replace(MODEL, network=dense)
    assert not model.stacks and model.decoding_moe is None
    assert from_json(to_json(model), TextToTextConfig) == model


def test_what_rows_cannot_hold_is_refused_before_anything_is_built():
    one = DataConfig(conversation=ConversationConfig(max_turns=1))
    MODEL.check_data(one)
    with pytest.raises(ValueError, match="max_turns=None: a text-to-text model reads one question"):
        MODEL.check_data(DataConfig())
    packed = dataclasses.replace(one, packing=PackingConfig())
    with pytest.raises(ValueError, match=r"model\.moe\.balance\.scope='sequence'"):
        MODEL.check_data(packed)
    batch_wide = dataclasses.replace(MODEL.moe, balance=BalanceConfig(scope="batch"))
    dataclasses.replace(MODEL, moe=batch_wide).check_data(packed)
    ahead = dataclasses.replace(batch_wide, limit=CapacityConfig(factor=1.0, priority="gate"))
    with pytest.raises(ValueError, match=r"model\.decoder_moe\.scheme='loss_free', limit\.priority='gate'"):
        dataclasses.replace(MODEL, moe=batch_wide, decoder_moe=ahead).check_data(packed)
    with pytest.raises(ValueError, match="start_id=24: must be from 0 to 23"):
        dataclasses.replace(MODEL, start_id=24)
    with pytest.raises(ValueError, match="route_padding=True"):
        dataclasses.replace(MODEL, network=EncoderDecoderConfig())


def test_targets_that_are_no_answers_are_refused():
    experiment = config_lib.load("translation")
    stage = dataclasses.replace(experiment.stages[0], targets="all")
    with pytest.raises(ValueError, match="stages.translate.targets=.all.: a row of this model can predict"):
        plan(dataclasses.replace(experiment, stages=(stage,)))


# Published weights.


@pytest.mark.slow
def test_a_published_switch_transformer_begins_a_run(oracles: Path):
    published = read_published(oracles / "hf" / "switch_transformers")
    ours = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, scheme="top_k"))
    model = run_as(published.config, ours)
    assert isinstance(model, TextToTextConfig) and model.start_id == 0
    assert model.moe.limit == ours.moe.limit and model.moe.num_experts == published.config.moe.num_experts
    layout = plan_layout(model, rows_of(), sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    params, state = load_params(published, layout)
    assert state == {DECODER: {}, ENCODER: {}}
    table = published.weights["shared.weight"]
    np.testing.assert_array_equal(params["embedding"], table)
    with pytest.raises(ValueError, match="a published TextToTextConfig cannot begin a VisionLanguageConfig"):
        run_as(published.config, tiny.config())
