"""Batches of packed rows: nothing lost or repeated, resumed on any number of hosts, as samples alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import random
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image as PilImage

from vl_jax import config as config_lib
from vl_jax import schema
from vl_jax.data import encode
from vl_jax.data.config import ConversationConfig, DataConfig, LoadingConfig, ModelSpec, PackingConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import LlavaConfig, ScenesConfig, open_source
from vl_jax.data.stream import padding as padding_lib
from vl_jax.data.stream.packed import PackedIterator, open_planner
from vl_jax.data.stream.plan import Cursor
from vl_jax.model import VisionLanguage
from vl_jax.moe.config import BalanceConfig, CapacityConfig
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.step import TrainState

SPEC = ModelSpec(tile_tokens_side=2, fusion="prefix", vocab_size=2048)
CONFIG = DataConfig(
    sources=(ScenesConfig("a", num_examples=30), ScenesConfig("b", num_examples=20, seed=5)),
    max_tokens=100,
    max_answer_tokens=30,
    conversation=ConversationConfig(max_turns=3, turn_sampling="balanced"),
    image_dropout_rate=0.2,
    tiling=TilingConfig(tile_size=32, views="global"),
    packing=PackingConfig(max_tokens=200, max_tiles=5, max_answer_tokens=60, window=40),
)


@pytest.fixture(autouse=True, scope="module")
def one_tokenizer():
    """The vocabulary is read once, and not for every iterator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "load_tokenizer", functools.cache(encode.load_tokenizer))
        yield


def take(batches, count):
    result = [next(batches) for _ in range(count)]
    batches.close()
    return result


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def texts(folder, count=80, bad=()):
    """Conversations without images, some of them unusable; quick to read."""
    records = []
    for i in range(count):
        messages = [{"from": "human", "value": f"Say {i}" * (1 + i % 3)}, {"from": "gpt", "value": f"{i}"}]
        records.append({"id": f"t{i}", "conversations": messages[: 1 if i in bad else 2]})
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    return dataclasses.replace(
        CONFIG, root=str(folder), sources=(LlavaConfig("text", "text.jsonl"),), image_dropout_rate=0.0
    )


def test_a_config_with_packing_survives_json():
    assert schema.from_json(schema.to_json(CONFIG), DataConfig) == CONFIG


