"""Speech: wav2vec 2.0 on waveforms, transcripts by connectionist temporal classification, and their rates."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vl_jax import params as params_lib
from vl_jax.batch import Given
from vl_jax.data.sample import BadSample, Sample
from vl_jax.encoders.sound.wav2vec2 import Wav2Vec2Config, normalized
from vl_jax.encoders.sound.wave_features import WaveFeaturesConfig
from vl_jax.evaluate.task import Examinee
from vl_jax.evaluate.tasks.transcripts import Transcripts
from vl_jax.fusion.streams import Stream
from vl_jax.heads.edits import edit_distances
from vl_jax.heads.transcript import SymbolScores, Transcript, row_losses

assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)

FEATURES = WaveFeaturesConfig((6, 8), (5, 3), (3, 2), norm="each")
SPEECH = Wav2Vec2Config(
    FEATURES,
    embed_dim=16,
    mlp_dim=24,
    num_layers=2,
    num_heads=2,
    norms_follow=False,
    position_kernel=4,
    position_groups=2,
    max_samples=100,
)
LENGTHS = np.array([100, 71, 8])


@functools.cache
def make(config: Wav2Vec2Config) -> Any:
    """Random parameters, none of them at its initial constant."""
    module, waves = config.build("float32"), jnp.zeros((1, 40))
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), waves)["params"]))
    random = np.random.default_rng(1)

    def one(path: str, leaf: Any) -> np.ndarray:
        value = 0.3 * random.standard_normal(leaf.shape).astype(np.float32)
        return value + np.float32(path.endswith(("scale", "magnitude")))

    return params_lib.map_paths(one, shapes)


@functools.cache
def program(config: Wav2Vec2Config) -> Any:
    return jax.jit(config.build("float32").apply)


def encode(config: Wav2Vec2Config, waves: Any, valid: Any = None) -> Any:
    return program(config)({"params": make(config)}, waves, valid)


def sounds(rows: int = 3, length: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, length)).astype(np.float32)


# The encoder.


@pytest.mark.parametrize("samples", [0, 8, 10, 11, 16, 17, 100])
def test_frames_are_those_whose_samples_are_all_there(samples: int):
    """Convolution by convolution; one frame of the last sees 5 + 2 * 3 samples, and comes every 6."""
    assert (FEATURES.span, FEATURES.stride) == (11, 6)
    length = samples
    for kernel, stride in zip(FEATURES.kernels, FEATURES.strides, strict=True):
        length = max((length - kernel) // stride + 1, 0)
    assert FEATURES.frames(samples) == length
    published = WaveFeaturesConfig()
    assert (published.span, published.stride, published.frames(16_000)) == (400, 320, 49)


@pytest.mark.slow
@pytest.mark.parametrize("follow", [False, True])
def test_padding_never_changes_what_a_real_frame_becomes(follow: bool):
    config = dataclasses.replace(SPEECH, norms_follow=follow)
    waves, valid = sounds(), np.arange(100) < LENGTHS[:, None]
    found = encode(config, waves, valid)
    assert np.asarray(found.mask).sum(1).tolist() == [FEATURES.frames(int(n)) for n in LENGTHS] == [15, 11, 0]
    noisy = np.where(valid, waves, sounds(seed=1))
    again = encode(config, noisy, valid)
    assert_close(again.tokens[found.mask], found.tokens[found.mask])
    alone = encode(config, waves[1:2, :71])
    assert alone.tokens.shape == (1, 11, 16) and np.asarray(alone.mask).all()
    assert_close(alone.tokens[0], found.tokens[1, :11])
    assert np.isfinite(found.tokens).all()
    # In another order of rows.
    turned = encode(config, waves[::-1].copy(), valid[::-1].copy())
    assert_close(turned.tokens[::-1], found.tokens)


def test_loudness_and_offset_are_taken_away_from_what_is_there():
    waves, valid = sounds(), np.arange(100) < LENGTHS[:, None]
    plain = normalized(jnp.asarray(waves), jnp.asarray(valid))
    assert_close(normalized(jnp.asarray(3 * waves + 2), jnp.asarray(valid)), plain)
    for row, length in enumerate(LENGTHS):
        mean, std = waves[row, :length].mean(), waves[row, :length].std()
        assert_close(plain[row, :length], (waves[row, :length] - mean) / std)
        assert not np.any(plain[row, length:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_groups": 3}, "embed_dim=16 is not a multiple of position_groups=3"),
        ({"max_samples": 10}, "max_samples=10 must be at least the 11 that a frame sees"),
        ({"num_layers": 0}, "num_layers=0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEECH, **options)
    with pytest.raises(ValueError, match="expected one number >= 1 of each"):
        WaveFeaturesConfig((6, 8), (5,), (3, 2))


# Transcripts.

HEAD = Transcript(("", "a", "b"), max_length=3)


def likelihood(scores: np.ndarray, text: list[int]) -> float:
    """Over all ways to stretch the text over the tokens, tried one by one."""
    shares, total = np.asarray(jax.nn.softmax(scores)), 0.0
    for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        merged = [s for s, _ in itertools.groupby(path)]
        if [s for s in merged if s] == text:
            total += np.prod([shares[t, s] for t, s in enumerate(path)])
    return float(-np.log(total))


@pytest.mark.slow
def test_the_loss_sums_over_all_ways_to_stretch_a_text():
    scores = np.random.default_rng(0).normal(size=(5, 5, 3)).astype(np.float32)
    texts = [[1], [1, 1], [2, 1, 2], [], [1, 1, 1]]
    lengths = [5, 4, 3, 2, 4]  # the last needs five tokens, two of them blank
    labels = np.array([(t + [-1] * 3)[:3] for t in texts], np.int32)
    said = SymbolScores(jnp.asarray(scores), jnp.arange(5) < jnp.array(lengths)[:, None])
    expected = [likelihood(s[:n], t) for s, n, t in zip(scores[:4], lengths, texts, strict=False)]
    losses = row_losses(said, jnp.asarray(labels), blank=0)
    np.testing.assert_allclose(losses, [*expected, 0.0], rtol=1e-5, atol=1e-5)
    # What is no token, and rows without a label, add nothing.
    present = np.array([True, False, True, True, True])
    loss, metrics = HEAD.sums(said, Given(jnp.asarray(labels), jnp.asarray(present)))
    np.testing.assert_allclose(loss, expected[0] + expected[2] / 3 + expected[3], rtol=1e-5)
    other = scores + 9 * (np.arange(5) >= np.array(lengths)[:, None])[..., None] * scores[::-1]
    moved = row_losses(SymbolScores(jnp.asarray(other), said.mask), jnp.asarray(labels), blank=0)
    np.testing.assert_allclose(moved, losses, rtol=1e-6)

    def total(scores: Any) -> Any:
        return jnp.sum(row_losses(SymbolScores(scores, said.mask), jnp.asarray(labels), blank=0))

    gradient = jax.grad(total)
    assert np.isfinite(gradient(said.scores)).all() and metrics["cer"] >= 0


def distance(a: list[int], b: list[int]) -> int:
    """Levenshtein's, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    changed = distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(changed, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


