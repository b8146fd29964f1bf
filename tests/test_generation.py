"""Generation: the loop equals repeated full passes; chunks, streams, samples and beams their definitions."""

from __future__ import annotations

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.batch import Batch
from vl_jax.generation.choice import GenerationConfig, choose, keep_likely
from vl_jax.generation.decode import warn_if_not_causal
from vl_jax.generation.generate import _step, answer_ids, generate, stream
from vl_jax.model import VisionLanguage
from vl_jax.moe.config import CapacityConfig

NEW = 8


def _prompts(fusion: str) -> Batch:
    """Left-padded prompts of different lengths, and a row that holds none."""
    rows = [[tiny.example(20 + i, fusion=fusion, text=3 + 3 * i)] for i in range(3)]
    return tiny.batch([*rows, []], fusion=fusion, length=16, left=True)


def _generate(model, batch: Batch, *, stop: int, function=generate, key=None, **options):
    params, state = tiny.build(model)
    config = GenerationConfig(**{"max_new_tokens": NEW, **options})
    network = VisionLanguage(model)
    return function(
        params, state, jax.tree.map(jnp.asarray, batch), key, model=network, config=config, stop=(stop,)
    )


@pytest.mark.parametrize(
    ("scheme", "fusion"),
    [("loss_free", "prefix"), pytest.param("top_k", "gated", marks=pytest.mark.slow)],
)
def test_greedy_generation_equals_the_argmax_of_repeated_full_passes(scheme, fusion):
    model, batch = tiny.config(scheme, fusion=fusion), _prompts(fusion)
    length, real = batch.tokens.shape[1], slice(0, 3)
    grown = batch.replace(**{k: np.pad(getattr(batch, k), ((0, 0), (0, 8))) for k in tiny.SEQUENCE_FIELDS})
    grown.visual_slot[:, length:] = -1
    expected = []
    for i in range(length, length + 8):
        expected.append(tiny.logits(model, grown)[:, i - 1].argmax(-1))
        grown.tokens[:, i] = expected[-1]
        grown.positions[:, i] = grown.positions[:, i - 1] + 1
        grown.segment_ids[real, i] = 1
    generated = np.asarray(_generate(model, batch, stop=-1))
    np.testing.assert_array_equal(generated[real], np.stack(expected, axis=1)[real])
    assert len({tuple(row) for row in generated[real]}) == 3, (
        "the rows should differ, or the test shows little"
    )


@pytest.mark.slow
def test_generation_ends_a_row_at_the_stop_token_and_leaves_the_others():
    model, batch = tiny.config(), _prompts("prefix")
    free = np.asarray(_generate(model, batch, stop=-1))
    stop = int(free[0, 2])
    stopped = np.asarray(_generate(model, batch, stop=stop))
    for row, expected in zip(stopped[:3], free[:3], strict=True):
        first = list(expected).index(stop) if stop in expected else 8
        np.testing.assert_array_equal(row[:first], expected[:first])
        np.testing.assert_array_equal(row[first:], stop)
    np.testing.assert_array_equal(stopped[3], stop)
    answers = answer_ids(stopped, stop=(stop,))
    assert answers[0] == list(free[0, : list(free[0]).index(stop)]) and answers[3] == []


@pytest.mark.parametrize(
    ("moe", "warns"),
    [
        ({"scheme": "loss_free"}, False),
        ({"scheme": "top_k", "limit": CapacityConfig(1.0)}, False),
        ({"scheme": "top_k", "limit": CapacityConfig(1.0, priority="gate")}, True),
        ({"scheme": "expert_choice"}, True),
    ],
)
def test_a_model_that_looks_ahead_warns_before_generating(moe, warns, caplog):
    with caplog.at_level(logging.WARNING):
        warn_if_not_causal(VisionLanguage(tiny.config(**moe)))
    assert bool(caplog.records) == warns


@pytest.mark.parametrize(
    ("scheme", "fusion", "chunk"),
    [
        ("loss_free", "prefix", 5),
        pytest.param("loss_free", "prefix", 1, marks=pytest.mark.slow),
        pytest.param("loss_free", "prefix", 40, marks=pytest.mark.slow),
        pytest.param("top_k", "gated", 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_prompt_read_in_chunks_gives_the_same_continuation(scheme, fusion, chunk):
    model, batch = tiny.config(scheme, fusion=fusion), _prompts(fusion)
    whole = _generate(model, batch, stop=-1)
    np.testing.assert_array_equal(_generate(model, batch, stop=-1, prefill_chunk=chunk)[:3], whole[:3])


@pytest.mark.slow
def test_streamed_tokens_are_those_of_the_compiled_loop():
    model, batch, key = tiny.config(), _prompts("prefix"), jax.random.key(3)
    options = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3}
    stop = int(_generate(model, batch, stop=-1, key=key, **options)[0, 2])
    whole = _generate(model, batch, stop=stop, key=key, **options)
    streamed = list(_generate(model, batch, stop=stop, key=key, function=stream, **options))
    for row, expected in enumerate(answer_ids(whole, stop=(stop,))):
        assert [tokens[row] for tokens in streamed if tokens[row] is not None] == expected


@pytest.mark.slow
def test_streaming_compiles_once_for_prompts_of_one_length_and_any_number_of_new_tokens():
    model, batch = tiny.config(), _prompts("prefix")
    step = _step(VisionLanguage(model), GenerationConfig(max_new_tokens=1))
    whole, compiled = np.asarray(_generate(model, batch, stop=-1))[:3], set()
    for new in (3, 6):
        streamed = list(_generate(model, batch, stop=-1, function=stream, max_new_tokens=new))
        np.testing.assert_array_equal([tokens[:3] for tokens in streamed], whole[:, :new].T)
        compiled.add(step._cache_size())
    assert len(compiled) == 1 and 0 not in compiled


def test_of_equal_logits_the_first_is_chosen():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [-1.0, -3.0, -1.0, -1.0], [jnp.nan, 0.0, 1.0, 0.0]])
    chosen = choose(logits, None, config=GenerationConfig())
    assert chosen.dtype == jnp.int32 and chosen[:2].tolist() == [1, 0]
    assert 0 <= int(chosen[2]) < 4  # no number has no place, but what comes out is a token


