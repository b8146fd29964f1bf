"""Data sets of TensorFlow Datasets: prepared here without TensorFlow, or shaped as the library has them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax.data.sources.build import BadSample, TfdsConfig, open_source

tfds = pytest.importorskip("tensorflow_datasets")
REFERRING = {"answer": "objects/refexp/raw", "boxes": "objects/bbox", "prompt": "Locate {}."}


def png(colour: int, mode: str = "RGB") -> io.BytesIO:
    out = io.BytesIO()
    PilImage.new(mode, (8, 6), (colour, 9, 9)[: len(mode)]).save(out, "PNG")
    return io.BytesIO(out.getvalue())


def box(xmin: float, ymin: float, xmax: float, ymax: float):
    return tfds.features.BBox(ymin=float(ymin), xmin=float(xmin), ymax=float(ymax), xmax=float(xmax))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a small data set, shaped as VQAv2, COCO captions and phrases with boxes are."""
    folder = tmp_path_factory.mktemp("prepared")
    text, sequence = tfds.features.Text(), tfds.features.Sequence
    label = tfds.features.ClassLabel(names=["fish", "bird"])
    features = {
        "image": tfds.features.Image(),
        "image/id": np.int64,
        "question": text,
        "said": {"answers": sequence(text)},
        "captions": sequence({"id": np.int64, "text": text}),
        "objects": sequence({"bbox": tfds.features.BBoxFeature(), "phrase": text, "label": label}),
    }

    class TinyVqa(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder  # where it would look for texts about itself

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                objects = [(box(0.25, 0, 1, 0.5), "the owl"), (box(0, 0, 1, 1), "all of it")]
                yield (
                    i,
                    {
                        "image": png(i),
                        "image/id": i,
                        "question": f"What {i}?",
                        "said": {"answers": ["red", "blue", "blue"]},
                        "captions": [{"id": k, "text": f"caption {k} of {i}"} for k in range(2)],
                        "objects": [{"bbox": b, "phrase": p, "label": "bird"} for b, p in objects],
                    },
                )

    TinyVqa(data_dir=folder / "data", file_format="array_record").download_and_prepare()
    return folder


def test_a_data_set_of_tfds_is_read_by_name(prepared):
    config = TfdsConfig("t", "tiny_vqa", root="data", question="question", answer="said/answers")
    source = open_source(config, root=str(prepared))
    assert len(source) == 3 and len(source.files) == 1
    numbers = set()
    for i in range(3):
        sample = source[i]
        number = sample.images[0]().getpixel((0, 0))[0]
        numbers.add(number)
        question = f"What {number}?"
        assert [(t.question, t.answer) for t in sample.turns] == [
            (f"<image>\n{question}", "blue"),
            (question, "red"),
        ]
    assert numbers == {0, 1, 2}


def test_each_caption_of_a_picture_is_a_turn(prepared):
    config = TfdsConfig("t", "tiny_vqa", root="data", answer="captions/text", prompt="Describe the picture.")
    sample = open_source(config, root=str(prepared))[0]
    number = sample.images[0]().getpixel((0, 0))[0]
    assert [(t.question, t.answer) for t in sample.turns] == [
        ("<image>\nDescribe the picture.", f"caption 0 of {number}"),
        ("Describe the picture.", f"caption 1 of {number}"),
    ]


def test_phrases_of_tfds_are_located(prepared):
    config = TfdsConfig(
        "t", "tiny_vqa", root="data", answer="objects/phrase", boxes="objects/bbox", prompt="Locate {}."
    )
    sample = open_source(config, root=str(prepared))[0]
    width, height = sample.images[0]().size
    assert [t.question for t in sample.turns] == ["<image>\nLocate the owl.", "Locate all of it."]
    assert sample.turns[0].boxes[0].corners == (0.25 * width, 0, width, 0.5 * height)
    assert sample.turns[0].answer == "<|ref|>the owl<|/ref|><|det|>[[250, 0, 999, 500]]<|/det|>"
    with pytest.raises(ValueError, match="boxes='b' of source 't': needs an image, no question"):
        TfdsConfig("t", "d", boxes="b")


def test_boxes_of_a_class_are_one_answer(prepared):
    config = TfdsConfig(
        "t", "tiny_vqa", root="data", answer="objects/label", boxes="objects/bbox", prompt="Locate every {}."
    )
    sample = open_source(config, root=str(prepared))[0]
    assert [t.question for t in sample.turns] == ["<image>\nLocate every bird."]
    assert (
        sample.turns[0].answer == "<|ref|>bird<|/ref|><|det|>[[250, 0, 999, 500], [0, 0, 999, 999]]<|/det|>"
    )
    named = TfdsConfig("t", "tiny_vqa", root="data", answer="objects/label", prompt="What is there?")
    assert [t.answer for t in open_source(named, root=str(prepared))[0].turns] == ["bird"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "absent"}, "data, absent, train: "),
        ({"split": "test"}, "tiny_vqa, test: "),
        ({"answer": "said/reply"}, "no feature 'said/reply'"),
        (
            {"answer": "reply"},
            "no feature 'reply'; there are image, image/id, question, said, said/answers, ",
        ),
    ],
)
def test_a_data_set_that_is_not_there_is_named(prepared, change, message):
    config = TfdsConfig(
        **{"name": "t", "dataset": "tiny_vqa", "root": "data", "answer": "question", **change}
    )
    with pytest.raises(ValueError, match=f"source 't': .*{message}") as caught:
        open_source(config, root=str(prepared))
    assert "\n" not in str(caught.value)


