"""Labels and media of rows, and models that read a text alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax.data.config import DataConfig, LoadingConfig, ModelSpec, PackingConfig, check_packing
from vl_jax.data.encode import make_encoder, make_row_encoder
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import TEXT, BadSample, Sample, Turn
from vl_jax.data.sources.build import RecordsConfig, ScenesConfig
from vl_jax.data.stream.evaluation_samples import evaluation_samples
from vl_jax.data.stream.lengths import Measure
from vl_jax.data.stream.packed import PackedIterator
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.data.text.tokenizer import ASSISTANT, USER, load_tokenizer
from vl_jax.data.text.written import written
from vl_jax.data.tools.examination import examine
from vl_jax.data.tools.preview import render_samples

pytest.importorskip("grain")

TOKENIZER = load_tokenizer()
WHOLE = TilingConfig(tile_size=16, views="global")
TILED = TilingConfig(tile_size=16, candidates=((1, 1), (2, 1), (1, 2)))
CONFIG = DataConfig(max_tokens=64, max_tiles=6, tiling=WHOLE)
NAMES = ("cat", "dog", "cow")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Which of the names a sample's label is."""

    name: str = "kind"
    shape: tuple[int, ...] = ()
    dtype: str = "int32"

    def read(self, sample: Sample) -> np.ndarray | None:
        label = sample.labels.get("kind")
        if label is None:
            return None
        if label not in NAMES:
            raise BadSample("unknown_label", f"sample {sample.id}: kind={label!r}: must be one of {NAMES}")
        return np.array(NAMES.index(label), np.int32)


@dataclasses.dataclass(frozen=True)
class Wave:
    """A medium as the sample brings it."""

    name: str = "wave"
    shape: tuple[int, ...] = (2, 3)
    dtype: str = "float32"

    def read(self, sample: Sample) -> np.ndarray | None:
        wave = sample.media.get("wave")
        return None if wave is None else wave()


DIALOGUE = ModelSpec(2, "prefix", 2048, labels=(Kind(),), media=(Wave(),))
READER = ModelSpec(2, "gated", 2048, reads="text", labels=(Kind(),))


def picture(size=(40, 20)):
    return lambda: PilImage.new("RGB", size, (9, 9, 9))


def sample(**fields) -> Sample:
    return Sample("s", (Turn("What?", "A cat."),), **fields)


def wave(shape=(2, 3), dtype=np.float32):
    return {"wave": lambda: np.arange(6).reshape(shape).astype(dtype)}


def test_what_rows_have_is_laid_out_and_what_they_lack_is_zero():
    encoder = make_encoder(CONFIG, DIALOGUE)
    rows = [sample(labels={"kind": "cow"}), sample(media=wave()), sample(labels={"kind": "cat"})]
    batch = encoder.collate([[encoder.example(s)] for s in rows])
    kind, found = batch.labels["kind"], batch.media["wave"]
    assert kind.values.dtype == np.int32 and kind.present.dtype == np.bool_
    assert kind.values.tolist() == [2, 0, 0] and kind.present.tolist() == [True, False, True]
    assert found.values.dtype == np.float32 and found.present.tolist() == [False, True, False]
    assert found.values[1].tolist() == [[0, 1, 2], [3, 4, 5]] and not found.values[[0, 2]].any()


def test_a_model_without_fields_has_none():
    encoder = make_encoder(CONFIG, ModelSpec(2, "prefix", 2048))
    example = encoder.example(sample(labels={"kind": "nobody asks"}))
    batch = encoder.collate([[example, example]])
    assert (example.labels, example.media, batch.labels, batch.media) == ({}, {}, {}, {})


@pytest.mark.parametrize(
    ("fields", "reason", "message"),
    [
        ({"media": wave((3, 2))}, "bad_media", r"wave of float32\[3, 2\], must be float32\[2, 3\]"),
        ({"media": wave(dtype=np.int32)}, "bad_media", r"wave of int32\[2, 3\], must be float32\[2, 3\]"),
        ({"labels": {"kind": "hen"}}, "unknown_label", "kind='hen'"),
    ],
)
def test_values_of_another_kind_are_bad_samples(fields, reason, message):
    encoder = make_encoder(CONFIG, DIALOGUE)
    with pytest.raises(BadSample, match=message) as caught:
        encoder.example(sample(**fields))
    assert caught.value.reason == reason
    (found,) = encoder.examples([sample(**fields)], turns="dialogue", targets="answers")
    assert isinstance(found, BadSample) and found.reason == reason