@pytest.mark.parametrize("taken", [0, pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.slow
def test_resume_gives_the_very_batches_that_were_to_come(taken):
    first, second = (PackedIterator(CONFIG, SPEC, batch_size=2) for _ in range(2))
    for _ in range(taken):
        next(first)
    next(second)  # A used iterator must forget what it had prepared.
    second.set_state(json.loads(json.dumps(first.get_state())))
    for a, b in zip(take(first, 3), take(second, 3), strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_threads_and_prefetch_do_not_change_the_rows():
    other = dataclasses.replace(CONFIG, loading=LoadingConfig(num_threads=3, prefetch=5))
    rows, others = (take(PackedIterator(c, SPEC, batch_size=2), 3) for c in (CONFIG, other))
    for a, b in zip(rows, others, strict=True):
        assert_same(a, b)


def test_rows_are_what_the_plan_says():
    planner, _ = open_planner(CONFIG, SPEC)
    plan = planner.plan(planner.begin(Cursor()))
    batches = PackedIterator(CONFIG, SPEC, batch_size=3)
    for start in range(0, len(plan.rows) - 2, 3):
        batch = next(batches)
        for row, items in enumerate(plan.rows[start : start + 3]):
            lengths = np.bincount(batch.segment_ids[row])[1:]
            assert lengths.tolist() == [item.tokens for item in items]
            blind = [not (batch.visual_segment_ids[row] == 1 + i).any() for i in range(len(items))]
            assert blind == [item.blind for item in items]
            assert batches.ids[row] == [f"scene-{5 * (i.source == 'b')}-{i.record}" for i in items]
            turns = [
                len(set(batch.branch_ids[row][batch.segment_ids[row] == 1 + i])) for i in range(len(items))
            ]
            assert turns == [1 + len(item.turns) for item in items]
    batches.close()


class Hosts:
    """One global stream, read by several hosts that each fill their own rows."""

    def __init__(self, config, count, state=None):
        share = 8 // count
        rows = [range(h * share, (h + 1) * share) for h in range(count)]
        self.streams = [PackedIterator(config, SPEC, batch_size=8, rows=r) for r in rows]
        for stream in self.streams:
            if state is not None:
                stream.set_state(state)

    def step(self):
        batches = [next(stream) for stream in self.streams]
        share = 8 // len(self.streams)
        parts = [
            jax.tree.map(lambda x, h=h: x[h * share : (h + 1) * share], b) for h, b in enumerate(batches)
        ]
        assert all((b.segment_ids == batches[0].segment_ids).all() for b in batches)
        ids = [stream.ids[h * share : (h + 1) * share] for h, stream in enumerate(self.streams)]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts), sum(ids, [])

    def close(self):
        states = [stream.get_state() for stream in self.streams]
        for stream in self.streams:
            stream.close()
        assert all(state == states[0] for state in states)
        return json.loads(json.dumps(states[0]))


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_any_number_of_hosts_goes_on_with_the_same_rows(tmp_path, kills):
    config, chance = texts(tmp_path, bad={3, 40}), random.Random(0)
    row = PackingConfig(max_tokens=50, max_tiles=1, window=40, index=str(tmp_path / "index"))
    config = dataclasses.replace(config, max_tokens=40, packing=row, loading=LoadingConfig(prefetch=1))
    whole, state, read = Hosts(config, 1), None, []
    for _ in range(kills):
        hosts = Hosts(config, chance.choice([1, 2, 4, 8]), state)
        for _ in range(chance.randint(0, 3)):
            (batch, ids), (expected, same) = hosts.step(), whole.step()
            assert_same(batch, expected)
            assert ids == same
            read += [i for row in ids for i in row]
        state = hosts.close()
    assert state == whole.close()
    epochs = Counter(read)
    good = 78
    assert state["skipped"] == {"text/3": "bad_conversation", "text/40": "bad_conversation"}
    assert len(read) < good or set(epochs) == {f"t{i}" for i in range(80)} - {"t3", "t40"}
    # A window may begin an epoch's last rows before the first epoch's last are read, never two epochs apart.
    assert max(epochs.values()) - min(epochs.values() if len(epochs) == good else [0]) <= 2


def test_a_sample_that_breaks_later_leaves_its_place_empty(tmp_path, caplog):
    for i in range(12):
        PilImage.new("RGB", (30, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": f"p{i}", "image": f"{i}.png", "conversations": talk} for i in range(12)]
    (tmp_path / "p.json").write_text(json.dumps(records))
    row = dataclasses.replace(CONFIG.packing, index=str(tmp_path / "index"), window=12)
    source = LlavaConfig("p", "p.json")
    config = dataclasses.replace(CONFIG, root=str(tmp_path), sources=(source,), packing=row)
    sound = PackedIterator(config, SPEC, batch_size=2)
    first = [(next(sound), sound.ids) for _ in range(3)]
    sound.close()
    (tmp_path / "7.png").write_bytes(b"no picture")
    batches = PackedIterator(config, SPEC, batch_size=2)
    with caplog.at_level(logging.WARNING):
        second = [(next(batches), batches.ids) for _ in range(3)]
    batches.close()
    assert [[[i for i in row if i != "p7"] for row in ids] for _, ids in first] == [ids for _, ids in second]
    assert batches.skipped == {"corrupt_image": 1}
    assert sum("skipped p/7:" in r.getMessage() for r in caplog.records) == 1


def test_a_source_of_bad_samples_only_is_one_clear_error(tmp_path):
    batches = PackedIterator(texts(tmp_path, bad=range(80)), SPEC, batch_size=2)
    with pytest.raises(ValueError, match="'text': no usable record among 160 .*160 bad_conversation"):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversation": ConversationConfig("dialogue", max_turns=3)}, "packed dialogues are whole"),
        ({"max_tokens": 300}, "packing.max_tokens=200: must be at least max_tokens=300"),
        ({"max_answer_tokens": None}, "packing.max_answer_tokens=60: must be at least"),
    ],
)
def test_a_config_that_cannot_be_packed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"balance": BalanceConfig(scope="sequence")},
            "balance.scope='sequence': a packed row is no sequence",
        ),
        ({"scheme": "sinkhorn"}, "scheme='sinkhorn'.* would act on one another"),
        ({"limit": CapacityConfig(1.0, priority="gate")}, "limit.priority='gate'.* would act on one another"),
    ],
)
def test_routing_that_lets_packed_samples_act_on_one_another_is_refused(change, message):
    pytest.importorskip("ml_collections")  # experiment files return its ConfigDict
    experiment = config_lib.load(str(Path(__file__).with_name("tiny_experiment.py:packed")))
    moe = dataclasses.replace(experiment.model.moe, **change)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe))