class Records(list):
    """What ``tfds.data_source`` gives, as far as it is used."""

    dataset_info: SimpleNamespace


def open_ref_coco(monkeypatch, examples, change=lambda record: record):
    """The source over ``ref_coco`` as the library has it, with these examples serialized and read back.

    Args:
      change: what is done to a record as the library read it.
    """
    # Serializing lists of lists asks for a type of TensorFlow's and then uses NumPy's all the same.
    info = tfds.core.features.feature.TensorInfo
    monkeypatch.setattr(info, "dtype", property(lambda self: self.np_dtype))

    def data_source(builder, split, decoders=None, **_):
        features = builder.info.features
        stored = [features.serialize_example(features.encode_example(example)) for example in examples]
        read = [features.deserialize_example_np(record, decoders=decoders) for record in stored]
        found = Records(map(change, read))
        found.dataset_info = SimpleNamespace(features=features, data_dir="absent")
        return found

    with tfds.testing.mock_data(as_data_source_fn=data_source):
        return open_source(TfdsConfig("t", "ref_coco/refcoco_unc", **REFERRING))


def referring(*expressions: list[str]):
    """An example of ``ref_coco`` with an object for each list of expressions."""
    boxes = [box(0.25, 0, 1, 0.5), box(0, 0, 0.5, 1), box(0.5, 0.5, 1, 1)]
    objects = []
    for number, (texts, bbox) in enumerate(zip(expressions, boxes, strict=False)):
        said = [{"refexp_id": i, "raw": text} for i, text in enumerate(texts)]
        numbers = {"id": number, "area": 4, "label": 1, "gt_box_index": number}
        objects.append({**numbers, "bbox": bbox, "mask": png(1, "L"), "refexp": said})
    return {"image": png(7), "image/id": 3, "objects": objects, "coco_annotations": []}


def test_each_expression_of_ref_coco_is_located(monkeypatch):
    examples = [
        referring(["the owl"], ["left half", "half on the left", "left half"], []),
        referring(["one"]),
    ]
    source = open_ref_coco(monkeypatch, examples)
    assert len(source) == 2
    sample = source[0]
    assert [t.question for t in sample.turns] == [
        "<image>\nLocate the owl.",
        "Locate left half.",
        "Locate half on the left.",
    ]
    assert [t.boxes[0].corners for t in sample.turns] == [(2, 0, 8, 3), (0, 0, 4, 6), (0, 0, 4, 6)]
    assert sample.turns[2].answer == "<|ref|>half on the left<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|>"
    assert sample.images[0]().getpixel((0, 0)) == (7, 9, 9)
    assert [t.question for t in source[1].turns] == ["<image>\nLocate one."]


def inside(**changes):
    def change(record):
        return {**record, "objects": {**record["objects"], **changes}}

    return change


def raw(value):
    return inside(refexp={"raw": value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (raw([["one"]]), "bad_box"),
        (raw([["one"], ["two"], ["three"]]), "bad_box"),
        (raw([["one"], [3]]), "bad_conversation"),
        (raw([["one"], [["two"]]]), "bad_conversation"),
        (raw([["one"], None]), "bad_conversation"),
        (raw(None), "bad_conversation"),
        (inside(refexp=[["one"], ["two"]]), "bad_conversation"),
        (raw([["one"], [b" "]]), "bad_box"),
        (raw([["one"], ["<|ref|>"]]), "bad_box"),
        (raw([["one"], ["an <image>"]]), "bad_box"),
        (raw([[], []]), "no_boxes"),
        (inside(bbox=[[0, 0, 1, 1], [0, 0, 1]]), "bad_box"),
        (inside(bbox=[[0, 0, 1, 1], [0, 0, 1, 1.5]]), "bad_box"),
        (inside(bbox=[[0, 0, 1, 1], [0, 0, 1, float("nan")]]), "bad_box"),
        (inside(bbox=[[0, 0, 1, 1], [0.5, 0, 0.5, 1]]), "bad_box"),
        (inside(bbox=None), "bad_box"),
        (lambda record: {**record, "objects": []}, "no_boxes"),
        (lambda record: {**record, "objects": b"?"}, "bad_conversation"),
    ],
)
def test_expressions_that_are_no_lists_beside_boxes_have_a_reason(monkeypatch, change, reason):
    source = open_ref_coco(monkeypatch, [referring(["one"], ["two"])], change)
    with pytest.raises(BadSample, match="ref_coco/refcoco_unc, train, record 0") as caught:
        source[0]
    assert caught.value.reason == reason


def test_records_of_invented_lengths_are_counted():
    with tfds.testing.mock_data(num_examples=2):
        source = open_source(TfdsConfig("t", "ref_coco", **REFERRING))
    assert len(source) == 2
    with pytest.raises(BadSample, match="ref_coco, train, record 1") as caught:
        source[1]
    assert caught.value.reason == "bad_record"
