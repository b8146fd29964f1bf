"""Batches: what stands where, exact resume, skipping, mixtures, evaluation prompts and previews."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax import schema
from vl_jax.data.config import ConversationConfig, DataConfig, LoadingConfig, ModelSpec, find_source
from vl_jax.data.encode import make_encoder
from vl_jax.data.files.memory_cache import MemoryCache
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import Sample, Turn
from vl_jax.data.sources.build import LlavaConfig, ScenesConfig, open_source
from vl_jax.data.stream.evaluation_prompts import evaluation_prompts
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.data.text.turns import choose_turns
from vl_jax.data.tools.preview import render_samples, to_html, to_text

pytest.importorskip("grain")

WHOLE = TilingConfig(tile_size=32, views="global")
TILED = TilingConfig(tile_size=16, candidates=((1, 1), (2, 1), (1, 2)))
SPEC = ModelSpec(tile_tokens_side=2, fusion="prefix", vocab_size=2048)
CONFIG = DataConfig(
    sources=(ScenesConfig("a", num_examples=40), ScenesConfig("b", num_examples=40, seed=5)),
    evaluation=(ScenesConfig("held", num_examples=6, first=1000),),
    max_tokens=256,
    tiling=WHOLE,
    conversation=ConversationConfig(max_turns=3, turn_sampling="uniform"),
    image_dropout_rate=0.2,
)
FIELDS = [f.name for f in dataclasses.fields(next(TrainIterator(CONFIG, SPEC, batch_size=1)))]


def assert_same(a, b):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def take(batches, count):
    result = [next(batches) for _ in range(count)]
    batches.close()
    return result


def iterator(config=CONFIG, **options):
    return TrainIterator(config, SPEC, **{"batch_size": 4, **options})


def two_pictures(size=(40, 20)) -> Sample:
    def image():
        return PilImage.new("RGB", size, (9, 9, 9))

    return Sample("two", (Turn("<image>\n<image>\nSame?", "yes"), Turn("Sure?", "no")), (image, image))


def test_a_config_survives_json():
    assert schema.from_json(schema.to_json(CONFIG), DataConfig) == CONFIG


@pytest.mark.parametrize("fusion", ["prefix", "gated"])
def test_visual_tokens_stand_at_their_placeholders(fusion):
    encoder = make_encoder(
        dataclasses.replace(CONFIG, tiling=TILED, max_tiles=7), dataclasses.replace(SPEC, fusion=fusion)
    )
    example = encoder.example(two_pictures(), turns="independent")
    per_image = 2 * 3 + 1 + 2 * 5
    assert len(example.tiles) == 6 and len(example.visual_index) == 2 * per_image
    placeholders = np.flatnonzero(example.tokens == encoder.tokenizer.image)
    if fusion == "prefix":
        assert example.visual_slot[placeholders].tolist() == list(range(2 * per_image))
        assert example.visual_start.tolist() == placeholders.tolist()
    else:
        assert len(placeholders) == 2 and (example.visual_slot == -1).all()
        assert example.visual_start.tolist() == np.repeat(placeholders, per_image).tolist()
    tiles = example.visual_index[example.visual_index < 7 * 4] // 4
    assert set(tiles[: len(tiles) // 2]) == {0, 1, 2} and set(tiles[len(tiles) // 2 :]) == {3, 4, 5}


def sequence_of(batch, row, segment):
    """What a model reads of one segment: token and, where an image stands, the pixels behind it."""
    here = batch.segment_ids[row] == segment
    count = batch.tiles.shape[1] * 4
    seen = []
    for token, slot in zip(batch.tokens[row][here], batch.visual_slot[row][here], strict=True):
        source = batch.visual_index[row][slot] if slot >= 0 else -1
        if slot >= 0:
            assert batch.visual_segment_ids[row][slot] == segment
        kind = source - count if source >= count else batch.tiles[row, source // 4].sum() if slot >= 0 else 0
        seen.append((int(token), int(source % 4) if 0 <= source < count else -1, int(kind)))
    return seen


def predictions_of(batch, here: np.ndarray) -> list[tuple[int, int, float]]:
    """(place within the segment, target, weight) of every prediction of row 0 that ``here`` marks."""
    used = np.flatnonzero(batch.loss_weights[0])
    place = np.cumsum(here) - 1
    every = zip(batch.target_index[0][used], batch.targets[0][used], batch.loss_weights[0][used], strict=True)
    return [(int(place[i]), int(target), float(weight)) for i, target, weight in every if here[i]]


def test_packed_examples_read_the_same_as_separate_ones():
    encoder = make_encoder(dataclasses.replace(CONFIG, tiling=TILED, max_tiles=9, max_tokens=400), SPEC)
    source = open_source(CONFIG.sources[0])
    examples = [encoder.example(s, turns="independent") for s in (source[0], two_pictures(), source[1])]
    examples = [e for e in examples]
    packed = encoder.collate([examples[:2]])
    for segment, example in enumerate(examples[:2], start=1):
        alone = encoder.collate([[example]])
        assert sequence_of(packed, 0, segment) == sequence_of(alone, 0, 1)
        here, there = packed.segment_ids[0] == segment, alone.segment_ids[0] == 1
        for name in ("positions", "branch_ids"):
            np.testing.assert_array_equal(getattr(packed, name)[0][here], getattr(alone, name)[0][there])
        assert predictions_of(packed, here) == predictions_of(alone, there)
        starts = packed.visual_start[0][packed.visual_segment_ids[0] == segment]
        assert (
            packed.visual_slot[0][starts] == np.flatnonzero(packed.visual_segment_ids[0] == segment)
        ).all()
    with pytest.raises(ValueError, match="exceed the limits"):
        encoder.collate([examples * 3])


def test_padding_is_inert():
    (batch,) = take(iterator(), 1)
    pad = batch.segment_ids == 0
    assert pad.any() and (batch.visual_slot[pad] == -1).all()
    rows, predicted = np.nonzero(batch.loss_weights)
    assert not pad[rows, batch.target_index[rows, predicted]].any()
    unused = batch.visual_segment_ids == 0
    assert (batch.visual_index[unused] == -1).all() and (batch.visual_index[~unused] >= 0).all()


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    a, b, c = (take(iterator(seed=s), 3) for s in (1, 1, 2))
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)
    assert any((x.tokens != y.tokens).any() for x, y in zip(a, c, strict=True))


def test_threads_and_prefetch_do_not_change_the_batches():
    other = dataclasses.replace(CONFIG, loading=LoadingConfig(num_threads=2, prefetch=5))
    for x, y in zip(take(iterator(), 4), take(iterator(other), 4), strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("taken", [0, 1, 7, 25])
@pytest.mark.slow
def test_resume_gives_the_very_batches_that_were_to_come(taken):
    first = iterator()
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = iterator()
    next(second)  # A used iterator must forget what it had prepared.
    second.set_state(state)
    for x, y in zip(take(first, 3), take(second, 3), strict=True):
        assert_same(x, y)


def test_a_wrong_state_is_refused():
    with pytest.raises(ValueError, match="expected next_index and skipped"):
        iterator().set_state({"step": 3})


def test_every_record_is_drawn_once_an_epoch():
    batches = iterator(sources={"a": 1.0}, batch_size=8)
    ids = []
    for _ in range(10):
        next(batches)
        ids += [i for row in batches.ids for i in row]
    batches.close()
    assert len(set(ids[:40])) == 40 and sorted(ids[:40]) == sorted(ids[40:]) and ids[:40] != ids[40:]


@pytest.mark.slow
def test_a_mixture_respects_its_weights():
    batches = iterator(sources={"a": 3.0, "b": 1.0}, batch_size=20)
    counts = Counter()
    for _ in range(20):
        next(batches)
        counts.update(i.startswith("scene-0-") for row in batches.ids for i in row)
    batches.close()
    assert abs(counts[True] / 400 - 0.75) < 0.02


def talk(index: int, image: str):
    answer = "red" if index % 2 else "no"
    turns = [{"from": "human", "value": f"<image>\nnumber {index}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"r{index}", "image": image, "conversations": turns}


def write_records(folder, bad: set[int]):
    PilImage.new("RGB", (8, 8)).save(folder / "a.png")
    records = [talk(i, "absent.png" if i in bad else "a.png") for i in range(20)]
    (folder / "data.json").write_text(json.dumps(records))
    source = LlavaConfig("files", "data.json")
    return dataclasses.replace(
        CONFIG, root=str(folder), sources=(source,), evaluation=(dataclasses.replace(source, name="test"),)
    )


def ids_of(batches, count):
    ids = []
    for _ in range(count):
        next(batches)
        ids += [i for row in batches.ids for i in row]
    batches.close()
    return ids


def test_bad_samples_are_skipped_counted_and_logged_once_and_the_rest_keeps_its_order(tmp_path, caplog):
    good = ids_of(iterator(write_records(tmp_path, set())), 16)
    batches = iterator(write_records(tmp_path, {3, 11}))
    with caplog.at_level(logging.WARNING):
        ids = ids_of(batches, 14)
    assert ids == [i for i in good if i not in ("r3", "r11")][: len(ids)]
    assert batches.skipped == {"missing_image": 2}
    assert batches.skipped_records == {"files/3": "missing_image", "files/11": "missing_image"}
    for name in ("r3", "r11"):
        assert sum(f"sample {name} " in r.getMessage() for r in caplog.records) == 1


def test_the_account_of_skipped_records_is_part_of_the_state(tmp_path, caplog):
    config = write_records(tmp_path, {3, 11})
    first = iterator(config)
    ids_of(first, 6)
    second = iterator(config)
    second.set_state(json.loads(json.dumps(first.get_state())))
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert ids_of(first, 6) == ids_of(second, 6)
    assert second.get_state() == first.get_state() and not caplog.records


def test_a_source_of_bad_samples_only_is_one_clear_error(tmp_path):
    batches = iterator(write_records(tmp_path, set(range(20))))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="'files': no usable record among 40 .*40 missing_image.*first: sample"
        ):
            next(batches)
    batches.close()


def test_samples_that_need_too_much_room_are_skipped():
    encoder = make_encoder(dataclasses.replace(CONFIG, max_tiles=1), SPEC)
    with pytest.raises(ValueError, match="2 images in 2 tiles, limit 1"):
        encoder.example(two_pictures())
    with pytest.raises(ValueError, match="too_long"):
        make_encoder(dataclasses.replace(CONFIG, max_tokens=8, max_tiles=2), SPEC).prompt(two_pictures())


@pytest.mark.slow
def test_withheld_images_come_at_their_rate():
    config = dataclasses.replace(CONFIG, image_dropout_rate=0.3)
    batches = take(iterator(config, batch_size=50), 8)
    blind = np.concatenate([(b.visual_segment_ids == 0).all(1) for b in batches])
    assert abs(blind.mean() - 0.3) < 0.08
    assert all(not b.tiles[(b.visual_segment_ids == 0).all(1)].any() for b in batches)


def test_balanced_turns_take_every_answer_before_any_twice():
    answers = ["no", "yes", "no", "Red", "no", "yes", "no"]
    rng = np.random.default_rng(0)
    draws = [choose_turns(answers, rng=rng, max_turns=3, sampling="balanced") for _ in range(50)]
    assert all({answers[i] for i in d} == {"no", "yes", "Red"} for d in draws)
    assert len({i for d in draws for i in d}) == len(answers)
    assert sorted(choose_turns(answers, rng=rng, max_turns=None, sampling="balanced")) == list(range(7))
    assert choose_turns(answers, rng=rng, max_turns=3, sampling="first") == [0, 1, 2]


def test_prompts_are_every_question_alone_padded_on_the_left():
    encoder = make_encoder(CONFIG, SPEC)
    source = open_source(CONFIG.evaluation[0])
    expected = [
        (f"{s.id}/{k}", t.answer) for s in (source[i] for i in range(6)) for k, t in enumerate(s.turns)
    ]
    found = []
    for records, batch in evaluation_prompts(CONFIG, SPEC, "held", batch_size=4):
        assert batch.tokens.shape[0] == 4 and batch.tokens.shape[1] % 64 == 0
        for row, record in enumerate(records):
            found.append((record["id"], record["answer"]))
            real = batch.segment_ids[row] == 1
            assert real[-1] and (np.diff(real.astype(int)) >= 0).all()
            assert batch.positions[row][real].tolist() == list(range(real.sum()))
            text = encoder.tokenizer.decode(batch.tokens[row][real].tolist())
            assert text.endswith(f"\n{record['question']}\n\n<|Assistant|>:")
            assert (batch.visual_slot[row][real] >= 0).sum() == 6
        for row in range(len(records), 4):
            np.testing.assert_array_equal(batch.tokens[row], batch.tokens[len(records) - 1])
    assert found == expected


def test_blind_prompts_hold_no_image():
    seeing = evaluation_prompts(CONFIG, SPEC, "held", batch_size=4, limit=10, per_sample=2)
    blind = evaluation_prompts(CONFIG, SPEC, "held", batch_size=4, limit=10, per_sample=2, with_image=False)
    count = 0
    for (records, _), (others, batch) in zip(seeing, blind, strict=True):
        assert [r["id"] for r in records] == [r["id"] for r in others]
        assert all(r["image"] is None for r in others) and all(r["image"] for r in records)
        assert not batch.tiles.any() and (batch.visual_slot == -1).all()
        assert not (batch.tokens == make_encoder(CONFIG, SPEC).tokenizer.image).any()
        count += len(records)
    assert count == 10


def test_evaluation_passes_over_bad_samples(tmp_path):
    config = write_records(tmp_path, {0, 5})
    records = [r for rs, _ in evaluation_prompts(config, SPEC, "test", batch_size=7) for r in rs]
    assert [r["id"] for r in records] == [f"r{i}/0" for i in range(20) if i not in (0, 5)]
    assert {r["kind"] for r in records} == {"yes/no", "open"}


def test_previews_show_targets_images_and_reasons(tmp_path):
    config = write_records(tmp_path, {1})
    previews = render_samples(config, SPEC, "files", count=2)
    text, page = to_text(previews), to_html(previews)
    assert "{6 visual}" in text and "[[no<｜end▁of▁sentence｜>]]" in text and "missing_image" in text
    assert previews[0].num_targets == 2 and previews[0].tiles[0].size == (32, 32)
    assert 'class="target">no&lt;｜end' in page and "data:image/png;base64," in page and "http" not in page


@pytest.mark.parametrize(
    ("config", "bad", "message"),
    [
        (CONFIG, {"max_tokens": 0}, "max_tokens=0"),
        (CONFIG.loading, {"cache_mb": -1}, "cache_mb=-1: must not be negative"),
        (CONFIG.conversation, {"max_turns": 0}, "max_turns=0"),
        (CONFIG, {"image_dropout_rate": 2.0}, "image_dropout_rate=2.0"),
        (CONFIG, {"sources": (ScenesConfig("a"), ScenesConfig("a"))}, "must be different"),
    ],
)
def test_a_bad_field_is_named(config, bad, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **bad)


def test_unknown_sources_small_vocabularies_and_bad_weights_are_refused():
    with pytest.raises(ValueError, match="'c': not in the config; known: held, a, b"):
        find_source(CONFIG, "c")
    with pytest.raises(ValueError, match="vocab_size=100"):
        make_encoder(CONFIG, dataclasses.replace(SPEC, vocab_size=100))
    for weights in ({"c": 1.0}, {"a": 0.0}):
        with pytest.raises(ValueError, match="source"):
            iterator(sources=weights)


def picture_records(folder, count: int = 6):
    """Records about pictures of noise, each of them twice."""
    rng = np.random.default_rng(0)
    for i in range(count):
        levels = rng.integers(0, 256, (20, 30, 3), np.uint8)
        PilImage.fromarray(levels).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps([talk(i, f"{i % count}.png") for i in range(2 * count)]))
    source = LlavaConfig("files", "data.json")
    return dataclasses.replace(
        CONFIG, root=str(folder), sources=(source,), tiling=TILED, max_tiles=3, image_dropout_rate=0.0
    )


@pytest.mark.parametrize("augmentation", [None, AugmentationConfig(brightness=0.3, crop=0.2)])
@pytest.mark.parametrize("decoding", ["whole", "reduced"])
@pytest.mark.slow
def test_a_cache_changes_no_batch_and_nothing_is_opened_again(tmp_path, augmentation, decoding):
    config = dataclasses.replace(picture_records(tmp_path), augmentation=augmentation, decoding=decoding)
    plain = take(iterator(dataclasses.replace(config, loading=LoadingConfig(cache_mb=0))), 12)
    small = dataclasses.replace(config, loading=LoadingConfig(cache_mb=1))
    for x, y in zip(plain, take(iterator(small), 12), strict=True):
        assert_same(x, y)
    batches = iterator(small, batch_size=12)
    next(batches)
    if augmentation is None:
        for file in tmp_path.glob("*.png"):
            file.write_bytes(b"gone")  # What has been read stays as it was.
    assert len({i for _ in range(2) for i in ids_of(batches, 1)}) == 12
    assert not batches.skipped


def test_a_cache_keeps_what_fits_its_budget_and_nothing_else():
    cache = MemoryCache(4000)
    for key in range(5):
        cache.put(key, f"value {key}", size=1000)
    cache.put(0, "another", size=1000)
    assert len(cache) == 2 and cache.get(0) == "value 0" and cache.get(2) is None
    cache.put("small", 1, size=100)
    assert cache.get("small") == 1


def test_pictures_that_cannot_be_used_are_counted_with_a_cache_too(tmp_path):
    config = picture_records(tmp_path)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    batches = iterator(config, batch_size=10)
    take(batches, 3)
    assert batches.skipped == {"corrupt_image": 2}