def test_a_wrong_state_is_refused():
    batches = PackedIterator(CONFIG, SPEC, batch_size=2)
    with pytest.raises(ValueError, match="expected cursor and skipped"):
        batches.set_state({"next_index": 3, "skipped": {}})


def test_padding_is_predicted_as_it_comes():
    planner, _ = open_planner(CONFIG, SPEC)
    report = padding_lib.predict(planner, CONFIG)
    batches = PackedIterator(CONFIG, SPEC, batch_size=report.num_rows)
    (batch,) = take(batches, 1)
    assert report.packed.tokens == pytest.approx((batch.segment_ids == 0).mean())
    used = batch.tiles.any((2, 3, 4))
    assert report.packed.tiles == pytest.approx(1 - used.mean())
    assert report.num_samples == sum(map(len, batches.ids)) == 40
    assert report.unpacked.tokens == pytest.approx(
        1 - (batch.segment_ids > 0).sum() / (40 * CONFIG.max_tokens)
    )
    assert report.packed.tokens < report.unpacked.tokens and "40 samples" in str(report)


@pytest.mark.slow
def test_padding_of_the_shared_mixture_is_within_bounds(shared_data):
    folders = sorted(
        f.parent.name for f in shared_data.glob("*/train.json") if '"audio"' not in f.read_text()[:500]
    )
    config = DataConfig(
        root=str(shared_data),
        sources=tuple(LlavaConfig(name, f"{name}/train.json") for name in folders),
        max_tokens=1024,
        tiling=TilingConfig(tile_size=64, views="global"),
        max_tiles=2,
        packing=PackingConfig(max_tokens=2048, max_tiles=17, window=2048),
    )
    sizes = {s.name: float(len(open_source(s, root=config.root))) for s in config.sources}
    planner, _ = open_planner(config, dataclasses.replace(SPEC, tile_tokens_side=4), sources=sizes)
    report = padding_lib.predict(planner, config)
    print(report)
    assert report.packed.tokens < 0.05 and report.packed.tiles < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("fusion", tiny.FUSIONS)
def test_gradients_of_a_packed_row_are_those_of_its_samples_alone(fusion):
    model = tiny.config("top_k", fusion=fusion)
    moe = dataclasses.replace(model.moe, balance=BalanceConfig(weight=0.0))
    model = dataclasses.replace(model, moe=moe)
    params, state = tiny.build(model)
    examples = [tiny.example(5, fusion=fusion, text=5), tiny.example(6, fusion=fusion, text=6)]

    @jax.jit
    @jax.grad
    def gradient(p, batch):
        given = TrainState(0, p, None, state)
        return NextToken()(p, given, batch, model=VisionLanguage(model), rngs=None).losses["loss"]

    packed, separate = (
        gradient(params, jax.tree.map(jnp.asarray, tiny.batch(rows, fusion=fusion)))
        for rows in ([examples], [[e] for e in examples])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), packed, separate)