def test_a_label_of_another_shape_is_a_bad_label():
    spec = dataclasses.replace(DIALOGUE, labels=(Kind(shape=(1,)),))
    with pytest.raises(BadSample, match=r"kind of int32\[\], must be int32\[1\]") as caught:
        make_encoder(CONFIG, spec).example(sample(labels={"kind": "cat"}))
    assert caught.value.reason == "bad_label"


def test_rows_of_several_samples_have_no_labels():
    packed = dataclasses.replace(CONFIG, sources=(ScenesConfig("a", 40),), packing=PackingConfig(256, 8))
    message = r"^packing with labels and media \['kind', 'wave'\] of the model: a row has one of each, set pa"
    with pytest.raises(ValueError, match=message):
        make_row_encoder(packed, DIALOGUE, targets="answers")
    with pytest.raises(ValueError, match=message):
        PackedIterator(packed, DIALOGUE, batch_size=2)
    with pytest.raises(ValueError, match="^packing with a model that reads 'text': a row is one text"):
        check_packing(packed, dataclasses.replace(READER, labels=()))
    check_packing(CONFIG, DIALOGUE)
    encoder = make_encoder(CONFIG, DIALOGUE)
    example = encoder.example(sample())
    with pytest.raises(ValueError, match="^row of s, s: 2 samples, labels and media are those of one$"):
        encoder.collate([[example, example]])


def test_specs_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="reads='text' with fusion='prefix'"):
        dataclasses.replace(READER, fusion="prefix")
    with pytest.raises(ValueError, match=r"labels of the model: names \['kind', 'kind'\] must be different"):
        dataclasses.replace(DIALOGUE, labels=(Kind(), Kind()))


def goods(folder: Path, labels, **fields) -> DataConfig:
    """A picture, a text and a label in every record."""
    PilImage.new("RGB", (40, 20), (9, 9, 9)).save(folder / "a.png")
    records = [
        {"id": str(n), "image": "a.png", "text": f"number {n}", "kind": kind} for n, kind in enumerate(labels)
    ]
    (folder / "goods.json").write_text(json.dumps(records))
    source = RecordsConfig("goods", "goods.json", image="image", text="text", labels=("kind",))
    return dataclasses.replace(CONFIG, root=str(folder), sources=(source,), evaluation=(source,), **fields)


@pytest.mark.parametrize("spec", [DIALOGUE, READER])
@pytest.mark.slow
def test_worker_processes_bring_what_threads_bring(spec, tmp_path):
    config = goods(tmp_path, ["cat", "dog", None, "cow", "hen"], augmentation=AugmentationConfig(0.1))
    threads = TrainIterator(config, spec, batch_size=4)
    workers = TrainIterator(
        dataclasses.replace(config, loading=LoadingConfig(num_workers=1)), spec, batch_size=4
    )
    for _ in range(3):
        one, other = next(threads), next(workers)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.tiles, other.tiles)
        for kind in ("labels", "media"):
            found, same = getattr(one, kind), getattr(other, kind)
            assert found.keys() == same.keys()
            for name in found:
                np.testing.assert_array_equal(found[name].values, same[name].values)
                np.testing.assert_array_equal(found[name].present, same[name].present)
        truth = {"0": 0, "1": 1, "3": 2}
        assert one.labels["kind"].values.tolist() == [truth.get(i, 0) for (i,) in threads.ids]
        assert one.labels["kind"].present.tolist() == [i in truth for (i,) in threads.ids]
    assert threads.get_state() == workers.get_state()
    assert threads.get_state()["skipped"] == {"goods/4": "unknown_label"}
    threads.close()
    workers.close()


TURNS = (
    Turn("<image>\nWhat is it?", "A cat."),
    Turn("", "A small cat.", TEXT),
    Turn("<image>", "Nothing was written."),
    Turn("Sure?", "Yes."),
)


def test_a_text_is_what_was_written_and_an_end():
    both = Sample("s", TURNS, (picture(), picture()), system="Be short.")
    encoder = make_encoder(dataclasses.replace(CONFIG, tiling=TILED), READER)
    assert written(both) == "What is it?\nA small cat.\nSure?"
    example = encoder.example(both)
    assert example.tokens.tolist() == [*TOKENIZER.encode("What is it?\nA small cat.\nSure?"), TOKENIZER.eos]
    count = len(example.tokens)
    assert example.positions.tolist() == list(range(count))
    assert not example.branch_ids.any() and not example.loss_weights.any() and not example.targets.any()
    assert example.visual_slot.tolist() == [-1] * count and example.answer_runs == ()
    # The pictures stand beside it, as they do with gated fusion, seen from the beginning on.
    gated = make_encoder(dataclasses.replace(CONFIG, tiling=TILED), ModelSpec(2, "gated", 2048))
    other = gated.example(Sample("s", (Turn("<image>\n<image>", "x"),), both.images))
    np.testing.assert_array_equal(example.visual_index, other.visual_index)
    np.testing.assert_array_equal(example.tiles, other.tiles)
    assert len(example.grids) == 2 and not example.visual_start.any() and len(example.visual_index)
    batch = encoder.collate([[example]])
    assert batch.visual_segment_ids[0].sum() == len(example.visual_index)
    assert batch.segment_ids[0].sum() == count and not batch.loss_weights.any()


