"""Gates with a budget: what is left out, that it changes nothing, and that it is decided causally."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import sharding
from vl_jax.batch import Batch, without_blank_pictures
from vl_jax.benchmarks import gate as benchmark
from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.scenes import ScenesConfig
from vl_jax.evaluate.gates import GateUse
from vl_jax.fusion import skipping
from vl_jax.fusion.budget import BudgetConfig, Grain, budget_loss, decide, summarize
from vl_jax.fusion.gate import CrossModalGateConfig, SkippingGate
from vl_jax.fusion.towers import before_answers
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import prefill
from vl_jax.generation.generate import generate
from vl_jax.model import VisionLanguage, VisionLanguageConfig
from vl_jax.sharding import MeshConfig, make_mesh

GRAINS: tuple[Grain, ...] = ("sample", "layer", "token")
B, T, S, D = 8, 8, 4, 16


def gate_of(grain: Grain = "layer", **options: Any) -> SkippingGate:
    return SkippingGate(CrossModalGateConfig(2, 8, opens=False, budget=BudgetConfig(grain, **options)))


@functools.cache
def inputs(grain: Grain) -> tuple[Any, tuple[jax.Array, ...]]:
    """Parameters of a gate, and what it reads: rows 0 and 5 have nothing to look at."""
    random = np.random.default_rng(0)
    x, vision = (jnp.asarray(random.standard_normal((B, n, D), np.float32)) for n in (T, S))
    mask = jnp.ones((B, T, S), bool).at[jnp.array([0, 5])].set(False)
    logits = jnp.asarray([1.0, -1, 2, -3, 0.5, 1, -1, -1], jnp.float32)
    return gate_of(grain).init(jax.random.key(1), x, vision, mask, logits), (x, vision, mask, logits)


def looked(gate: SkippingGate, *arguments: Any, learning: bool = False) -> Any:
    variables, own = inputs(gate.config.budget.grain)  # type: ignore[union-attr]
    return jax.jit(functools.partial(gate.apply, learning=learning))(variables, *(arguments or own))


@pytest.mark.parametrize("grain", ["layer", "token"])
@pytest.mark.parametrize("buckets", [1, 4])
def test_what_is_computed_equals_the_gate_that_skips_nothing(grain, buckets):
    (found, decided), (whole, every) = (looked(gate_of(grain, buckets=n)) for n in (buckets, 0))
    np.testing.assert_allclose(found, whole, atol=1e-6, rtol=0)
    assert np.abs(whole).max() > 0.1 and not np.asarray(whole)[0].any()
    assert float(every.executed) == (B if grain == "layer" else B * T)
    if grain == "layer":  # open are rows 2 and 4: a quarter of them fits
        assert float(decided.open) == 2 and float(decided.rows) == 6
        assert float(decided.executed) == (2 if buckets == 4 else 8)
    else:
        assert float(decided.open) < float(decided.executed) <= B * T


@pytest.mark.parametrize(("open_rows", "executed"), [(0, 0), (1, 2), (2, 2), (3, 4), (6, 6), (7, 8), (8, 8)])
@pytest.mark.slow
def test_rows_are_computed_in_the_smallest_size_that_holds_them(open_rows, executed):
    ran: list[int] = []

    def compute(shared: jax.Array, rows: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: ran.append(len(rows)))
        return shared * rows

    is_open = np.roll(np.arange(8) < open_rows, 3)
    rows = np.arange(1.0, 9, dtype=np.float32)
    found, counted = skipping.open_rows(compute, jnp.asarray(is_open), 2.0, jnp.asarray(rows), buckets=4)
    jax.effects_barrier()
    np.testing.assert_array_equal(found, np.where(is_open, 2 * rows, 0))
    assert float(counted) == executed and ran == [executed] * (executed > 0)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows_have_few_sizes_and_always_one_that_holds_all(rows):
    assert skipping.sizes(rows, 4) == {1: (1,), 2: (1, 2), 5: (2, 3, 4, 5)}[rows]


@pytest.mark.parametrize("grain", ["layer", "token"])
@pytest.mark.slow
def test_eight_devices_decide_each_for_its_rows_and_give_what_one_gives(grain):
    whole, decided = looked(gate_of(grain))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices()[:8])
    with sharding.use_mesh(mesh):
        spread, counted = looked(gate_of(grain))
    np.testing.assert_allclose(spread, whole, atol=1e-6, rtol=0)
    assert float(counted.open) == float(decided.open)
    # Of four devices with two rows each, two have an open row (2, and 4); the others compute nothing.
    assert grain == "token" or float(counted.executed) == 2


@pytest.mark.slow
def test_tokens_decide_by_themselves_and_rows_by_themselves():
    _, (x, vision, mask, logits) = inputs("token")
    found = looked(gate_of("token"))[0]
    later = looked(gate_of("token"), x.at[:, 5:].add(3.0), vision, mask, logits)[0]
    np.testing.assert_allclose(later[:, :5], found[:, :5], atol=1e-6)
    assert np.abs(later[:, 5:] - found[:, 5:]).max() > 0.1
    alone = looked(gate_of("token"), x[:, :1], vision, mask[:, :1], logits)[0]
    np.testing.assert_allclose(alone, found[:, :1], atol=1e-6)
    found, other = (looked(gate_of("layer"), x, vision, mask, logits.at[2].set(n))[0] for n in (-1.0, 1.0))
    np.testing.assert_allclose(found[3:], other[3:], atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.slow
def test_training_computes_all_and_reaches_the_decision_of_a_closed_row(hard):
    gate, (variables, (x, vision, mask, logits)) = gate_of(hard=hard), inputs("layer")

    def total(logits: jax.Array) -> jax.Array:
        return jnp.sum(gate.apply(variables, x, vision, mask, logits, learning=True)[0] ** 2 + 1.0)  # type: ignore

    found, decided = looked(gate, learning=True)
    open_look, _ = looked(gate, x, vision, mask, jnp.full((B,), 50.0), learning=True)
    probability = 1 / (1 + np.exp(-np.asarray(logits)))
    value = (np.asarray(logits) >= 0) * 1.0 if hard else probability
    np.testing.assert_allclose(found, open_look * value[:, None, None], atol=1e-5)
    assert float(decided.executed) == B
    slopes = jax.grad(lambda z: jnp.sum(gate.apply(variables, x, vision, mask, z, learning=True)[0]))(logits)  # type: ignore
    assert not slopes[0] and np.all(np.asarray(slopes)[[1, 2, 3, 4, 6, 7]] != 0)


def test_hard_tokens_learn_by_rank_and_to_foretell_it():
    logits = jnp.asarray([[3.0, -1, 2, 1], [-4, -1, -2, -3]])
    able = jnp.asarray([[True, True, True, True], [True, True, True, False]])
    config = BudgetConfig("token", share=0.5, hard=True)
    opening = decide(logits, able, config, learning=True)
    np.testing.assert_array_equal(opening.is_open, [[True, False, True, False], [False, True, True, False]])
    np.testing.assert_array_equal(
        decide(logits, able, config, learning=False).is_open, [[True, False, True, True], [False] * 4]
    )
    exact = np.asarray(opening.is_open, np.float64)
    z = np.asarray(logits, np.float64)
    expected = ((np.log1p(np.exp(z)) - z * exact) * np.asarray(able)).sum() / 7
    np.testing.assert_allclose(budget_loss(opening.decided, config), expected, rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_loss_draws_the_open_share_to_its_budget(share):
    config = BudgetConfig("layer", share=share, weight=2.0)
    able = jnp.ones(4, bool)

    def loss(logits: jax.Array) -> jax.Array:
        return budget_loss(decide(logits, able, config, learning=True).decided, config)

    logits = np.asarray([3.0, -2.0, -2.5, -3.0])
    p = 1 / (1 + np.exp(-logits))
    expected = 2 * ((0.25 - share) ** 2 + np.mean(p * (1 - p)))
    np.testing.assert_allclose(loss(jnp.asarray(logits, jnp.float32)), expected, rtol=1e-5)
    nothing = decide(jnp.zeros(4), ~able, config, learning=True).decided
    assert float(budget_loss(nothing, config)) == 0


def test_figures_of_the_log_are_shares_of_rows_that_could_look():
    sums = {"rows": jnp.asarray([4.0, 4]), "open": jnp.asarray([4.0, 1]), "executed": jnp.asarray([4.0, 2])}
    sums |= {"loss": jnp.float32(0.6), "parts": jnp.float32(2), "tower": jnp.float32(5)}
    figures = summarize(sums)
    found = {name: round(float(value), 6) for name, value in figures.items()}
    assert found == {
        "gate/budget_loss": 0.3,
        "gate/open": 0.625,
        "gate/rows": 8,
        "gate/rows_executed": 6,
        "gate/tower_rows_executed": 5,
        "gate/open/layer_0": 1.0,
        "gate/open/layer_1": 0.25,
    }
    assert summarize({}) == {}


def test_rows_decide_by_what_stands_before_their_first_answer():
    batch = tiny.batch([[tiny.example(0, fusion="gated")], [tiny.example(1, fusion="gated", text=3)]])
    weights = np.zeros_like(batch.loss_weights)
    weights[0, 2] = 1.0
    words = np.asarray(before_answers(dataclasses.replace(batch, loss_weights=weights)))
    assert words[0].sum() == batch.target_index[0, 2] + 1
    np.testing.assert_array_equal(words[1], batch.segment_ids[1] > 0)
    assert not words[3].any()


@pytest.mark.parametrize(
    ("grain", "options", "said"),
    [
        ("layer", {}, "max_turns=1"),
        ("sample", {}, "would share one decision"),
        ("token", {}, None),
        ("layer", {"conversation": ConversationConfig(max_turns=1)}, None),
        ("layer", {"conversation": ConversationConfig(turns="dialogue")}, None),
    ],
)
def test_rows_of_several_questions_are_refused_where_a_row_decides(grain, options, said):
    data = DataConfig(
        sources=(ScenesConfig("scenes"),), tiling=TilingConfig(tile_size=tiny.TILE_SIZE), **options
    )
    if said is None:
        return model_of(grain).check_data(data)
    with pytest.raises(ValueError, match=said):
        model_of(grain).check_data(data)


@pytest.mark.parametrize("options", [{"share": 1.5}, {"share": -0.1}, {"weight": -1.0}, {"buckets": -1}])
def test_a_budget_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="budget"):
        BudgetConfig(**options)


def model_of(grain: Grain, **options: Any) -> VisionLanguageConfig:
    plain = tiny.config("top_k", fusion="gated")
    language = dataclasses.replace(plain.language, num_layers=2, num_dense_layers=2)
    gate = dataclasses.replace(plain.fusion.gate, budget=BudgetConfig(grain, **options))
    return dataclasses.replace(plain, language=language, fusion=dataclasses.replace(plain.fusion, gate=gate))


def prompts(*, pictures: bool = True) -> Batch:
    rows = [[tiny.example(i, fusion="gated", text=4 + 2 * i, tiles=int(pictures))] for i in range(4)]
    batch = tiny.batch(rows, fusion="gated", length=14, left=True)
    return dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))


@pytest.mark.slow
def test_text_alone_is_read_by_a_program_without_tower_adapter_and_gate():
    model = model_of("layer")
    params, state = tiny.build(model)
    batch = prompts(pictures=False)
    assert without_blank_pictures(prompts()).tiles.shape[1] == tiny.TILES

    def program(batch: Batch) -> str:
        """The names of the parts that each operation of the compiled program belongs to."""
        read = functools.partial(prefill, model=VisionLanguage(model), slots=16, chunk=None)
        text = jax.jit(read).lower(params, state, batch).compile().as_text() or ""
        return "\n".join(re.findall(r'op_name="([^"]*)"', text))

    text, whole = program(without_blank_pictures(batch)), program(batch)
    of_vision = ("encoder", "adapter", "gate", "looks")
    assert "dense_layers" in text and not [part for part in of_vision if part in text]
    assert all(part in whole for part in of_vision)


@pytest.mark.parametrize(
    "grain", [pytest.param(g, marks=[pytest.mark.slow] * (g != "layer")) for g in GRAINS]
)
@pytest.mark.slow
def test_answers_over_a_cache_are_those_of_the_whole_pass(grain):
    model, batch, new = model_of(grain), prompts(), 4
    params, state = tiny.build(model)
    config = GenerationConfig(max_new_tokens=new)
    written = generate(params, state, batch, model=VisionLanguage(model), config=config, stop=(-1,))
    written = np.asarray(written)
    longer = {k: np.pad(getattr(batch, k), ((0, 0), (0, new))) for k in tiny.SEQUENCE_FIELDS}
    grown = dataclasses.replace(batch, **longer)
    length = batch.tokens.shape[1]
    grown.visual_slot[:, length:] = -1
    grown.tokens[:, length:] = written
    grown.positions[:, length:] = grown.positions[:, length - 1 : length] + 1 + np.arange(new)
    grown.segment_ids[:, length:] = 1
    # The words of an answer are no part of what decides.
    first = np.zeros_like(grown.target_index)
    first[:, 0] = length - 1
    weights = np.zeros_like(grown.loss_weights)
    weights[:, 0] = 1.0
    grown = dataclasses.replace(grown, target_index=first, loss_weights=weights)
    logits = tiny.logits(model, grown)
    np.testing.assert_array_equal(written, logits[:, length - 1 : -1].argmax(-1))


def test_tables_say_how_open_gates_are_by_layer_kind_and_picture():
    use = GateUse(("kind", "modality"), what="samples")
    records = [{"kind": "colour"}, {"kind": "said"}, {"kind": "colour"}, {"kind": ""}]
    open_rows = np.asarray([[1.0, 0], [0, 0], [0, 0], [-1, -1], [1, 1]])  # the last is no record: padding
    use.update(records, (open_rows, np.asarray([2.0, 1]), np.asarray([4.0])), 5, 5)
    use.update([{"kind": "said"}], None, 5, 5)  # a batch without pictures: no gate was run
    tables = {table.row_name or table.rows[0]: table for table in use.matrices()}
    kinds = tables["kind of question"]
    assert kinds.rows == ("colour", "said") and kinds.columns == ("layer 0", "layer 1")
    np.testing.assert_allclose(kinds.values, [[0.5, 0], [0, 0]])
    pictures = tables["what the sample has"]
    assert pictures.rows == ("a picture", "no picture")
    np.testing.assert_allclose(pictures.values, [[1 / 3, 0], [0, 0]])
    np.testing.assert_allclose(tables["computed"].values, [[0.2, 0.1]])
    np.testing.assert_allclose(tables["read"].values, [[0.4]])
    assert GateUse(("kind",), what="samples").matrices() == ()


@pytest.mark.slow
def test_the_benchmark_counts_the_rows_that_a_budget_leaves(tmp_path, capsys):
    case = benchmark.Looks(rows=4, tokens=8, visual=2, width=8, num_heads=1, head_dim=4)
    found = benchmark.run(repeats=1, json_file=tmp_path / "gate.json", case=case)["measured"]
    for grain, most in (("layer", 4), ("token", 32)):
        shares = {name: figures["rows"] / most for name, figures in found[grain].items()}
        assert shares == {"0%": 0, "25%": 0.25, "50%": 0.5, "75%": 0.75, "100%": 1}
    assert (tmp_path / "gate.json").is_file() and "wall time" in capsys.readouterr().out
    with pytest.raises(ValueError, match="repeats=0"):
        benchmark.run(repeats=0)
