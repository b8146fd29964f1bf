"""Lengths that are known before a sample is encoded are those it has afterwards; the index keeps them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax.data.config import DataConfig, ModelSpec, PackingConfig
from vl_jax.data.encode import make_row_encoder
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import LlavaConfig, ScenesConfig, open_source
from vl_jax.data.stream import lengths as lengths_lib
from vl_jax.data.stream.lengths import Measure, Measuring, open_index

TILED = TilingConfig(tile_size=16, candidates=((1, 1), (2, 1), (1, 2), (2, 2)))
CONFIG = DataConfig(
    max_tokens=700, max_tiles=20, tiling=TILED, packing=PackingConfig(max_tokens=4000, max_tiles=40)
)


def write(folder) -> LlavaConfig:
    """Dialogues with none, one and two images of several sizes, some of them broken."""
    records = []
    for i, size in enumerate([(40, 20), (20, 60), (9, 9), (50, 50)]):
        PilImage.new("RGB", size, (i, 9, 9)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "3.png").read_bytes()[:60])
    for i in range(12):
        images = [[], ["0.png"], ["1.png", "2.png"], ["3.png"], ["broken.png"], ["absent.png"]][i % 6]
        turns = []
        for t in range(1 + i % 4):
            question = "<image>\n" * (len(images) if t == 0 else 0) + f"What is number {t}{'?' * t}"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": "yes " * (t + 1)}]
        system = [{"from": "system", "value": "Be short."}] if i % 3 else []
        records.append({"id": str(i), "image": images, "conversations": system + turns})
    records[1]["conversations"][1]["value"] = "What is it?\n<image>"  # the image after the question
    (folder / "data.json").write_text(json.dumps(records))
    return LlavaConfig("talk", "data.json")


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("fusion", ["prefix", "gated"])
@pytest.mark.parametrize(
    ("turns", "targets"), [("independent", "answers"), ("dialogue", "all"), ("independent", "all")]
)
@pytest.mark.slow
def test_lengths_are_those_of_the_encoded_draws(tmp_path, turns, targets, fusion, blind):
    encoder = make_row_encoder(CONFIG, ModelSpec(2, fusion, 2048), targets=targets)
    for config in (write(tmp_path), ScenesConfig("scenes", num_examples=4)):
        source = open_source(config, root=str(tmp_path))
        known = Measuring(source, Measure(encoder, turns, targets, blind, verify=True)).take(
            np.arange(len(source))
        )
        faults = {
            record: reason for k in (0, 6) for record, reason in ((4 + k, "corrupt"), (5 + k, "missing"))
        }
        faults = {record: f"{reason}_image" for record, reason in faults.items()}
        assert known.faults == (faults if config.name == "talk" else {})
        for record in set(range(len(source))) - set(known.faults):
            sample = source[record].without_images() if blind else source[record]
            start, count = known.offsets[record], known.offsets[record + 1] - known.offsets[record]
            assert count == len(sample.turns)
            draws = [tuple(range(n)) for n in range(1, len(sample.turns) + 1)]
            if turns == "independent":
                draws += [(len(sample.turns) - 1,), draws[-1][::-1]]
            for chosen in draws:
                (example,) = encoder.draws([sample], [chosen], turns=turns, targets=targets)
                at = start + np.array(chosen)
                assert len(example.tokens) == known.trunk[record] + known.turns[at].sum()
                predicted = known.trunk_targets[record] + known.targets[at].sum()
                assert np.count_nonzero(example.loss_weights) == predicted
                assert len(example.tiles) == known.tiles[record]


def test_chosen_turns_read_as_in_a_conversation_of_their_own():
    spec = ModelSpec(2, "prefix", 2048)
    encoder = make_row_encoder(CONFIG, spec, targets="answers")
    sample = open_source(ScenesConfig("s"))[3]
    for chosen in ([2], [4, 1], [0, 1]):
        alone = encoder.example(sample.select(chosen), turns="independent")
        (drawn,) = encoder.draws([sample], [chosen], turns="independent", targets="answers")
        for name in (
            "tokens",
            "targets",
            "loss_weights",
            "positions",
            "visual_slot",
            "tiles",
            "visual_index",
        ):
            np.testing.assert_array_equal(getattr(alone, name), getattr(drawn, name), err_msg=name)
        assert [list(r) for r in drawn.answer_runs] == [list(r) for r in alone.answer_runs]


def test_an_index_is_made_once_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths_lib, "_PART", 5)
    config = write(tmp_path)
    source = open_source(config, root=str(tmp_path))
    measure = Measure(
        make_row_encoder(CONFIG, ModelSpec(2, "prefix", 2048), targets="all"), "dialogue", "all", verify=True
    )
    done = []

    def stop(count, total):
        done.append(count)
        if count == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index(tmp_path / "index", config, source, measure, progress=stop)
    read = []
    original = type(source).__getitem__
    monkeypatch.setattr(type(source), "__getitem__", lambda self, i: read.append(i) or original(self, i))
    index = open_index(tmp_path / "index", config, source, measure, num_threads=2)
    assert sorted(read) == [10, 11] and done == [5, 10]
    expected = Measuring(source, measure).take(np.arange(12))
    read.clear()
    again = open_index(tmp_path / "index", config, source, measure)
    assert again.turns.dtype == again.fault.dtype == np.uint8  # a million records are some tens of megabytes
    assert not read and again.faults == index.faults == expected.faults
    for name in ("trunk", "tiles", "offsets", "turns", "targets", "answers"):
        np.testing.assert_array_equal(getattr(again, name), getattr(expected, name))
    open_index(tmp_path / "index", config, source, dataclasses.replace(measure, turns="independent"))
    open_index(tmp_path / "index", config, source, measure, stamp="changed")
    assert len(read) == 24 and len(list((tmp_path / "index").iterdir())) == 3