@pytest.mark.slow
def test_edits_are_counted_as_by_their_definition():
    random = np.random.default_rng(0)
    said, texts = (random.integers(-1, 3, (40, n)).astype(np.int32) for n in (6, 5))
    texts[np.arange(5) >= random.integers(0, 6, (40, 1))] = -1
    texts[:, 0] = np.where((texts[:, 0] < 0) & (texts[:, 1] >= 0), 0, texts[:, 0])
    for row in texts:  # nothing stands behind the end of a text
        end = int(np.argmax(np.append(row, -1) < 0))
        row[end:] = -1
    found = edit_distances(jnp.asarray(said), jnp.asarray(texts), none=-1)
    pairs = [[[s for s in row if s >= 0] for row in pair] for pair in zip(said, texts, strict=True)]
    expected = [distance(a, b) for a, b in pairs]
    np.testing.assert_array_equal(found, expected)


def test_repeats_are_merged_and_blanks_and_what_is_no_token_dropped():
    path = np.array([1, 1, 0, 1, 2, 2, 1, 2])
    said = SymbolScores(np.eye(3, dtype=np.float32)[path], np.arange(8) < 7)
    assert HEAD.decode(said) == "aaba"
    label = Given(jnp.array([[1, 1, 2]]), jnp.array([True]))
    batched = SymbolScores(jnp.asarray(said.scores)[None], jnp.asarray(said.mask)[None])
    _, metrics = HEAD.sums(batched, label)
    np.testing.assert_allclose(metrics["cer"], 1 / 3)  # one letter too many


def sample(text: Any) -> Sample:
    return Sample("s", (), labels={} if text is None else {"transcript": text})