def test_a_repeated_token_is_penalised():
    config = GenerationConfig(repetition_penalty=2.0)
    logits = jnp.array([[3.0, 2.0, -1.0], [-1.0, -1.5, -4.0]])
    used = jnp.array([[True, False, False], [True, False, False]])
    assert choose(logits, None, used, config=config).tolist() == [1, 1]


@pytest.mark.slow
def test_sampling_follows_the_distribution_it_keeps():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    config = GenerationConfig(temperature=1.0, top_p=0.65)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda k: choose(logits[None], k, config=config)[0])(keys)
    share = np.bincount(np.asarray(drawn), minlength=4) / len(keys)
    np.testing.assert_allclose(share, [4 / 7, 3 / 7, 0, 0], atol=0.03)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-9, 9), min_size=2, max_size=9, unique=True), st.floats(0.05, 1), st.integers(1, 9)
)
def test_kept_tokens_are_the_fewest_likely_ones_that_hold_the_probability(values, top_p, top_k):
    logits = np.array(values, np.float64)
    order = np.argsort(-logits)[:top_k]
    probability = np.exp(logits[order]) / np.exp(logits[order]).sum()
    expected, total = set(), 0.0
    for token, p in zip(order, probability, strict=True):
        if abs(total - top_p) < 1e-5:
            return  # float32 may decide either way
        if total < top_p:
            expected.add(int(token))
        total += p
    config = GenerationConfig(temperature=1.0, top_p=top_p, top_k=top_k)
    of_one_size = np.full((1, 9), -np.inf, np.float32)  # or every number of values is a program of its own
    of_one_size[0, : len(values)] = logits
    kept = keep_likely(jnp.asarray(of_one_size), config)[0]
    assert set(np.flatnonzero(np.asarray(kept) > -1e30).tolist()) == expected


@pytest.mark.parametrize("penalty", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.slow
def test_enough_beams_find_the_best_of_all_continuations(penalty):
    model, batch = tiny.config(), _prompts("prefix")
    few, stop = 2, 5
    scores = _continuation_scores(model, batch, few)

    def value(row: int, tokens: tuple[int, ...]) -> float:
        return scores[row][tokens] / len(tokens) ** penalty

    every = [(stop,), *((a, b) for a, b in itertools.product(range(tiny.VOCAB), repeat=few) if a != stop)]
    found = _generate(
        model, batch, stop=stop, num_beams=tiny.VOCAB, length_penalty=penalty, max_new_tokens=few
    )
    for row in range(3):
        best = max(every, key=lambda tokens, row=row: value(row, tokens))
        assert tuple(found[row].tolist()) == (best + (stop,) * few)[:few]
    np.testing.assert_array_equal(found[3], stop)


def _continuation_scores(model, batch: Batch, length: int) -> list[dict[tuple[int, ...], float]]:
    """Log-probability of every continuation of one and two tokens, by full passes."""
    assert length == 2
    first = np.asarray(jax.nn.log_softmax(jnp.asarray(tiny.logits(model, batch)[:, -1])))
    grown = batch.replace(**{k: np.pad(getattr(batch, k), ((0, 0), (0, 1))) for k in tiny.SEQUENCE_FIELDS})
    grown.visual_slot[:, -1:] = -1
    grown.positions[:, -1] = batch.positions[:, -1] + 1
    grown.segment_ids[:3, -1] = 1
    scores: list[dict[tuple[int, ...], float]] = [{}, {}, {}]
    for token in range(tiny.VOCAB):
        grown.tokens[:, -1] = token
        second = np.asarray(jax.nn.log_softmax(jnp.asarray(tiny.logits(model, grown)[:, -1])))
        for row in range(3):
            scores[row][(token,)] = float(first[row, token])
            for other in range(tiny.VOCAB):
                scores[row][(token, other)] = float(first[row, token] + second[row, other])
    return scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"num_beams": 0}, "num_beams=0: must be at least 1"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams=2 needs temperature=0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**options)