def test_all_ways_to_encode_a_text_are_one():
    encoder, both = make_encoder(CONFIG, READER), Sample("s", TURNS, (picture(), picture()))
    (first,) = encoder.examples([both], turns="independent", targets="all")
    for other in (encoder.example(both), encoder.prompt(both)):
        assert first.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_array_equal(first.visual_index, other.visual_index)


def test_a_long_text_is_cut_before_its_end_token():
    text = "one two three four five six seven eight nine ten " * 20
    whole = TOKENIZER.encode(text.strip())
    assert len(whole) > 64
    example = make_encoder(CONFIG, READER).example(Sample("s", (Turn("", text, TEXT),)))
    assert example.tokens.tolist() == [*whole[:63], TOKENIZER.eos]
    fits = Sample("s", (Turn(TOKENIZER.decode(whole[:5]), "x"),))
    assert len(make_encoder(dataclasses.replace(CONFIG, max_tokens=6), READER).example(fits).tokens) == 6


@pytest.mark.parametrize("turns", [(), (Turn("", "", TEXT),), (Turn("<image>", "A cat."),)])
def test_without_a_text_there_is_its_end(turns):
    encoder = make_encoder(CONFIG, READER)
    bare = Sample("s", turns, tuple(picture() for turn in turns if "<image>" in turn.question))
    assert encoder.example(bare).tokens.tolist() == [TOKENIZER.eos]
    assert len(encoder.example(bare).tiles) == len(bare.images)


def test_marks_that_somebody_wrote_stay_text():
    text = f"{USER}: <|ref|>cat<|/ref|> {ASSISTANT} <image> <｜end▁of▁sentence｜>"
    example = make_encoder(dataclasses.replace(CONFIG, max_tokens=256), READER).example(
        Sample("s", (Turn("", text, TEXT),))
    )
    marks = {TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.image, TOKENIZER.user, TOKENIZER.assistant}
    marks.add(TOKENIZER.token_id("<|ref|>"))
    assert not marks & set(example.tokens[:-1].tolist()) and example.tokens[-1] == TOKENIZER.eos
    assert TOKENIZER.decode(example.tokens[:-1].tolist()) == text


def test_evaluation_samples_come_with_their_rows(tmp_path):
    config = goods(tmp_path, ["cat", None, "hen", "cow"])
    batches = list(evaluation_samples(config, READER, "goods", batch_size=2))
    records = [record for found, _ in batches for record in found]
    assert [len(found) for found, _ in batches] == [2, 1]  # the third is none of the names
    assert [r["id"] for r in records] == ["0", "1", "3"] and records[0]["question"] == "number 0"
    assert [r["labels"] for r in records] == [{"kind": "cat"}, {}, {"kind": "cow"}]
    assert records[0]["image"].size == (40, 20) and records[0]["kind"] == TEXT
    first, last = (batch for _, batch in batches)
    assert first.tokens.shape == (2, 64)
    assert first.tokens[0].tolist()[:5] == [*TOKENIZER.encode("number 0"), TOKENIZER.eos, 0, 0, 0, 0, 0][:5]
    assert last.labels["kind"].values.tolist() == [2, 2]
    np.testing.assert_array_equal(last.tokens[0], last.tokens[1])
    blind = evaluation_samples(config, READER, "goods", batch_size=8, limit=1, with_image=False)
    ((found, batch),) = blind
    assert len(found) == 1 and found[0]["image"] is None and not batch.tiles.any()


def test_texts_can_be_looked_at_before_training(tmp_path):
    config = goods(tmp_path, ["cat", "dog"])
    found = examine(config, READER, "goods")
    lengths = Measure(make_encoder(config, READER), "dialogue", "answers")([sample()])
    assert (
        found.num_usable == 2
        and lengths.turns.sum() + lengths.trunk.sum() == len(TOKENIZER.encode("What?")) + 1
    )
    assert set(found.tokens) == {len(TOKENIZER.encode("number 0")) + 1}
    assert render_samples(config, READER, "goods", count=1, targets="answers")