def test_texts_become_symbols_and_come_back():
    head = Transcript(max_length=8)
    label = head.read(sample("It's on"))
    assert label is not None and label.dtype == np.int32 and label[-1] == -1
    assert head.text_of(label) == "it's on"
    assert head.read(sample(None)) is None
    upper = Transcript(("|", "A", "B"), blank=0, max_length=4)
    np.testing.assert_array_equal(upper.read(sample("aB")), [1, 2, -1, -1])
    for text, reason in ((3, "bad_label"), ("much too long", "label_too_long"), ("a-b", "unknown_symbol")):
        with pytest.raises(BadSample, match=reason):
            head.read(sample(text))


@dataclasses.dataclass(frozen=True)
class OneHead:
    def head(self, name: str) -> Transcript:
        return HEAD


class Says(nn.Module):
    config: OneHead


class Heard(Examinee):
    """Of three sounds the second has no text; "ab" is heard as such, "bbb" as "b"."""

    def samples(self) -> Any:
        values = np.array([[1, 2, -1], [-1, -1, -1], [2, 2, 2]], np.int32)
        records = [
            {"id": str(i), "question": "", "image": None, "labels": {"language": "en"}} for i in range(3)
        ]
        label = Given(values, np.array([True, False, True]))
        yield records, SimpleNamespace(labels={"transcript": label})

    def apply(self, compiled: Any, batch: Any) -> SymbolScores:
        paths = np.array([[1, 1, 2, 0], [1, 0, 0, 0], [2, 2, 2, 2]])
        return SymbolScores(np.eye(3, dtype=np.float32)[paths], np.ones((3, 4), bool))


def test_what_is_heard_is_judged_by_letters_and_by_words():
    pytest.importorskip("jiwer")
    examinee = object.__new__(Heard)
    object.__setattr__(examinee, "layout", SimpleNamespace(model=Says(OneHead())))
    records, findings = [], None
    run = Transcripts().run(examinee)
    while findings is None:
        try:
            records.append(next(run))
        except StopIteration as stopped:
            findings = stopped.value
    assert [(r["answer"], r["prediction"], r["correct"]) for r in records] == [
        ("ab", "ab", True),
        ("bbb", "b", False),
    ]
    # Two letters of five are missing; one word of two is another.
    assert findings.scores == {"cer": 0.4, "wer": 0.5, "count": 2}
    assert findings.groups["language"]["en"] == findings.scores
    with pytest.raises(ValueError, match="headline='bleu': expected one of cer, wer"):
        Transcripts(headline="bleu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blank": 3}, "blank=3 of head 'transcript' must be one of its symbols"),
        ({"symbols": ("", "a", "a")}, "have 'a' twice"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_heads_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HEAD, **options)


def say(text: str) -> np.ndarray:
    """A tone for each letter, 200 samples in all."""
    pitch, each = {"a": 0.2, "b": 1.3}, 200 // len(text)
    return np.sin(np.concatenate([pitch[letter] * np.arange(each) for letter in text]))


@pytest.mark.slow
def test_a_tower_and_a_head_learn_to_write_down_what_is_said():
    """Two words of two letters: after some steps they are heard, at another loudness too."""
    config = dataclasses.replace(SPEECH, max_samples=200, num_layers=1)
    tower, head = config.build("float32"), HEAD.build()
    waves = jnp.asarray(np.stack([say("ab"), say("ba")]) + 0.01 * sounds(2, 200), jnp.float32)
    label = Given(jnp.array([[1, 2, -1], [2, 1, -1]]), jnp.array([True, True]))

    def scores(params: Any, waves: Any) -> SymbolScores:
        encoded = tower.apply({"params": params["sound"]}, waves)
        return head.apply({"params": params["head"]}, {"sound": Stream(encoded.tokens, encoded.mask)})

    stream = {"sound": Stream(jnp.zeros((1, 4, 16)), jnp.ones((1, 4), bool))}
    params = {
        "sound": nn.meta.unbox(jax.jit(tower.init)(jax.random.key(0), waves))["params"],
        "head": nn.meta.unbox(head.init(jax.random.key(1), stream))["params"],
    }
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda p: HEAD.sums(scores(p, waves), label)[0])(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # as the optimiser needs it
        for _ in range(300):
            params, state = step(params, state)
    said = jax.jit(scores)(params, 0.5 * waves)
    heard = [HEAD.decode(jax.tree.map(lambda x, i=i: np.asarray(x[i]), said)) for i in range(2)]
    assert heard == ["ab", "ba"]
